# SPDX-License-Identifier: GPL-2.0-or-later
"""Two engines on two hosts, with the test guest (tests/guest/workload.c) instead of a QEMU. It
starts at once, and several such pairs fit beside each other. The guest verifies its pages all the
time, and all of them at its end."""

import os
import re
import signal

from .engine import Engine
from .lab import Move, find_built
from .process import LONG, Failure, expect, wait_for

LINE = re.compile(r"^(running|paused) verified=(\d+) written=(\d+) corrupt=(\d+)$", re.M)
# us that a thread rests after 16 pages. Both threads visit some 640 pages a second together: at
# full speed their faults would soon have brought in all pages.
PACE = "50000"
FINAL = re.compile(r"^final corrupt=(\d+) now=(\d+)$", re.M)


class TestGuest:
    """One workload program."""

    def __init__(self, lab, host, name, size, incoming=False, pace=PACE):
        self.socket = lab.path(f"{name}.agent")
        argv = [find_built(lab.build, "workload"), "--socket", self.socket, "--size", size]
        argv += ["--threads", "2", "--pace", pace] + (["--incoming"] if incoming else [])
        self.process = lab.start(name, host.command(argv))

    def option(self):
        return f"agent:{self.socket}"

    def lines(self):
        return [(word, int(verified), int(corrupt)) for word, verified, _, corrupt in LINE.findall(self.process.output())]

    def wait_running(self, seconds=LONG):
        wait_for(
            f"{self.process.name} has filled its memory and runs",
            seconds,
            lambda: any(word == "running" and verified for word, verified, _ in self.lines()),
        )

    def verified(self):
        lines = self.lines()
        return lines[-1][1] if lines else 0

    def wait_goes_on(self, seconds=LONG):
        before = self.verified()
        wait_for(f"{self.process.name} runs on", seconds, lambda: self.verified() > before)

    def expect_sound(self):
        """Ends the guest, which verifies every page before."""
        self.process.popen.terminate()
        code = self.process.wait()
        said = FINAL.search(self.process.output())
        expect(said, f"{self.process.name} did not verify its memory: {self.process.output()[-500:]}")
        expect(
            code == 0 and said.groups() == ("0", "0"),
            f"{self.process.name}: {said.group(1)} corrupt pages while it ran, {said.group(2)} at its end",
        )


class LightMove(Move):
    """The same as Move, without a QEMU. wrappers: for the source's and the destination's engine, a
    command that execs it."""

    def __init__(
        self,
        lab,
        scheme="ofi",
        size="64M",
        settings=(),
        port=4444,
        name="",
        wrappers=((), ()),
        tls=False,
        pace=PACE,
    ):
        # pylint: disable=super-init-not-called
        self.lab = lab
        self.scheme = scheme
        self.network = lab.network
        self.port = port
        self.source_guest = TestGuest(lab, self.network.source, f"guest-source{name}", size, pace=pace)
        self.destination_guest = TestGuest(
            lab, self.network.destination, f"guest-destination{name}", size, incoming=True, pace=pace
        )
        for guest in (self.source_guest, self.destination_guest):
            wait_for("the guest's agent listens", LONG, lambda g=guest: os.path.exists(g.socket))
        certs = lab.certificates() if tls else (None, None)
        self.source = Engine(
            lab,
            self.network.source,
            self.source_guest.option(),
            name=f"postroad-source{name}",
            settings=settings,
            wrapper=wrappers[0],
            tls=certs[0],
        )
        self.destination = Engine(
            lab,
            self.network.destination,
            self.destination_guest.option(),
            f"{scheme}:0.0.0.0:{port}",
            name=f"postroad-destination{name}",
            settings=settings,
            wrapper=wrappers[1],
            tls=certs[1],
        )
        self.engines = (self.source, self.destination)
        self.source_guest.wait_running()

    def uri(self, link=1, prefix="", options="", port=None):
        return super().uri(link, prefix, options, port or self.port)

    def both_uris(self):
        return f"{self.uri(link=1)},{self.uri(link=2)}"

    def start(self, **uri):
        self.source.hmp(f"migrate -d {self.uri(**uri) if uri else self.both_uris()}")

    def expect_guest_sound(self):
        """Expects that the source's guest is stopped, and that all pages are right at the
        destination."""
        wait_for(
            "the source guest says that it is stopped",
            LONG,
            lambda: self.source_guest.lines()[-1][0] == "paused",
        )
        self.destination_guest.expect_sound()

    def expect_source_runs(self):
        self.source_guest.wait_goes_on()
        self.source_guest.expect_sound()


class Frozen:
    """Stops a process (SIGSTOP) for the time of a `with` block. It takes anything with a
    `process`."""

    def __init__(self, engine):
        self.process = engine.process

    def __enter__(self):
        self.process.popen.send_signal(signal.SIGSTOP)
        wait_for(f"{self.process.name} is stopped", LONG, lambda: self._state() == "T")

    def __exit__(self, *_):
        self.process.popen.send_signal(signal.SIGCONT)

    def _state(self):
        with open(f"/proc/{self.process.pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0]


__all__ = ["Failure", "Frozen", "LightMove", "TestGuest"]
