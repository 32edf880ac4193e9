#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""The data path of rdma: between two RoCE hosts: a is the source, b the destination, no engine and no guest.

Each test moves two rdma-pairs step by step and breaks rail 1 under them."""

import argparse
import os
import re
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(os.path.dirname(HERE), "..", "soft-roce"))

from roce_lab import Lab, LabError, wait_until  # noqa: E402

KIB, MIB = 1024, 1024 * 1024
PORT = 4444
CONNECT_MS = 30000
NOTICED_SECONDS = 15.0  # after the fault; the lanes' timers need up to 3.2 s, the rest is the emulated hosts'
BAD_WORDS = ("CRITICAL", "WARNING", "ERROR", "Sanitizer", "runtime error")
CASES = []

# The device gives a READ up after 3.8 s instead of 0.3: an emulated host that got no CPU for a moment is no broken rail.
TIMERS = "ack-timeout=17&retry=6&bulk-retry=6&read-deadline-ms=0"
PATIENT = TIMERS + "&connect-timeout-ms=3000"
# For tests that break a rail: 2.1 s for an urgent READ, 3.2 s for one in bulk.
BRIEF = "ack-timeout=17&connect-timeout-ms=3000"
DEFAULTS = ""


def case(name, options=PATIENT):
    """Registers a test under the behaviour that it proves. options: of the URI of both sides."""

    def register(function):
        CASES.append((name, function, options))
        return function

    return register


def expect(condition, message):
    if not condition:
        raise LabError(message)


class Spoiled(LabError):
    """Nobody can make a connection over rail 1 any more: not rdma: and not rping either."""


def nobody_connects(lab):
    """Whether rping gets no answer at all over rail 1. A message of rdma_cm that soft-RoCE could not send may spoil a
    device's management queue pair until the device is made anew (soft-roce/README.md)."""
    server = lab.b.popen("rping", "-s", "-a", lab.b.address(1), "-C", "1")
    try:
        wait_until("rping runs", 30, server.alive)
        done = lab.a.run("timeout", "8", "rping", "-c", "-a", lab.b.address(1), "-C", "1", timeout=30)
    finally:
        server.kill()
    print(f"     rping over rail 1: exit code {done.returncode}, {done.stdout.strip()} {done.stderr.strip()}")
    return done.returncode == 124  # it waited for an answer until its time was up; "refused" is an answer


class Side:
    """An rdma-pair on a host."""

    def __init__(self, pair, host, role, uri, wrapper=()):
        self.process = host.popen(*wrapper, pair.program, role, uri, env=pair.env)
        self.name, self.uri = role, uri
        self.lines = 0
        pair.sides.append(self)
        self.answer()

    def ask(self, *words):
        self.process.write((" ".join(map(str, words)) + "\n").encode())

    def answer(self, seconds=90):
        """What follows "ok"; LabError with what follows "error"."""

        def next_line():
            lines = self.process.output("out").split("\n")
            if len(lines) <= self.lines + 1:
                expect(self.process.alive(), f"{self.name} has ended: {self.process.output()}")
                return None
            return lines[self.lines]

        line = wait_until(f"{self.name} answers", seconds, next_line)
        self.lines += 1
        kind, _, rest = line.partition(" ")
        expect(kind == "ok", rest)
        return rest.strip()

    def do(self, *words, seconds=90):
        self.ask(*words)
        return self.answer(seconds)

    def refuses(self, *words):
        """The reason for which a command is not done."""
        try:
            self.do(*words)
        except LabError as error:
            return str(error)
        raise LabError(f"{self.name} did {words[0]}, and should not have")

    def census(self):
        fds, threads, pinned, *blocks = map(int, self.do("census").split())
        return {"fds": fds, "threads": threads, "pinned": pinned * KIB, "blocks": [n * KIB for n in blocks]}

    def end(self):
        self.process.write(b"")
        code = self.process.wait(30)
        errors = self.process.output("err")
        bad = any(mark in errors for mark in BAD_WORDS)
        expect(code == 0 and not bad, f"{self.name} ended with {code}: {errors}")


class Pair:
    """Both sides over rail 1."""

    def __init__(self, lab, program, env, options=""):
        self.lab, self.program, self.env, self.options = lab, program, env, options
        self.sides = []
        self.epoch = 0

    def __enter__(self):
        uri = f"rdma:{self.lab.b.address(1)}:{PORT}" + (f"?{self.options}" if self.options else "")
        self.destination = Side(self, self.lab.b, "destination", uri)
        self.source = Side(self, self.lab.a, "source", uri)
        self.uri = uri
        self.threads = [(side, side.census()["threads"]) for side in self.sides]
        return self

    def mend(self):
        """Makes rail 1 whole, and waits until the closed paths that were kept for it have ended: a rail that goes down
        again in just that moment would spoil the device after all."""
        self.lab.restore(1)
        for side, threads in self.threads:
            wait_until(f"{side.name} keeps no path", 60, lambda: side.census()["threads"] == threads, 0.1)

    def other(self, role, wrapper, port=PORT):
        """One more side, run by another program."""
        host = self.lab.a if role == "source" else self.lab.b
        return Side(self, host, role, self.uri.replace(str(PORT), str(port)), wrapper)

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                for side in self.sides:
                    side.end()
        finally:
            for side in self.sides:
                side.process.close()
                if kind or "G_MESSAGES_DEBUG" in self.env:
                    print(side.name, side.process.output("err"))
            self.lab.restore(1)

    def open(self):
        """Connects with a new epoch; nothing is granted yet."""
        self.epoch += 1
        self.destination.ask("open", self.epoch, CONNECT_MS)
        wait_until("the source is connected", CONNECT_MS / 1000, self._try_open, 0.1)
        self.destination.answer()

    def _try_open(self):
        """A destination whose device has just come back may not listen yet."""
        try:
            self.source.do("open", self.epoch, CONNECT_MS)
            return True
        except LabError as error:
            if "nobody listens" in str(error):
                return False
            if "no answer in time" in str(error) and nobody_connects(self.lab):
                raise Spoiled(str(error)) from None
            raise

    def grant(self):
        grants = self.source.do("grants")
        self.destination.do("set-grants", grants)
        return [tuple(map(int, word.split(":")[:3])) for word in grants.split()]

    def connect(self):
        self.open()
        return self.grant()

    def close(self):
        return [int(side.do("close")) for side in (self.destination, self.source)]

    def fill(self, block, offset, length, seed=1):
        self.source.do("fill", block, offset, length, seed)

    def check(self, block, offset, length, size=64 * KIB, lane=1, seed=1):
        self.destination.do("check", lane, block, offset, length, size, seed)


@case("reads-of-every-size-bring-the-right-bytes")
def right_bytes(pair):
    pair.fill(0, 0, 16 * MIB)
    pair.connect()
    for lane in (0, 1):
        for size in (4 * KIB, 8 * KIB, 64 * KIB, 256 * KIB, MIB):
            # 5 MiB - 4 KiB: READs begin and end beside the borders of registered chunks.
            offset = (3 + 5 * lane) * MIB - 4 * KIB
            pair.check(0, offset, max(size, 4 * MIB if size == MIB else 512 * KIB), size, lane)
    pair.close()


@case("holes-stay-holes-on-both-sides")
def holes(pair):
    pair.fill(0, 0, 4 * MIB)
    pair.fill(1, 8 * MIB, 64 * KIB)
    pair.fill(1, 40 * MIB, 4 * KIB)
    before = pair.source.census()["blocks"]
    grants = pair.connect()
    expect(grants == [(0, 0, 4 * MIB), (1, 8 * MIB, 64 * KIB), (1, 40 * MIB, 4 * KIB)], f"granted: {grants}")
    expect(pair.source.census()["blocks"] == before, "registering has filled holes of the source")
    expect(pair.destination.census()["blocks"] == [0, 0], "the destination has memory before the first READ")
    pair.check(1, 40 * MIB, 4 * KIB, lane=0, size=4 * KIB)
    pair.check(1, 8 * MIB, 64 * KIB)
    pair.check(0, 2 * MIB, 64 * KIB)
    blocks = pair.destination.census()["blocks"]
    expect(blocks == [2 * MIB, 68 * KIB], f"the destination's blocks hold {blocks} bytes")
    pair.close()
    for side in pair.sides:
        expect(side.census()["pinned"] == 0, f"{side.name}: memory is pinned after the end of the path")


@case("urgent-read-takes-no-more-memory-than-its-page")
def urgent_page(pair):
    pair.fill(0, 0, 8 * MIB)
    pair.connect()
    pair.check(0, 5 * MIB, 4 * KIB, lane=0, size=4 * KIB)
    blocks = pair.destination.census()["blocks"]
    expect(blocks == [4 * KIB, 0], f"the destination's blocks hold {blocks} bytes")
    pair.close()


@case("ungranted-range-fails-the-path-in-words")
def ungranted(pair):
    pair.fill(0, 0, MIB)
    pair.connect()
    expect("not posted" in pair.destination.refuses("check", 1, 0, 2 * MIB, 4096, 4096, 1), "a hole was read")
    expect("does not let us" in pair.destination.do("await-failure", 1000), "the failure has another reason")
    pair.close()


@case("pages-touched-after-connect-are-granted-when-asked-again")
def touched_later(pair):
    pair.fill(0, 0, MIB)
    pair.open()
    pair.fill(0, MIB, MIB)
    pair.fill(0, 10 * MIB, 4 * KIB)
    pair.fill(1, 0, 256 * KIB)
    pair.grant()
    # One READ over ranges that were registered at different times.
    pair.check(0, 0, 2 * MIB, size=MIB)
    pair.check(0, 10 * MIB, 4 * KIB)
    pair.check(1, 0, 256 * KIB)
    pair.close()


@case("pages-that-were-given-back-and-taken-again-are-read-as-they-are-now")
def exchanged(pair):
    pair.fill(0, 0, 8 * MIB)
    pair.open()
    pair.source.do("punch", 0, 2 * MIB, 64 * KIB)
    pair.fill(0, 2 * MIB, 64 * KIB, seed=2)
    pair.source.do("punch", 0, 4 * MIB, MIB)
    pair.source.do("punch", 0, 6 * MIB, 4 * KIB)
    pair.fill(0, 6 * MIB, 4 * KIB, seed=3)
    # That somebody else has looked at them since hides nothing. (Linux before 6.2 pins another mapping anyway.)
    pair.source.do("touch", 0, 0, 3 * MIB)
    pair.source.do("touch", 0, 6 * MIB, 4 * KIB)
    granted = pair.grant()
    expect(not any(at < 5 * MIB and at + n > 4 * MIB for block, at, n in granted if block == 0), f"granted: {granted}")
    pair.check(0, 2 * MIB, 64 * KIB, seed=2)
    pair.check(0, 6 * MIB, 4 * KIB, seed=3)
    for begin, end in ((0, 2 * MIB), (2 * MIB + 64 * KIB, 4 * MIB), (5 * MIB, 6 * MIB), (6 * MIB + 4 * KIB, 8 * MIB)):
        pair.check(0, begin, end - begin)
    pair.close()


def covered(grants):
    """The bytes that grants of one block let be read, as (begin, end), neighbours together."""
    spans = []
    for begin, length in sorted((at, n) for _, at, n, *_ in grants):
        expect(not spans or spans[-1][1] <= begin, f"granted twice: {grants}")
        if spans and spans[-1][1] == begin:
            spans[-1] = (spans[-1][0], begin + length)
        else:
            spans.append((begin, begin + length))
    return spans


@case("grants-that-come-piece-by-piece-never-name-a-page-that-was-exchanged")
def incremental_grants(pair):
    """In each MiB the guest gives 128 KiB back that were registered, and takes half of it again. Then the source looks at
    its RAM in an order of the destination's choice, and what it grants is read before it looks at the rest."""
    pair.fill(0, 0, 16 * MIB)
    pair.open()
    for at in range(0, 16 * MIB, MIB):
        pair.source.do("punch", 0, at + 64 * KIB, 128 * KIB)
        pair.fill(0, at + 64 * KIB, 64 * KIB, seed=2)
    pair.fill(0, 20 * MIB, 4 * KIB, seed=3)
    pair.destination.do("set-grants")
    for at in (10 * MIB, 0, 14 * MIB, 6 * MIB, 2 * MIB, 20 * MIB, 4 * MIB, 8 * MIB, 12 * MIB, 30 * MIB):
        words = pair.source.do("grants-within", 0, at, 2 * MIB)
        pair.destination.do("add-grants", words)
        spans = covered([tuple(map(int, word.split(":"))) for word in words.split()])
        if at >= 16 * MIB:
            expect(spans == ([(at, at + 4 * KIB)] if at == 20 * MIB else []), f"granted: {spans}")
            continue
        first, second = at + MIB, at + 2 * MIB
        wanted = [(at, at + 128 * KIB), (at + 192 * KIB, first + 128 * KIB), (first + 192 * KIB, second)]
        expect(spans == wanted, f"granted: {spans}, instead of {wanted}")
        for mib in (at, first):
            pair.check(0, mib, 64 * KIB)
            pair.check(0, mib + 64 * KIB, 64 * KIB, seed=2, lane=0, size=4 * KIB)
            pair.check(0, mib + 192 * KIB, MIB - 192 * KIB)
    pair.check(0, 20 * MIB, 4 * KIB, seed=3, lane=0)
    pair.close()


@case("probe-is-answered-without-grants-and-beside-a-full-window-and-fails-with-its-path")
def probes(pair):
    pair.open()
    for lane in (0, 1):
        for count in (1, 4):
            pair.destination.do("probe", lane, count)
    expect(pair.destination.census()["blocks"] == [0, 0], "a probe has brought something")
    pair.fill(0, 0, 16 * MIB)
    pair.grant()
    pair.destination.do("probe", 0, 4)
    pair.lab.inject("blackhole", 1, "b")
    reason = pair.destination.refuses("probe", 0, 1)
    expect("the probe failed" in reason, f"it ended with: {reason}")
    expect("retry count exceeded" in pair.destination.do("await-failure", 1000), "the failure has another reason")
    expect("not posted" in pair.destination.refuses("probe", 1, 1), "a probe was posted on a dead path")
    pair.close()


@case("strangers-are-refused-and-the-right-one-gets-in")
def strangers(pair):
    pair.fill(0, 0, MIB)
    pair.destination.ask("open", 7, 60000)
    for binding in ((6, 0x5E), (8, 0x5E), (7, 0x5F), (7, 0x5E, 0x12)):
        epoch, *rest = binding
        reason = pair.source.refuses("open", epoch, CONNECT_MS, *rest)
        expect("refused the data lane" in reason, f"{binding} was refused with: {reason}")
    stranger = pair.lab.a.run("rping", "-c", "-a", pair.lab.b.address(1), "-p", PORT, "-C", 1)
    expect("RDMA_CM_EVENT_REJECTED" in stranger.stderr + stranger.stdout, f"another program was not rejected: {stranger}")
    pair.source.do("open", 7, CONNECT_MS)
    pair.destination.answer()
    pair.grant()
    pair.check(0, 0, MIB)
    pair.close()


# As rdma-pair tells them: timers, retries, RNR retries and timer, READs out and in, access, traffic class.
REMOTE_READ = 4


def expect_attributes(pair, timers, *lanes):
    pair.connect()
    for side, access in ((pair.source, REMOTE_READ), (pair.destination, 0)):
        found = [tuple(map(int, lane.split(":"))) for lane in side.do("attributes").split()]
        wanted = [(timers[0], retry, *timers[1:3], *timers[3:4] * 2, access, tos) for retry, tos in lanes]
        expect(found == wanted, f"the queue pairs of the {side.name} are set to {found}, not to {wanted}")
    pair.close()


@case("timers-and-limits-are-set-on-both-sides-by-default", DEFAULTS)
def default_attributes(pair):
    expect_attributes(pair, (14, 6, 12, 16), (3, 184), (5, 104))


@case(
    "timers-and-limits-are-set-on-both-sides-as-the-uri-says",
    "ack-timeout=15&retry=2&bulk-retry=4&rnr-retry=5&rnr-timer=14&depth=8&tos=8&bulk-tos=16",
)
def chosen_attributes(pair):
    expect_attributes(pair, (15, 5, 14, 8), (2, 8), (4, 16))


@case("several-urgent-lanes-are-set-alike-and-read-and-end-together", BRIEF)
def urgent_lanes(pair):
    for side in pair.sides:
        side.do("lanes", 4)
    pair.fill(0, 0, 16 * MIB)
    expect_attributes(pair, (17, 6, 12, 16), (3, 184), (5, 104), (3, 184), (3, 184))
    pair.connect()
    for lane in range(4):
        pair.destination.do("probe", lane, 4)
        pair.check(0, (3 + 3 * lane) * MIB - 4 * KIB, 256 * KIB, size=4 * KIB, lane=lane)
    break_rail(pair, lambda lab: lab.inject("blackhole", 1, "b"), TIMED_OUT, lambda pair: pair.destination)


@case("urgent-read-that-takes-too-long-on-another-lane-fails-the-path-too", "ack-timeout=20&retry=6&read-deadline-ms=600")
def late_read_on_another_lane(pair):
    for side in pair.sides:
        side.do("lanes", 3)
    pair.fill(0, 0, MIB)
    pair.connect()
    pair.check(0, 0, MIB)
    pair.lab.inject("blackhole", 1, "b")
    expect("the READ failed" in pair.destination.refuses("check", 2, 0, 0, 4096, 4096, 1), "it came back")
    reason = pair.destination.do("await-failure", 1000)
    expect("an urgent READ has not come back for" in reason, f"the reason is: {reason}")
    pair.close()


# The device's own timers would take 30 s to notice anything.
PATIENT_DEVICE = "ack-timeout=20&retry=6&bulk-retry=6&read-deadline-ms="


@case("urgent-read-that-takes-too-long-fails-the-path-in-words", PATIENT_DEVICE + "600")
def late_read(pair):
    pair.fill(0, 0, MIB)
    pair.connect()
    pair.check(0, 0, MIB)
    pair.lab.inject("blackhole", 1, "b")
    began = time.monotonic()
    expect("the READ failed" in pair.destination.refuses("check", 0, 0, 0, 4096, 4096, 1), "it came back")
    seconds = time.monotonic() - began
    at, times, *words = pair.destination.do("await-failure", 1000).split(" ")
    print(f"     {seconds * 1000:.0f} ms: {' '.join(words)}")
    expect("an urgent READ has not come back for" in " ".join(words), f"the reason is: {words}")
    expect(times == "1" and 0.6 <= seconds < 20, f"failed {times} times, after {seconds:.1f} s")
    pair.close()


@case("process-that-was-stopped-does-not-take-its-reads-for-late", PATIENT_DEVICE + "3000")
def stopped(pair):
    pair.fill(0, 0, 16 * MIB)
    pair.connect()
    pair.destination.do("pull")
    for _ in range(3):
        pair.destination.process.signal(19)
        time.sleep(4.5)  # more than the deadline; it is what is tested
        pair.destination.process.signal(18)
        time.sleep(0.3)  # READs are under way again; the test holds if not
    expect("has not failed" in pair.destination.refuses("await-failure", 2000), "the path has failed")
    pair.source.do("close")
    pair.destination.do("await-failure", 10000)
    pair.destination.do("join-pull")
    pair.destination.do("close")


@case("completion-that-nobody-takes-is-not-late", PATIENT_DEVICE + "3000")
def neglected(pair):
    pair.fill(0, 0, MIB)
    pair.connect()
    pair.destination.do("neglect", 0, 5000)
    pair.check(0, 0, MIB, lane=0)
    pair.close()


@case("fifty-paths-leave-nothing-behind")
def fifty(pair):
    pair.fill(0, 0, MIB)
    census = []
    for _ in range(50):
        pair.connect()
        pair.check(0, 0, 256 * KIB)
        pair.close()
        census.append([{**side.census(), "blocks": 0} for side in pair.sides])
    for first, last, side in zip(census[0], census[-1], pair.sides):
        expect(first == last, f"{side.name} had {first}, has {last}")


@case("nothing-lands-after-the-end-of-a-path-that-hangs")
def fenced(pair):
    pair.fill(0, 0, 16 * MIB)
    for lane, size in ((1, MIB), (0, 4 * KIB)):
        pair.connect()
        pair.check(0, 0, 8 * size, size)
        pair.lab.inject("blackhole", 1, "b")
        took = int(pair.destination.do("abandon", lane, 8, size))
        print(f"     the end took {took / 1000:.1f} ms")
        expect(took < 10 * 1000 * 1000, f"it took {took} us")
        pair.lab.restore(1)
        pair.source.do("close")
        pair.connect()
        pair.check(0, 8 * MIB, MIB)
        pair.destination.do("marked", 8 * size)
        pair.close()


@case("host-without-a-listener-is-an-error-in-words")
def nobody_listens(pair):
    uri = f"rdma:{pair.lab.b.address(1)}:{PORT + 1}"
    stranger = Side(pair, pair.lab.a, "source", uri)
    reason = stranger.refuses("open", 1, CONNECT_MS)
    expect("nobody listens there" in reason and uri in reason, f"the error is: {reason}")


@case("host-that-is-away-is-given-up-in-time")
def host_away(pair):
    pair.lab.inject("blackhole", 1, "b")
    began = time.monotonic()
    reason = pair.source.refuses("open", 1, 1000)
    seconds = time.monotonic() - began
    expect(seconds < 10, f"it took {seconds:.1f} s")
    expect(f"rdma:{pair.lab.b.address(1)}" in reason, f"the error is: {reason}")


def expect_words(reason, *words):
    print(f"     {reason}")
    missing = [word for word in words if word not in reason]
    expect(not missing, f"the error has no {missing}: {reason}")


@case("limit-on-locked-memory-is-an-error-that-names-the-number")
def memlock(pair):
    limited = ("setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock", "prlimit", f"--memlock={MIB}")
    side = pair.other("destination", limited, PORT + 1)
    expect_words(side.refuses("open", 1, 1000), "128 MiB", "RLIMIT_MEMLOCK is 1 MiB", "ulimit -l 132096", side.uri)
    side = pair.other("source", limited)
    side.do("fill", 0, 0, 2 * MIB, 1)
    expect_words(side.refuses("open", 1, 1000), "2 MiB", "RLIMIT_MEMLOCK is 1 MiB", "ulimit -l 3072", side.uri)


NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


@case("missing-permission-is-an-error-that-says-so")
def permission(pair):
    for device in ("rdma_cm", "uverbs*"):
        pair.lab.a.run("sh", "-c", f"chmod 600 /dev/infiniband/{device}", check=True)
        try:
            reason = pair.other("source", NOBODY).refuses("open", 1, 1000)
        finally:
            pair.lab.a.run("sh", "-c", f"chmod 666 /dev/infiniband/{device}", check=True)
        expect_words(reason, "no permission on /dev/infiniband", pair.uri)


@case("host-without-a-device-is-an-error-that-says-how-to-get-one")
def no_device(pair):
    try:
        for rail in (1, 2):
            pair.lab.inject("rdma-del", rail, "a")
        expect_words(pair.source.refuses("open", 1, 1000), "has no RDMA device", "rdma link add", pair.uri)
    finally:
        pair.lab.restore(2)


@case("unequal-mtu-is-an-error-that-names-both", DEFAULTS)  # what a refusal says has little room, and names the path
def unequal_mtu(pair):
    pair.lab.b.run("ip", "link", "set", "eth1", "mtu", 1500, check=True)
    pair.destination.ask("open", 1, CONNECT_MS)
    words = ("packets of 4096 bytes", "takes 1024")
    expect_words(pair.source.refuses("open", 1, CONNECT_MS), "refused the data lane", *words)
    try:
        pair.destination.answer()
    except LabError as error:
        expect_words(str(error), *words, "ip link set dev")
    else:
        raise LabError("the destination accepted it")


def packets_dropped(host, rail):
    """What a black hole there has swallowed."""
    text = host.run("tc", "-s", "filter", "show", "dev", f"eth{rail}", "ingress", check=True).stdout
    return int(re.search(r"(\d+) pkt", text)[1])


def reconnect_after_loss(pair):
    """How long it takes after a connect request was lost and the rail is whole again."""
    pair.epoch += 1
    pair.lab.inject("blackhole", 1, "b")
    pair.destination.ask("open", pair.epoch, CONNECT_MS)
    pair.source.ask("open", pair.epoch, CONNECT_MS)
    wait_until("the request is lost", 30, lambda: packets_dropped(pair.lab.b, 1))
    pair.lab.undo("blackhole", 1, "b")
    began = time.monotonic()
    for side in pair.sides:
        side.answer()
    return time.monotonic() - began


@case("connect-request-that-is-lost-is-repeated-sooner-than-rdma-cm-would", TIMERS)
def lost_request(pair):
    """A busy host may be late; it is not each time."""
    pair.fill(0, 0, MIB)
    pair.connect()
    pair.close()
    for _ in range(3):
        seconds = reconnect_after_loss(pair)
        print(f"     connected {seconds:.2f} s after the rail was whole again")
        pair.grant()
        pair.check(0, 0, MIB)
        pair.close()
        if seconds < 3.5:
            return
    raise LabError(f"it took {seconds:.1f} s; rdma_cm's own repetition comes after 4.3 s")


@case("attempt-that-is-given-up-on-a-dead-rail-leaves-the-device-as-it-was")
def attempt_on_dead_rail(pair):
    def connect():
        """A device that is spoiled now was spoiled by the attempt: that is the failure, not a reason to try once more."""
        try:
            pair.connect()
        except Spoiled as error:
            raise LabError(f"nobody connects over the rail any more, rping neither: {error}") from None

    pair.fill(0, 0, MIB)
    pair.connect()  # whatever was done to the device before has not spoiled it
    pair.close()
    hits = 0
    for _ in range(4):
        connect()  # it works, and resolves the address for what follows
        pair.check(0, 0, MIB)
        pair.close()
        pair.lab.inject("blackhole", 1, "b")
        pair.source.ask("open", pair.epoch, CONNECT_MS)
        wait_until("the request is lost", 30, lambda: packets_dropped(pair.lab.b, 1))
        pair.lab.inject("link-down", 1, "a")
        began = time.monotonic()
        try:
            pair.source.answer()
        except LabError as error:
            # If it was something else that was lost, the source had not got so far as to ask.
            print(f"     {error}")
            hits += "device rxe1 is DOWN" in str(error)
        else:
            raise LabError("the source connected through a black hole")
        expect(time.monotonic() - began < 20, "it has tried again on a rail that is down")
        pair.mend()
        if hits == 2:
            break
    expect(hits, "no attempt was under way when its rail went down")
    connect()
    pair.check(0, 0, MIB)
    pair.close()


@case("address-that-is-not-ours-may-go")
def other_address(pair):
    pair.fill(0, 0, MIB)
    pair.connect()
    for action in ("add", "del") * 2:
        pair.lab.b.run("ip", "address", action, "10.88.99.2/24", "dev", "eth1", check=True)
    expect("has not failed" in pair.destination.refuses("await-failure", 1000), "the path has failed")
    pair.check(0, 0, MIB)
    pair.close()


@case("wrong-addresses-and-options-are-errors-that-help")
def wrong_uris(pair):
    for uri, words in (
        ("rdma:10.99.0.1:4460", "check the addresses"),
        (f"rdma:{pair.lab.b.address(2)}:4460?dev=rxe1", "that address is on rxe2"),
        (f"rdma:{pair.lab.b.address(1)}:4460?retry=7", "from 1 to 6"),
    ):
        process = pair.lab.b.popen(pair.program, "destination", uri)
        process.write(b"")
        code = process.wait(30)
        output = process.output().strip()
        process.close()
        print(f"     {output}")
        expect(code == 1 and uri in output and words in output, f"{uri}: {output}")


def break_rail(pair, inject, reason, own):
    """Breaks rail 1 under READs: all of them complete, the failure is told once and in words, the end is quick."""
    pair.destination.do("pull")
    inject(pair.lab)
    # A host that is busy with READs may take seconds to run the command that breaks its rail.
    broken = time.time()
    for side in {pair.destination, own(pair)}:
        at, times, *words = side.do("await-failure", 20000).split(" ")
        seconds = int(at) / 1e6 - broken
        text = " ".join(words)
        print(f"     {side.name}: {seconds * 1000:.0f} ms: {text}")
        expect(times == "1", f"{side.name} has told the failure {times} times")
        expect(seconds < NOTICED_SECONDS, f"{side.name} noticed after {seconds:.2f} s")
        expect(side is pair.source or any(r in text for r in reason), f"the reason is: {text}")
    counts = list(map(int, pair.destination.do("join-pull").split()))
    for posted, ok, failed in zip(counts[::3], counts[1::3], counts[2::3]):
        expect(posted == ok + failed and ok, f"READs posted, in place, failed: {counts}")
    drained = pair.close()
    expect(max(drained) < 10 * 1000 * 1000, f"closing took {drained} us")


def perform(lab, program, env, function, *options):
    """Runs one test; once more, on devices made anew, if the rail was spoiled for everybody."""
    try:
        with Pair(lab, program, env, *options) as pair:
            return function(pair)
    except Spoiled as error:
        print(f"     soft-RoCE's device is spoiled, for rping too ({error}); once more with a new one")
    lab.renew(1)
    with Pair(lab, program, env, *options) as pair:
        return function(pair)


def fault_case(name, inject, reason, own="destination", comes_back=True):
    """Breaks rail 1 and mends it again, twice, and goes on with a new epoch. `own`: the side on whose host the
    fault is, which therefore notices by itself; the destination always does."""

    @case(name, BRIEF if TIMED_OUT[0] in reason else PATIENT)
    def test(pair):
        pair.fill(0, 0, 16 * MIB)
        for _ in range(2 if comes_back else 1):
            pair.connect()
            break_rail(pair, inject, reason, lambda pair: getattr(pair, own))
            if comes_back:
                pair.mend()
        if comes_back:
            pair.connect()
            pair.check(0, 0, 16 * MIB, size=MIB)
            pair.close()


TIMED_OUT = ("retry count exceeded",)
LOCAL = ("is DOWN", "cannot send", "address has gone")
REMOVED = ("was removed", "the peer closed")

fault_case("cable-cut", lambda lab: lab.cut(1), (*LOCAL, *TIMED_OUT), own="source")
fault_case("link-down-at-the-destination", lambda lab: lab.inject("link-down", 1, "b"), LOCAL)
fault_case("link-down-at-the-source", lambda lab: lab.inject("link-down", 1, "a"), TIMED_OUT, own="source")
fault_case("address-removed-at-the-destination", lambda lab: lab.inject("address-del", 1, "b"), LOCAL)
fault_case("black-hole-at-the-destination", lambda lab: lab.inject("blackhole", 1, "b"), TIMED_OUT)
fault_case("black-hole-at-the-source", lambda lab: lab.inject("blackhole", 1, "a"), TIMED_OUT)
# soft-RoCE's device only goes, and can only come back, when the programs that used it have ended.
REMOVE = {"reason": REMOVED, "comes_back": False}
fault_case("device-removed-at-the-destination", lambda lab: lab.inject("rdma-del", 1, "b"), **REMOVE)
fault_case("device-removed-at-the-source", lambda lab: lab.inject("rdma-del", 1, "a"), own="source", **REMOVE)


@case("device-that-was-removed-under-us-is-an-error-at-once-and-hangs-nobody")
def dead_device(pair):
    pair.fill(0, 0, MIB)
    pair.connect()
    pair.lab.inject("rdma-del", 1, "a")
    pair.source.do("await-failure", 10000)
    pair.source.do("close")
    # The kernel keeps what is left of the device for as long as we have it open.
    for side in (pair.source, pair.other("source", ())):
        began = time.monotonic()
        reason = side.refuses("open", 2, CONNECT_MS)
        seconds = time.monotonic() - began
        print(f"     {seconds * 1000:.0f} ms: {reason}")
        expect(seconds < 8, f"it took {seconds:.1f} s")
    pair.destination.do("await-failure", 10000)
    pair.destination.do("close")


def run(lab, program, pattern, env):
    """Returns how many tests failed."""
    failures = 0
    for name, function, uri_options in CASES:
        if pattern and pattern not in name:
            continue
        began = time.monotonic()
        try:
            perform(lab, program, env, function, uri_options)
            result, message = "ok  ", ""
        except LabError as error:
            result, message = "FAIL", f": {error}"
            failures += 1
        print(f"{result} {name} ({time.monotonic() - began:.1f} s){message}", flush=True)
    return failures


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pattern", nargs="?", help="run only tests with this in their name")
    parser.add_argument("--build", default="build", help="build directory (default: build)")
    parser.add_argument("--lab", metavar="DIRECTORY", help="use the lab that runs there")
    parser.add_argument("--list", action="store_true", help="only list the tests")
    options = parser.parse_args()
    program = os.path.abspath(os.path.join(options.build, "tests/roce/rdma-pair"))
    env = {name: value for name, value in os.environ.items() if name.endswith("SAN_OPTIONS") or name == "G_MESSAGES_DEBUG"}
    if options.list:
        print("\n".join(name for name, *_ in CASES))
        return 0
    if options.lab:
        return 1 if run(Lab.attach(options.lab), program, options.pattern, env) else 0
    with Lab(build=options.build) as lab:
        return 1 if run(lab, program, options.pattern, env) else 0


if __name__ == "__main__":
    sys.exit(main())
