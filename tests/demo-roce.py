#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest moves between two RoCE hosts, and the rail under it is cut: nobody does anything about it.

The hosts are the two machines of soft-roce/lab: real verbs, two rails. The guest rewrites and verifies its memory
all the time. Everything is told as it happens; the exit code is 1 if anything is off."""

import argparse
import os
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.dont_write_bytecode = True
sys.path[:0] = [HERE, os.path.join(HERE, "e2e"), os.path.join(HERE, "roce", "migrate")]

from move import MB, Failure, Lab, LabError, Move, expect  # noqa: E402
from demo import Story, latency  # noqa: E402
from harness.process import raise_on_signals, wait_for  # noqa: E402

GUEST_MB = 64
PACE_US = 20000  # the rest of each of the guest's threads after 16 pages
BANDWIDTH = "2M"
AFTER_PAGES = 8000

PICTURE = """
    host a                                     host b
   ┌──────────────────┐                       ┌──────────────────┐
   │ guest ─ postroad │── rxe1  rail 1  rxe1 ─│ postroad ─ guest │
   │                  │── rxe2  rail 2  rxe2 ─│ (waits)          │
   └──────────────────┘                       └──────────────────┘
"""


class Demo:
    def __init__(self, lab, build, story):
        self.lab, self.build, self.story = lab, build, story
        self.move = None
        self.cut = None
        self.figures = None  # seconds from the cut until both sides were paused, and in postcopy again
        self.in_place = None  # bytes, at the cut
        self.info = ()  # of source and destination, completed

    def command(self, engine, line):
        """Shows and runs one command of the operator, on the engine's host."""
        self.story.command(f"host {engine.host.name}", f"postroadctl {engine.name}.qmp '{line}'")
        said = engine.hmp(line).strip()
        for line in said.splitlines():
            self.story.says("", line)

    def guest(self, guest):
        _, verified, written, corrupt = guest.last()
        self.story.line(
            f"guest on {guest.host.name}",
            f"{verified} pages verified, {written} written, {corrupt} corrupt",
            "32" if not corrupt else "31",
        )

    def show(self):
        for engine in self.move.engines:
            info = engine.query()
            ram = info["ram"]
            done = 100 * (ram["total"] - ram["remaining"]) / ram["total"]
            self.story.says(engine.name, f"{info['status']}, {done:.0f} % in place")

    def hosts(self):
        self.story.chapter("1. Two hosts with two RoCE rails")
        for host in self.lab.hosts:
            self.story.command(f"host {host.name}", "rdma link show")
            for line in host.run("rdma", "link", "show", check=True).stdout.strip().splitlines():
                self.story.says("", line.strip())

    def work(self):
        self.story.chapter("2. A guest works on host a")
        self.move = Move(self.lab, self.build, size_mb=GUEST_MB, pace_us=PACE_US)
        self.story.says("", f"{GUEST_MB} MB, verified and rewritten all the time; hosts under {self.lab.accel}")
        self.guest(self.move.source_guest)

    def depart(self):
        move = self.move
        self.story.chapter("3. It moves over rail 1; rail 2 is listed, too, and stands by")
        self.command(move.destination, f"migrate_set_parameter max-postcopy-bandwidth {BANDWIDTH}")
        self.command(move.source, f"migrate -d {move.uri(1)},{move.uri(2)}")
        move.wait_midway()
        move.destination_guest.wait_running()
        self.guest(move.destination_guest)
        self.show()
        wait_for("rail 2 stands by", 30, self.stands_by)
        self.command(move.source, "info paths")

    def stands_by(self):
        second = self.move.uri(2)
        return any(path["uri"] == second and path["state"] == "standby" for path in self.move.source.paths())

    def lose(self):
        move = self.move
        self.story.chapter("4. Rail 1 is cut in the middle of it")
        self.story.command("", "soft-roce/lab cut 1")
        self.in_place = GUEST_MB * MB - move.expect_midway()
        self.cut = move.cut(lambda: self.lab.cut(1))
        self.cut.wait_active()
        self.tell_events()
        self.story.says("", "nobody has typed anything")
        self.cut.expect_path(move.uri(2))
        self.figures = self.cut.report()
        self.guest(move.destination_guest)
        self.show()

    def tell_events(self):
        """What both engines went through, in its order, with the time since the cut."""
        told = []
        for engine in self.move.engines:
            ahead, _ = engine.host.clock_offset()
            reasons = [event["data"].get("reason", "") for event in self.cut.migrations(engine)]
            for (status, at), reason in zip(self.cut.events(engine), reasons):
                told.append((at - ahead - self.cut.at, engine.name, status, reason))
        for after, name, status, reason in sorted(told):
            self.story.says(name, f"+{after * 1000:.0f} ms  {status}: {reason}")

    def arrive(self):
        move = self.move
        self.story.chapter("5. It goes on over rail 2 to its end")
        self.command(move.destination, "migrate_set_parameter max-postcopy-bandwidth 0")
        move.wait_all("completed", 120)
        self.show()
        self.info = [engine.query() for engine in move.engines]
        before = move.destination_guest.verified()
        while move.destination_guest.verified() < before + AFTER_PAGES:
            seen = move.destination_guest.verified()
            wait_for("the guest works on", 20, lambda: move.destination_guest.verified() > seen)
            self.guest(move.destination_guest)
        move.finish()
        self.story.says("guest on b", "has verified every page: none is corrupt")

    def table(self):
        """The numbers, and whether they make sense."""
        source, destination = self.info
        paused, active = self.figures
        total = destination["ram"]["total"]
        rows = (
            ("downtime at the switch-over", f"{source['downtime']} ms"),
            ("cut to both sides paused", f"{paused * 1000:.0f} ms"),
            ("paused to postcopy-active", f"{(active - paused) * 1000:.0f} ms"),
            ("memory in place before the cut", f"{self.in_place / MB:.0f} of {total / MB:.0f} MB"),
            ("recoveries, commands typed for them", f"{source['postroad']['recoveries']}, none"),
            ("faults served", f"{destination['postroad']['faults']}"),
            ("fault latency, mean (longest)", latency(destination)),
            ("memory read over rdma:", f"{destination['ram']['transferred'] / MB:.0f} MB"),
            ("migration, in all", f"{source['total-time'] / 1000:.1f} s"),
            ("corrupt pages", f"{self.move.destination_guest.last()[3]}"),
        )
        self.story.chapter("What it took (the hosts are emulated)")
        for name, value in rows:
            print(f"  {name:<40}{value:>24}")
        expect(0 < self.in_place < total, "the cut was not in the middle")
        expect(source["postroad"]["recoveries"] == 1, "there was to be exactly one recovery")
        expect(destination["postroad"]["faults"] > 0, "no fault was served: this was no postcopy")

    def tell(self):
        print(PICTURE, end="")
        for chapter in (self.hosts, self.work, self.depart, self.lose, self.arrive, self.table):
            chapter()


def perform(options, story):
    build = os.path.abspath(options.build)
    story.says("", "two hosts boot; if they are emulated, this takes a while")
    with Lab(build=build) as lab:
        demo = Demo(lab, build, story)
        try:
            demo.tell()
        except (Failure, LabError):
            if demo.move:
                print(demo.move.logs(), file=sys.stderr)
            raise
        finally:
            if demo.move:
                demo.move.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", default="build", help="build directory (default: build)")
    options = parser.parse_args()
    raise_on_signals()
    story = Story(colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    try:
        perform(options, story)
    except (Failure, LabError) as failure:
        print(f"\ndemo-roce: FAILED: {failure}", file=sys.stderr)
        return 1
    print(f"\nThe guest has moved over RDMA and outlived its rail. {time.monotonic() - story.began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
