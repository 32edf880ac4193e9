# SPDX-License-Identifier: GPL-2.0-or-later
"""Two test guests without a VMM (tests/guest/workload.c), each with an engine that can be killed. They start in no
time, and check every page all the time."""

import os
import re
import time

from .engine import Engine
from .process import LONG, Failure, expect, wait_for

LINE = re.compile(r"^(running|paused) verified=(\d+) written=(\d+) corrupt=(\d+)$", re.M)
OVER = ("none", "failed", "cancelled")
SLOW = "256K"
PACE = "100000"  # us: all three threads visit some 500 pages a second, so that they have not soon brought in all


class Guest:
    """A workload on a host."""

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
        """Waits for a line from now on that is as wanted."""
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
        """It reads and writes pages, and all is right."""
        before = int(self.last()[1])
        self.wait_line("reads its pages", lambda line: line[0] == "running" and int(line[1]) > before)
        self.expect_sound()

    def expect_sound(self):
        expect(int(self.last()[3]) == 0, f"{self.name}: {self.last()[3]} corrupt pages")

    def verify(self):
        """Reads every page once more, and ends."""
        self.process.popen.terminate()
        code = self.process.wait()
        said = self.process.output().splitlines()[-3:]
        expect(code == 0 and "final corrupt=0 now=0" in said, f"{self.name} ended with {code}: {said}")


class Twins:
    """A guest at the source, and the steps of its migration. Its memory travels slowly, also by engines that come
    later, until full_speed()."""

    def __init__(self, lab, scheme="tcp", size="16M", settings=("auto-recover=off",), program="killable-postroad"):
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
        """In postcopy, with some of the pages in place."""
        self.migrate()
        at_start = wait_for("the guest is on its way", LONG, self._remaining)
        wait_for("part of the pages is in place", LONG, lambda: self.destination.remaining() < at_start * 0.9)
        self.expect_midway()

    def _remaining(self):
        return self.destination.status() == "postcopy-active" and self.destination.remaining()

    def record(self):
        """What the source has written down."""
        directory = self.lab.path(f"state-{self.source.name}")
        text = ""
        for name in os.listdir(directory):
            if name.endswith(".new"):  # not in force yet
                continue
            with open(os.path.join(directory, name)) as file:
                text += file.read()
        return text

    def expect_midway(self):
        expect(self.destination.remaining() > 0, "all pages had arrived: the test proves nothing")

    def wait_active(self):
        for engine in self.engines:
            engine.wait_status("postcopy-active")

    def recover(self):
        """migrate -r, and back in postcopy on both sides."""
        for engine in self.engines:
            engine.wait_status("postcopy-paused")
        asked = 0.0

        def recovered():
            """A recovery that runs out of time leads back to the pause."""
            nonlocal asked
            found = {engine.status() for engine in self.engines}
            if found == {"postcopy-paused"} and time.monotonic() > asked + 1:
                asked = time.monotonic()
                self.migrate(resume=True)
            return found <= {"postcopy-active", "completed"}

        wait_for("both engines have recovered", LONG, recovered)

    def expect_one_runs(self):
        """It never goes back, so whoever runs at the source must still do so after it was seen to run at the
        destination."""
        if not self.destination_guest.running() or not self.source_guest.running():
            return
        self.source_guest.wait_line("tells how it is now", bool)
        expect(not self.source_guest.running(), "the guest runs on both sides")

    def step(self):
        """Does what an operator would do next to get the guest to the destination. True: it is there."""
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
        """Sees it through, whatever state it is in, and has every page read at the end."""
        self.full_speed()
        wait_for("the guest has arrived", seconds, self.step)
        self.destination_guest.wait_working()
        expect(not self.source_guest.running(), "the guest runs at the source, too")
        self.destination_guest.verify()


__all__ = ["Failure", "Guest", "Twins"]
