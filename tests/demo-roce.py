#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Migrates a guest between two RoCE hosts and cuts the rail in use. The migration recovers by
itself.

The hosts are the two machines of soft-roce/lab, with real verbs and two rails. The guest rewrites
and verifies its memory all the time. The demo explains each step; its exit code is 1 if a check
fails."""

import argparse
import os
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.dont_write_bytecode = True
sys.path[:0] = [HERE, os.path.join(HERE, "e2e"), os.path.join(HERE, "roce", "migrate")]

from move import MB, Failure, Lab, LabError, Move, expect  # noqa: E402
from demo import Narrator, latency  # noqa: E402
from harness.process import raise_on_signals, wait_for  # noqa: E402

GUEST_MB = 64
PACE_US = 20000  # pause of each of the guest's threads after 16 pages
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
    def __init__(self, lab, build, narrator):
        self.lab, self.build, self.narrator = lab, build, narrator
        self.move = None
        self.cut = None
        self.figures = (
            None  # seconds from the cut until both sides were paused, and in postcopy again
        )
        self.in_place = None  # bytes, at the cut
        self.info = ()  # query-migrate of source and destination at the end

    def command(self, engine, line):
        """Shows and runs a command of the operator, on the engine's host."""
        self.narrator.command(f"host {engine.host.name}", f"postroadctl {engine.name}.qmp '{line}'")
        answer = engine.hmp(line).strip()
        for line in answer.splitlines():
            self.narrator.note("", line)

    def guest(self, guest):
        _, verified, written, corrupt = guest.last()
        self.narrator.line(
            f"guest on {guest.host.name}",
            f"{verified} pages verified, {written} written, {corrupt} corrupt",
            "32" if not corrupt else "31",
        )

    def show(self):
        for engine in self.move.engines:
            info = engine.query()
            ram = info["ram"]
            done = 100 * (ram["total"] - ram["remaining"]) / ram["total"]
            self.narrator.note(engine.name, f"{info['status']}, {done:.0f} % in place")

    def hosts(self):
        self.narrator.heading("1. Two hosts with two RoCE rails")
        for host in self.lab.hosts:
            self.narrator.command(f"host {host.name}", "rdma link show")
            for line in host.run("rdma", "link", "show", check=True).stdout.strip().splitlines():
                self.narrator.note("", line.strip())

    def work(self):
        self.narrator.heading("2. A guest runs on host a")
        self.move = Move(self.lab, self.build, size_mb=GUEST_MB, pace_us=PACE_US)
        self.narrator.note(
            "", f"{GUEST_MB} MB, verified and rewritten all the time; hosts under {self.lab.accel}"
        )
        self.guest(self.move.source_guest)

    def migrate(self):
        move = self.move
        self.narrator.heading("3. It migrates over rail 1; rail 2 is its standby")
        self.command(move.destination, f"migrate_set_parameter max-postcopy-bandwidth {BANDWIDTH}")
        self.command(move.source, f"migrate -d {move.uri(1)},{move.uri(2)}")
        move.wait_midway()
        move.destination_guest.wait_running()
        self.guest(move.destination_guest)
        self.show()
        wait_for("rail 2 is a standby", 30, self.has_standby)
        self.command(move.source, "info paths")

    def has_standby(self):
        second = self.move.uri(2)
        return any(
            path["uri"] == second and path["state"] == "standby"
            for path in self.move.source.paths()
        )

    def cut_rail(self):
        move = self.move
        self.narrator.heading("4. Rail 1 is cut in the middle of the migration")
        self.narrator.command("", "soft-roce/lab cut 1")
        self.in_place = GUEST_MB * MB - move.expect_midway()
        self.cut = move.cut(lambda: self.lab.cut(1))
        self.cut.wait_active()
        self.show_events()
        self.narrator.note("", "no command was given")
        self.cut.expect_path(move.uri(2))
        self.figures = self.cut.report()
        self.guest(move.destination_guest)
        self.show()

    def show_events(self):
        """Shows the state changes of both engines in order, with the time since the cut."""
        events = []
        for engine in self.move.engines:
            ahead, _ = engine.host.clock_offset()
            reasons = [event["data"].get("reason", "") for event in self.cut.migrations(engine)]
            for (status, at), reason in zip(self.cut.events(engine), reasons):
                events.append((at - ahead - self.cut.at, engine.name, status, reason))
        for after, name, status, reason in sorted(events):
            self.narrator.note(name, f"+{after * 1000:.0f} ms  {status}: {reason}")

    def verify(self):
        move = self.move
        self.narrator.heading("5. It completes over rail 2")
        self.command(move.destination, "migrate_set_parameter max-postcopy-bandwidth 0")
        move.wait_all("completed", 120)
        self.show()
        self.info = [engine.query() for engine in move.engines]
        before = move.destination_guest.verified()
        while move.destination_guest.verified() < before + AFTER_PAGES:
            seen = move.destination_guest.verified()
            wait_for(
                "the guest makes progress", 20, lambda: move.destination_guest.verified() > seen
            )
            self.guest(move.destination_guest)
        move.finish()
        self.narrator.note("guest on b", "has verified every page; none is corrupt")

    def table(self):
        """Prints the figures, and checks that they are plausible."""
        source, destination = self.info
        paused, active = self.figures
        total = destination["ram"]["total"]
        rows = (
            ("downtime at the switch-over", f"{source['downtime']} ms"),
            ("from the cut until both sides are paused", f"{paused * 1000:.0f} ms"),
            ("from the pause until postcopy-active", f"{(active - paused) * 1000:.0f} ms"),
            ("memory in place before the cut", f"{self.in_place / MB:.0f} of {total / MB:.0f} MB"),
            ("recoveries, commands given for them", f"{source['postroad']['recoveries']}, none"),
            ("faults served", f"{destination['postroad']['faults']}"),
            ("fault latency, mean (longest)", latency(destination)),
            ("memory read over rdma:", f"{destination['ram']['transferred'] / MB:.0f} MB"),
            ("total time of the migration", f"{source['total-time'] / 1000:.1f} s"),
            ("corrupt pages", f"{self.move.destination_guest.last()[3]}"),
        )
        self.narrator.heading("The figures (the hosts are emulated)")
        for name, value in rows:
            print(f"  {name:<40}{value:>24}")
        expect(0 < self.in_place < total, "the cut must be in the middle of the migration")
        expect(source["postroad"]["recoveries"] == 1, "there must be exactly one recovery")
        expect(
            destination["postroad"]["faults"] > 0,
            "no fault was served: this was not a postcopy migration",
        )

    def run(self):
        print(PICTURE, end="")
        for step in (self.hosts, self.work, self.migrate, self.cut_rail, self.verify, self.table):
            step()


def run_demo(options, narrator):
    build = os.path.abspath(options.build)
    narrator.note("", "two hosts boot; emulated ones take a while")
    with Lab(build=build) as lab:
        demo = Demo(lab, build, narrator)
        try:
            demo.run()
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
    narrator = Narrator(colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    try:
        run_demo(options, narrator)
    except (Failure, LabError) as failure:
        print(f"\ndemo-roce: FAILED: {failure}", file=sys.stderr)
        return 1
    print(
        "\nThe guest has migrated over RDMA, in spite of the cut rail."
        f" {time.monotonic() - narrator.began:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
