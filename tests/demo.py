#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Migrates a running Linux guest to another host, cuts its path half-way, and recovers over
another.

Two links join two hosts (network namespaces). A stock QEMU runs a guest that rewrites and verifies
its memory all the time. The environment variable QEMU chooses another QEMU program
(tests/qemu-versions). The demo explains each step; its exit code is 1 if a check fails."""

import argparse
import os
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "e2e"))
sys.dont_write_bytecode = True

from harness.lab import Lab, Move  # noqa: E402
from harness.network import require_namespaces  # noqa: E402
from harness.process import Failure, Skip, expect, raise_on_signals, wait_for  # noqa: E402
from harness.vm import GuestSpec, probe_accel, qemu_version  # noqa: E402

GUEST = GuestSpec(ram_mb=384, work_mb=288, work_rate=4000, tick_ms=250, survey=True)
BANDWIDTH = "8M"
PAUSE_SECONDS = 4
AFTER_SECONDS = 6
MB = 1 << 20

PICTURE = """
    source host                      destination host
   ┌───────────────────┐            ┌───────────────────┐
   │ QEMU ── postroad  │── link1 ───│ postroad ── QEMU  │
   │ (Linux guest)     │── link2 ───│ (waits)           │
   └───────────────────┘            └───────────────────┘
"""


class Narrator:
    """Prints each step with its time."""

    def __init__(self, colour):
        self.began = time.monotonic()
        self.colour = colour

    def paint(self, code, text):
        return f"\033[{code}m{text}\033[0m" if self.colour else text

    def line(self, tag, text, code):
        at = time.monotonic() - self.began
        print(f"{at:6.1f} s  {self.paint(code, f'{tag:<12}')} {text}", flush=True)

    def heading(self, text):
        print(f"\n{self.paint('1', text)}", flush=True)

    def note(self, source, text):
        self.line(source, text, "36")

    def command(self, host, text):
        self.line(host, self.paint("1", f"$ {text}"), "33")

    def guest(self, console, where):
        last = console.last()
        self.line(
            f"guest on {where}",
            f"t={last.t:.1f} s, {last.rounds} rounds, {last.pages} pages verified,"
            f" {last.corrupt} corrupt",
            "32" if not last.corrupt else "31",
        )


class Demo:
    def __init__(self, lab, narrator):
        self.lab = lab
        self.narrator = narrator
        self.move = None
        self.at_cut = None

    def command(self, engine, line):
        """Shows and runs a command of the operator."""
        side = "source" if engine is self.move.source else "destination"
        self.narrator.command(side, f"postroadctl {side}.qmp '{line}'")
        answer = engine.hmp(line).strip()
        if answer:
            self.narrator.note("", answer)

    def show(self, engine):
        info = engine.query()
        side = "source" if engine is self.move.source else "destination"
        ram = info["ram"]
        reason = info["postroad"].get("reason")
        done = 100 * (ram["total"] - ram["remaining"]) / ram["total"]
        self.narrator.note(
            side, f"{info['status']}, {done:.0f} % in place" + (f" ({reason})" if reason else "")
        )

    def show_both(self):
        for engine in self.move.engines:
            self.show(engine)

    def boot(self):
        self.narrator.heading("1. A guest runs on the source host")
        self.move = Move(self.lab, scheme="ofi", spec=GUEST, tls=True)
        self.narrator.note(
            "",
            f"stock QEMU ({self.lab.accel}), {GUEST.ram_mb} MB, Linux rewrites and verifies"
            f" {GUEST.work_mb} MB of it at {GUEST.work_rate} pages/s",
        )
        self.move.source_vm.console.wait_running("source")
        self.narrator.guest(self.move.source_vm.console, "A")

    def migrate(self):
        move = self.move
        self.narrator.heading("2. It migrates over link1")
        for engine in move.engines:
            self.command(engine, f"migrate_set_parameter max-postcopy-bandwidth {BANDWIDTH}")
        self.command(move.source, f"migrate -d {move.uri(link=1)}")
        wait_for(
            "the guest runs at the destination", 30, lambda: move.destination_vm.console.last()
        )
        self.narrator.guest(move.destination_vm.console, "B")
        self.show_both()
        move.destination_vm.console.wait_surveyed()
        move.expect_midway()
        self.narrator.guest(move.destination_vm.console, "B")
        self.show_both()

    def cut(self):
        move = self.move
        self.narrator.heading("3. link1 is cut in the middle of the migration")
        self.narrator.command("source", "ip link set link1 down")
        move.network.link_down(1)
        move.wait_paused()
        self.at_cut = move.destination.query()
        self.show_both()
        console = move.destination_vm.console
        seen = len(console.progress())
        for _ in range(PAUSE_SECONDS):
            seen += round(1000 / GUEST.tick_ms)
            wait_for("the guest prints its progress", 10, lambda: len(console.progress()) >= seen)
            self.narrator.guest(console, "B")
        self.narrator.note(
            "", "the guest still runs; its workers wait for pages that cannot arrive now"
        )
        move.wait_paused()

    def recover(self):
        move = self.move
        self.narrator.heading("4. The migration recovers over link2")
        self.command(move.source, f"migrate -d -r {move.uri(link=2)}")
        for engine in move.engines:
            wait_for(
                f"{engine.name} is back in postcopy",
                30,
                lambda e=engine: e.status() in ("postcopy-active", "completed"),
            )
        self.show_both()
        for engine in move.engines:
            self.command(engine, "migrate_set_parameter max-postcopy-bandwidth 0")
        move.wait_completed()
        self.show_both()

    def verify(self):
        move = self.move
        self.narrator.heading("5. The source QEMU ends, and the guest verifies all its memory")
        expect(move.source_vm.status() != "running", "the guest still runs on the source")
        self.narrator.command("source", "quit (QEMU)")
        move.source_vm.quit()
        console = move.destination_vm.console
        start = console.last()
        second = 0
        while second < AFTER_SECONDS or not GUEST.went_round(start, console.last()):
            expect(second < 120, "the guest has not verified all its memory within 120 s")
            second += 2
            wait_for("the guest makes progress", 20, lambda: console.last().t >= start.t + second)
            self.narrator.guest(console, "B")
        self.narrator.note("", "the guest has verified every page since the source ended")
        console.expect_sound()
        move.source_vm.console.expect_sound()

    def table(self):
        """Prints the figures, and checks that they are plausible."""
        source, destination = (engine.query() for engine in self.move.engines)
        extra = destination["postroad"]
        page = destination["ram"]["page-size"]
        total = destination["ram"]["total"] // page
        before = extra["pages-at-pause"]
        corrupt = self.move.destination_vm.console.last().corrupt
        rows = (
            ("downtime at the switch-over", f"{source['downtime']} ms"),
            ("time paused (the operator waits 4 s)", f"{source['postroad']['time-paused']} ms"),
            ("recovery, command to postcopy-active", f"{source['postroad']['last-recovery']} ms"),
            ("pages in place before the cut", f"{before} of {total}"),
            ("pages after the cut", f"{total - before}"),
            ("faults served", f"{extra['faults']}"),
            ("fault latency, mean (longest)", latency(destination)),
            ("memory moved over the links", f"{destination['ram']['transferred'] // MB} MB"),
            ("corrupt pages", f"{corrupt}"),
        )
        self.narrator.heading("The figures")
        for name, value in rows:
            print(f"  {name:<40}{value:>24}")
        expect(
            0 < before < total,
            f"{before} of {total} pages were in place at the cut: it must be in the middle",
        )
        expect(source["postroad"]["recoveries"] == 1, "there must be exactly one recovery")
        expect(extra["faults"] > 0, "no fault was served: this was not a postcopy migration")
        expect(corrupt == 0, f"{corrupt} corrupt pages")

    def run(self):
        print(PICTURE, end="")
        for step in (self.boot, self.migrate, self.cut, self.recover, self.verify, self.table):
            step()


def latency(info):
    mean = info.get("postcopy-latency", 0) / 1000
    longest = info["postroad"]["fault-latency-max"] / 1e6
    return f"{mean:.0f} us ({longest:.0f} ms)"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", default="build", help="build directory (default: build)")
    options = parser.parse_args()
    raise_on_signals()
    narrator = Narrator(colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    wanted = os.environ.get("POSTROAD_ACCEL", "auto")
    lab = None
    try:
        require_namespaces()
        print("QEMU {}, {}, on both hosts".format(*qemu_version()), flush=True)
        lab = Lab(options.build, probe_accel(os.path.join(options.build, "linux-guest"), wanted))
        with lab:
            try:
                Demo(lab, narrator).run()
            except Failure:
                print(lab.logs(), file=sys.stderr)
                raise
    except Skip as reason:
        print(f"demo: can't run here: {reason}", file=sys.stderr)
        return 1
    except Failure as failure:
        print(f"\ndemo: FAILED: {failure}", file=sys.stderr)
        return 1
    print(
        "\nThe guest has migrated, lost its path, and recovered."
        f" {time.monotonic() - narrator.began:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
