# SPDX-License-Identifier: GPL-2.0-or-later
"""Drives a data path of rdma: between the lab's hosts step by step. Host a is the source, host b
the destination.

On each host one rdma-pair process (tests/roce/pair/) serves one test after another. It is replaced
after a test that failed, and after one that removed an RDMA device: librdmacm keeps the old device
open until its process ends."""

import os
import queue
import time

from roce_lab import LabError, on_each, wait_until

KIB, MIB = 1024, 1024 * 1024
PORT = 4444
CONNECT_MS = 30000
BAD_WORDS = ("CRITICAL", "WARNING", "ERROR", "Sanitizer", "runtime error")
ENVIRONMENT = {
    name: value for name, value in os.environ.items() if name.endswith("SAN_OPTIONS") or name == "G_MESSAGES_DEBUG"
}


def expect(condition, message):
    if not condition:
        raise LabError(message)


class Spoiled(LabError):
    """rdma_cm makes no connection over rail 1 any more, for any program."""


def is_spoiled(lab):
    """Returns whether rping gets no answer over rail 1. A message of rdma_cm that soft-RoCE could
    not send may spoil a device's management queue pair until the device is recreated
    (soft-roce/README.md).
    """
    server = lab.b.popen("rping", "-s", "-a", lab.b.address(1), "-C", "1")
    try:
        wait_until("rping runs", 30, server.alive)
        done = lab.a.run("timeout", "8", "rping", "-c", "-a", lab.b.address(1), "-C", "1", timeout=30)
    finally:
        server.kill()
    return done.returncode == 124  # the exit code of timeout; a refusal also counts as an answer


class Program:
    """An rdma-pair process on a host."""

    def __init__(self, host, path, wrapper=()):
        """wrapper: a command that execs the program."""
        self.host = host
        self.lines = queue.Queue()
        self.partial = b""
        self.errors = bytearray()
        argv = (*wrapper, path)
        self.process = host.popen(*argv, env=ENVIRONMENT, out=self._handle_output, err=self.errors.extend)

    def _handle_output(self, data):
        *lines, self.partial = (self.partial + data).split(b"\n")
        for line in lines:
            self.lines.put(line.decode())

    def ask(self, *words):
        self.process.write((" ".join(map(str, words)) + "\n").encode())

    def answer(self, seconds=90):
        """Returns the text after "ok", or raises LabError with the text after "error"."""
        deadline = time.monotonic() + seconds
        while (line := self._next_line()) is None:
            expect(self.process.alive() or not self.lines.empty(), f"rdma-pair has ended: {self.error_text()}")
            expect(time.monotonic() < deadline, f"rdma-pair on host {self.host.name} gave no answer in {seconds} s")
        kind, _, rest = line.partition(" ")
        expect(kind == "ok", rest)
        return rest.strip()

    def _next_line(self):
        try:
            return self.lines.get(timeout=0.5)
        except queue.Empty:
            return None

    def do(self, *words, seconds=90):
        self.ask(*words)
        return self.answer(seconds)

    def resources(self):
        """Returns descriptors, threads, pinned bytes, and the bytes in each block of a side."""
        fds, threads, pinned, *blocks = map(int, self.do("resources").split())
        return {"fds": fds, "threads": threads, "pinned": pinned * KIB, "blocks": [n * KIB for n in blocks]}

    def error_text(self):
        return self.errors.decode(errors="replace")

    def expect_no_complaint(self):
        """Expects no warning and no sanitizer's report on standard error since the last call."""
        text = self.error_text()
        self.errors.clear()
        expect(not any(mark in text for mark in BAD_WORDS), f"rdma-pair on host {self.host.name}: {text}")

    def end(self):
        self.process.write(b"")
        code = self.process.wait(30)
        expect(code == 0, f"rdma-pair on host {self.host.name} ended with {code}: {self.error_text()}")
        self.expect_no_complaint()


class Programs:
    """The two processes that serve all tests on one lab."""

    def __init__(self, lab, build):
        self.lab = lab
        self.path = os.path.join(build, "tests", "roce", "rdma-pair")
        self.running = ()

    def both(self):
        """Returns (source, destination)."""
        if not all(program.process.alive() for program in self.running):
            self.kill()
        if not self.running:
            self.running = tuple(on_each(self.lab.hosts, lambda host: Program(host, self.path)))
        return self.running

    def end(self):
        """Ends both. Raises LabError if one ends with an error."""
        running, self.running = self.running, ()
        on_each(running, Program.end) if running else None

    def kill(self):
        for program in self.running:
            program.process.close()
        self.running = ()


class Side:
    """A source or destination, in a process of rdma-pair."""

    def __init__(self, program, role, uri):
        self.program, self.name, self.uri = program, role, uri
        self.process = program.process
        self.ask, self.answer, self.do = program.ask, program.answer, program.do
        self.resources = program.resources
        self.do("begin", role, uri)

    def refuses(self, *words):
        """Returns the reason for which a command is refused."""
        try:
            self.do(*words)
            if (self.name, words[0]) == ("destination", "open"):
                self.answer()  # the second one
        except LabError as error:
            return str(error)
        raise LabError(f"{self.name} did {words[0]}, and should not have")


class Pair:
    """Source and destination over rail 1, for one test."""

    def __init__(self, programs, options="", notes=None, fresh=False):
        """options: of the URI. notes: lines for the report. fresh: start new processes, which have
        no device open."""
        self.lab, self.programs = programs.lab, programs
        self.uri = f"rdma:{self.lab.b.address(1)}:{PORT}" + (f"?{options}" if options else "")
        self.notes = [] if notes is None else notes
        self.others = []  # programs for this test alone
        self.sides = []
        self.epoch = 0
        self.broken = False  # the rail has to be restored
        self.device_removed = False  # both processes have to end
        if fresh:
            programs.end()

    def __enter__(self):
        source, destination = self.programs.both()
        self.idle = [(program, program.resources()["threads"]) for program in (source, destination)]
        self.destination = Side(destination, "destination", self.uri)
        self.source = Side(source, "source", self.uri)
        self.sides = [self.destination, self.source]
        self.threads = [(side, side.resources()["threads"]) for side in self.sides]
        return self

    def note(self, text):
        self.notes.append(text)

    # Faults of rail 1

    def inject(self, fault, host=None):
        """fault: "cut" or one of roce_lab.FAULTS."""
        self.broken = True
        if fault == "cut":
            self.lab.cut(1, host)
        else:
            self.lab.inject(fault, 1, host)
        self.device_removed |= fault == "rdma-del"

    def mend(self):
        """Restores rail 1. Waits for the end of the paths that were closed while it was down: a
        rail that goes down again at that moment would spoil the device."""
        self.restore()
        for side, threads in self.threads:
            wait_until(
                f"{side.name} keeps no closed path",
                60,
                lambda s=side, n=threads: s.resources()["threads"] == n,
                0.1,
            )

    def restore(self):
        self.lab.restore(1)
        self.broken = False

    # Beginning and end

    def other(self, role, wrapper=(), port=PORT):
        """Starts one more side, in a process of its own."""
        host = self.lab.a if role == "source" else self.lab.b
        program = Program(host, self.programs.path, wrapper)
        self.others.append(program)
        return Side(program, role, self.uri.replace(str(PORT), str(port)))

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                self._end()
        except LabError:
            kind = LabError
            raise
        finally:
            for program in self.others:
                program.process.close()
            if kind is not None:
                for program in (*self.programs.running, *self.others):
                    self.note(f"host {program.host.name}: {program.error_text()[-2000:]}")
                self.programs.kill()
            if self.broken:
                self.restore()

    def _end(self):
        for program in self.others:
            program.end()
        if self.device_removed:
            self.programs.end()
            return
        if self.broken:
            self.restore()
        for side in self.sides:
            side.do("end")
        for program, threads in self.idle:
            wait_until("all threads of the test have ended", 60, lambda p=program, n=threads: at_rest(p, n), 0.1)
            program.expect_no_complaint()

    # Steps

    def open(self):
        """Connects with a new epoch, without any grant yet."""
        self.epoch += 1
        self.destination.do("open", self.epoch, CONNECT_MS)
        wait_until("the source is connected", CONNECT_MS / 1000, self._try_open, 0.1)
        self.destination.answer()

    def _try_open(self):
        """Tries once: a destination may not listen yet after its device came back."""
        try:
            self.source.do("open", self.epoch, CONNECT_MS)
            return True
        except LabError as error:
            if "nobody listens" in str(error):
                return False
            if "no answer in time" in str(error) and is_spoiled(self.lab):
                raise Spoiled(str(error)) from None
            raise

    def grant(self):
        """Returns (block, offset, length) of all grants."""
        grants = self.source.do("grants")
        self.destination.do("set-grants", grants)
        return [tuple(map(int, word.split(":")[:3])) for word in grants.split()]

    def connect(self):
        self.open()
        return self.grant()

    def close(self):
        """Returns the duration of draining in microseconds."""
        return [int(side.do("close")) for side in self.sides]

    def fill(self, block, offset, length, seed=1):
        self.source.do("fill", block, offset, length, seed)

    def check(self, block, offset, length, size=64 * KIB, lane=1, seed=1):
        """Expects that READs of `size` bytes, one by one, fetch the bytes that fill() wrote."""
        self.destination.do("check", lane, block, offset, length, size, seed)


def at_rest(program, threads):
    """Returns whether a process without a side has released the resources of the tests."""
    found = program.resources()
    expect(found["pinned"] == 0, f"rdma-pair on host {program.host.name} has pinned memory without a side: {found}")
    return found["threads"] <= threads


def perform(programs, test, notes):
    """Runs one test. Runs it again with new devices if soft-RoCE's device is spoiled for all
    programs."""
    function, options, kind = test
    try:
        with Pair(programs, options, notes, **kind) as pair:
            return function(pair)
    except Spoiled as error:
        notes.append(f"soft-RoCE's device is spoiled, for rping too ({error}); once more with a new one")
    programs.kill()
    programs.lab.renew(1)
    with Pair(programs, options, notes, **kind) as pair:
        return function(pair)
