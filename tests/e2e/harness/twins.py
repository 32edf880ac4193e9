# SPDX-License-Identifier: GPL-2.0-or-later
"""Two test guests without a QEMU (tests/guest/workload.c), each with an engine that can kill
itself at a crash point. The guests start at once, and verify their pages all the time."""

import os
import re
import time

from .engine import Engine
from .process import LONG, Failure, expect, wait_for

LINE = re.compile(r"^(running|paused) verified=(\d+) written=(\d+) corrupt=(\d+)$", re.M)
OVER = ("none", "failed", "cancelled")
SLOW = "256K"
# us that a thread rests after 16 pages. The three threads visit some 500 pages a second together:
# at full speed their faults would soon have brought in all pages.
PACE = "100000"


class Guest:
    """A workload program on a host."""

    def __init__(self, lab, host, size, incoming):
        self.name = f"guest-{host.name}"
        self.socket = lab.path(f"{self.name}.agent")
        argv = [lab.build_file("workload"), "--socket", self.socket, "--size", size, "--report", "20"]
        argv += ["--threads", "3", "--pace", PACE] + (["--incoming"] if incoming else [])
        self.lab, self.argv = lab, host.command(argv)
        self.start_again()

    def start_again(self):
        self.process = self.lab.start(self.name, self.argv)

    def last(self):
        lines = LINE.findall(self.process.output())
        return lines[-1] if lines else None

    def wait_line(self, what, wanted):
        """Waits for a line that is printed from now on and for which wanted(line) is true."""
        seen = len(LINE.findall(self.process.output()))
        wait_for(
            f"{self.name} {what}",
            LONG,
            lambda: len(LINE.findall(self.process.output())) > seen + 1 and wanted(self.last()),
        )

    def running(self):
        line = self.last()
        return bool(line) and line[0] == "running"

    def wait_running(self):
        self.wait_line("runs", lambda line: line[0] == "running")

    def wait_working(self):
        """Waits until the guest has visited more pages. All must be right."""
        before = int(self.last()[1])
        self.wait_line("reads its pages", lambda line: line[0] == "running" and int(line[1]) > before)
        self.expect_sound()

    def expect_sound(self):
        expect(int(self.last()[3]) == 0, f"{self.name}: {self.last()[3]} corrupt pages")

    def verify(self):
        """Ends the guest, which verifies every page before."""
        self.process.popen.terminate()
        code = self.process.wait()
        said = self.process.output().splitlines()[-3:]
        expect(code == 0 and "final corrupt=0 now=0" in said, f"{self.name} ended with {code}: {said}")


class Twins:
    """A guest at the source, and the steps of its migration. The bulk pull is slow until
    full_speed(), also that of engines which are started later."""

    def __init__(self, lab, scheme="tcp", size="32M", settings=("auto-recover=off",), program="killable-postroad"):
        self.lab, self.scheme, self.network = lab, scheme, lab.network
        settings = (*settings, f"max-postcopy-bandwidth={SLOW}")
        self.source_guest = Guest(lab, lab.network.source, size, incoming=False)
        self.destination_guest = Guest(lab, lab.network.destination, size, incoming=True)
        self.guests = (self.source_guest, self.destination_guest)
        for guest in self.guests:
            wait_for(f"{guest.name} has started", LONG, guest.last)
        self.source = Engine(
            *(lab, lab.network.source, f"agent:{self.source_guest.socket}"), settings=settings, program=program
        )
        self.destination = Engine(
            *(lab, lab.network.destination, f"agent:{self.destination_guest.socket}"),
            *(f"{scheme}:0.0.0.0:4444", None, settings),
            program=program,
        )
        self.engines = (self.source, self.destination)

    def uri(self, link=1, port=4444):
        return f"{self.scheme}:{self.network.destination.address(link)}:{port}"

    def full_speed(self):
        self.destination.qmp.command("migrate-set-parameters", **{"max-postcopy-bandwidth": 0})

    def migrate(self, resume=False):
        self.source.qmp.command("migrate", uri=self.uri(), resume=resume)

    def start_midway(self):
        """Starts a migration, and waits for postcopy with a part of the pages in place."""
        self.migrate()
        at_start = wait_for("the destination is in postcopy", LONG, self._remaining)
        wait_for("part of the pages is in place", LONG, lambda: self.destination.remaining() < at_start * 0.95)
        self.expect_midway()

    def _remaining(self):
        return self.destination.status() == "postcopy-active" and self.destination.remaining()

    def record(self):
        """Returns the text of the source's hand-over record."""
        directory = self.lab.path(f"state-{self.source.name}")
        text = ""
        for name in os.listdir(directory):
            if name.endswith(".new"):  # not valid before it is renamed
                continue
            with open(os.path.join(directory, name)) as file:
                text += file.read()
        return text

    def expect_midway(self):
        expect(self.destination.remaining() > 0, "all pages have arrived too early: the test proves nothing")

    def wait_active(self):
        for engine in self.engines:
            engine.wait_status("postcopy-active")

    def recover(self):
        """Recovers, and waits until both sides are in postcopy again, or have completed."""
        for engine in self.engines:
            engine.wait_status("postcopy-paused")
        asked = 0.0

        def recovered():
            """Asks again after a recovery that has run out of time: both sides are paused then."""
            nonlocal asked
            found = {engine.status() for engine in self.engines}
            if found == {"postcopy-paused"} and time.monotonic() > asked + 1:
                asked = time.monotonic()
                self.migrate(resume=True)
            return found <= {"postcopy-active", "completed"}

        wait_for("both engines have recovered", LONG, recovered)

    def expect_one_runs(self):
        """Expects that the guest does not run on both sides. The two are looked at one after the
        other, and the guest may be handed over between. It never goes back to the source: so if
        both seem to run, the source's is looked at again."""
        if not self.destination_guest.running() or not self.source_guest.running():
            return
        self.source_guest.wait_line("prints a line", bool)
        expect(not self.source_guest.running(), "the guest runs on both sides")

    def step(self):
        """Does what an operator would do next to move the guest. Returns True when the migration
        has completed."""
        self.expect_one_runs()
        source, destination = (engine.status() for engine in self.engines)
        if (source, destination) == ("completed", "completed"):
            return True
        if source == "postcopy-paused" and destination == "postcopy-paused":
            self.source.hmp(f"migrate -d -r {self.uri()}")
        elif source == "postcopy-paused" and destination == "completed":
            self.source.hmp(f"migrate -d -r {self.uri()}")
        elif source in OVER and destination == "postcopy-paused":
            self.source_guest.wait_running()
            self.destination.hmp("migrate_cancel")
        elif source in OVER and destination in OVER:
            self.source_guest.wait_running()
            self.source.hmp(f"migrate -d {self.uri()}")
        return False

    def finish(self, seconds=LONG):
        """Completes the migration, whatever its state, and has the guest verify every page."""
        self.full_speed()
        wait_for("the guest has arrived", seconds, self.step)
        self.destination_guest.wait_working()
        expect(not self.source_guest.running(), "the guest runs at the source as well")
        self.destination_guest.verify()


__all__ = ["Failure", "Guest", "Twins"]
