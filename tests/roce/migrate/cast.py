# SPDX-License-Identifier: GPL-2.0-or-later
"""A migration between the two hosts of the RoCE lab: who takes part, its steps, and what a cut costs.

Host a is the source, b the destination. On each runs a test guest (tests/guest/workload), which verifies and
rewrites its pages all the time, and an engine. The operator's commands are typed there, too."""

import itertools
import os
import re
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
TESTS = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, os.path.join(TESTS, "e2e"))
sys.path.insert(0, os.path.join(os.path.dirname(TESTS), "soft-roce"))

from harness.engine import Engine  # noqa: E402
from harness.process import Failure, expect, wait_for  # noqa: E402
from harness.qmp import Qmp  # noqa: E402
from roce_lab import FAULTS, RAILS, Lab, LabError  # noqa: E402

MB = 1 << 20
PORT, TCP_PORT = 4444, 4445
SLOW = "2M"  # a guest's memory takes many seconds: what is cut is in the middle of it
BOTH = f"rdma:0.0.0.0:{PORT},tcp:0.0.0.0:{TCP_PORT}"
# Emulated hosts stop for long moments on a busy machine.
PATIENT = ("heartbeat-timeout=4000", "connect-timeout=4000", "handshake-timeout=20000")
IN_PAUSE = {"postcopy-paused", "postcopy-recover-setup", "postcopy-recover"}
NUMBERS = itertools.count(1)


def renew_rails(lab):
    """Makes both rails whole and their RoCE devices anew, once no engine holds them: soft-RoCE's management queue pair does not outlive a message that
    could not be sent, such as the last one of a process that ends while its rail is down."""
    for rail in RAILS:
        lab.mend(rail)
        lab.inject("rdma-del", rail)
        lab.restore(rail)


class HostQmp(Qmp):
    """A monitor on a host."""

    def __init__(self, host, path):
        self.host = host
        super().__init__(path, seconds=30)

    def _connect(self):
        try:
            return self.host.connect(self.path)
        except OSError:
            return None


class HostEngine(Engine):  # pylint: disable=super-init-not-called
    """One engine, on a host, beside that host's workload."""

    def __init__(self, host, name, build, directory, incoming=None, settings=()):
        self.host = host
        self.name = name
        self.ctl = f"{build}/postroadctl"
        self.qmp_path = f"{directory}/{name}.qmp"
        argv = [f"{build}/postroad", "--guest", f"agent:{directory}/agent", "--qmp", self.qmp_path]
        argv += ["--log", "debug"]
        argv += ["--incoming", incoming] if incoming else []
        for setting in settings:
            argv += ["--set", setting]
        self.process = host.popen(*argv)
        try:
            self.qmp = HostQmp(host, self.qmp_path)
        except Failure as failure:
            raise Failure(f"{failure}; {name} said: {self.process.output()[-1000:]}") from None

    def postroadctl(self, line, seconds):
        return self.host.run(self.ctl, self.qmp_path, line, timeout=seconds)

    def migrations(self):
        """Its MIGRATION events so far."""
        return [event for event in self.qmp.drain_events() if event["event"] == "MIGRATION"]

    def end(self):
        """As an operator would; it has to be well until then."""
        self.qmp.close()
        self.process.signal(15)
        code = self.process.wait(20)
        output = self.process.output()
        expect(code in (0, -15), f"{self.name} ended with {code}: {output[-1000:]}")
        for mark in ("Sanitizer", "runtime error:", "CRITICAL", "assertion"):
            expect(mark not in output, f"{self.name}: {mark}")


class Workload:
    """The test guest, on a host."""

    LINE = re.compile(r"^(running|paused) verified=(\d+) written=(\d+) corrupt=(\d+)$", re.M)

    def __init__(self, host, build, directory, size_mb, incoming=False):
        self.host = host
        argv = [f"{build}/tests/guest/workload", "--socket", f"{directory}/agent"]
        argv += ["--size", f"{size_mb}M", "--threads", "2", "--pace", "20000"]
        self.process = host.popen(*argv, *(["--incoming"] if incoming else []))

    def last(self):
        """(state, pages verified, pages written, pages corrupt) as it said last; None: nothing yet."""
        lines = self.LINE.findall(self.process.output("out"))
        return (lines[-1][0], *map(int, lines[-1][1:])) if lines else None

    def verified(self):
        return self.last()[1] if self.last() else 0

    def wait_running(self, seconds=60):
        wait_for(
            f"the guest runs on host {self.host.name}",
            seconds,
            lambda: (self.last() or ("",))[0] == "running" and self.verified() > 0,
        )

    def wait_verifies(self, pages=100, seconds=60):
        """It works on, with everything that it has read being right."""
        before = self.verified()
        wait_for(
            f"the guest on host {self.host.name} verifies {pages} more pages",
            seconds,
            lambda: self.verified() >= before + pages,
        )
        expect(self.last()[3] == 0, f"{self.last()[3]} corrupt pages: {self.process.output()[-1000:]}")

    def end(self):
        """Has it verify every page before it ends."""
        self.process.signal(15)
        code = self.process.wait(60)
        said = self.process.output()
        expect("final corrupt=0 now=0" in said, f"the last look at all pages: {said[-1000:]}")
        expect(code == 0, f"the guest ended with {code}: {said[-1000:]}")


class Move:
    """The cast, and the steps of a migration as one call each."""

    def __init__(self, lab, build, size_mb=48, incoming=BOTH, settings=(), patience=PATIENT):
        self.lab = lab
        self.size_mb = size_mb
        self.directory = f"/tmp/move{next(NUMBERS)}"
        self.started = []  # processes, to be ended whatever happens
        self.rows = []  # what each cut took, for the report
        settings = (*patience, *settings)
        for host in lab.hosts:
            host.run("mkdir", self.directory, check=True)
        self.source_guest = self._keep(Workload(lab.a, build, self.directory, size_mb))
        self.destination_guest = self._keep(Workload(lab.b, build, self.directory, size_mb, incoming=True))
        self.source_guest.wait_running()
        where = (build, self.directory)
        self.source = self._keep(HostEngine(lab.a, "source", *where, settings=settings))
        self.destination = self._keep(HostEngine(lab.b, "destination", *where, incoming, settings))
        self.engines = (self.source, self.destination)

    def _keep(self, member):
        self.started.append((member, member.process))
        return member

    def close(self):
        for _, process in self.started:
            process.kill()
        for host in self.lab.hosts:
            host.run("rm", "-rf", self.directory)

    def logs(self):
        """The ends of all output, for a failure's report."""
        out = []
        for member, process in self.started:
            name = getattr(member, "name", "guest")
            out.append(f"--- {name} on host {member.host.name}")
            out += process.output().splitlines()[-3 if name == "guest" else -60 :]
        return "\n".join(out)

    def uri(self, rail, scheme="rdma"):
        port = PORT if scheme == "rdma" else TCP_PORT
        return f"{scheme}:{self.lab.b.address(rail)}:{port}"

    # Steps

    def slow_down(self, bandwidth=SLOW):
        self.destination.hmp(f"migrate_set_parameter max-postcopy-bandwidth {bandwidth}")

    def full_speed(self):
        self.destination.hmp("migrate_set_parameter max-postcopy-bandwidth 0")

    def start(self, *uris):
        self.source.hmp(f"migrate -d {','.join(uris)}")

    def start_slowly(self, *uris):
        """And waits until part of the pages, not all, are at the destination."""
        self.slow_down()
        self.start(*uris)
        self.wait_midway()

    def wait_midway(self, fraction=0.85):
        limit = self.size_mb * MB * fraction

        def midway():
            info = self.destination.query()
            expect(info.get("status") not in ("failed", "completed"), f"the destination is {info}")
            return info.get("status") == "postcopy-active" and info["ram"]["remaining"] < limit

        wait_for("part of the pages is at the destination", 90, midway)
        self.expect_midway()

    def expect_midway(self):
        left = self.destination.remaining()
        expect(left > 0, "all pages had arrived before the path could be cut: the test proves nothing")
        return left

    def wait_all(self, status, seconds=60):
        for engine in self.engines:
            engine.wait_status(status, seconds)

    def finish(self):
        """Sees the migration through; then everything that the guest has must be right."""
        self.full_speed()
        self.wait_all("completed", 120)
        expect(self.source.remaining() == self.destination.remaining() == 0, "completed with pages remaining")
        self.destination_guest.wait_verifies()
        expect(self.source_guest.last()[0] == "paused", "the guest runs on the source, too")
        for member in (self.destination_guest, self.source, self.destination):
            member.end()

    def cut(self, what):
        """Does `what` to the path in use and keeps the time."""
        self.expect_midway()
        cut = Cut(self)
        what()
        return cut


class Cut:
    """The loss of a path, and the way back as the events of both sides tell it."""

    def __init__(self, move):
        self.move = move
        self.seen = {engine.name: len(engine.migrations()) for engine in move.engines}
        self.at = time.time()

    def events(self, engine):
        """(status, time in seconds by the engine's clock) since the cut."""
        stamps = engine.migrations()[self.seen[engine.name] :]
        return [
            (
                event["data"]["status"],
                event["timestamp"]["seconds"] + event["timestamp"]["microseconds"] / 1e6,
            )
            for event in stamps
        ]

    def statuses(self, engine):
        return [status for status, _ in self.events(engine)]

    def wait_seen(self, status, seconds, engines=None):
        for engine in engines or self.move.engines:
            wait_for(
                f"{engine.name} has been in {status} since the cut",
                seconds,
                lambda e=engine: status in self.statuses(e),
            )

    def wait_paused(self, seconds=60):
        self.wait_seen("postcopy-paused", seconds)

    def wait_active(self, seconds=90):
        """Paused, and in postcopy again."""
        self.wait_paused(seconds)
        self.wait_seen("postcopy-active", seconds)

    def expect_path(self, uri):
        """Over which path the source says it went on."""
        wanted = f"connected again over {uri}"
        events = self.move.source.migrations()[self.seen["source"] :]
        reasons = [event["data"].get("reason") for event in events if event["data"]["status"] == "postcopy-recover"]
        expect(reasons and reasons[-1] == wanted, f"the source should have {wanted}, and says {reasons}")

    def expect_only_paused(self):
        for engine in self.move.engines:
            strange = set(self.statuses(engine)) - IN_PAUSE
            expect(not strange, f"{engine.name} left the pause: {self.statuses(engine)}")

    def report(self):
        """Keeps the three figures for the test's line. Clocks of the hosts are compared with ours now."""
        paused, active = [], []
        for engine in self.move.engines:
            ahead, _ = engine.host.clock_offset()
            events = self.events(engine)
            first = next(i for i, (status, _) in enumerate(events) if status == "postcopy-paused")
            paused.append(events[first][1] - ahead)
            active.append(next(at for status, at in events[first:] if status == "postcopy-active") - ahead)
        both_paused, both_active = max(paused) - self.at, max(active) - self.at
        expect(both_paused < both_active, f"paused after {both_paused:.3f} s, active after {both_active:.3f} s")
        self.move.rows.append(
            f"cut to both paused {both_paused:.2f} s, paused to postcopy-active"
            f" {both_active - both_paused:.2f} s, total {both_active:.2f} s"
        )
        return both_paused, both_active


__all__ = ["BOTH", "Cut", "FAULTS", "Failure", "Lab", "LabError", "MB", "Move", "RAILS", "expect", "renew_rails", "wait_for"]
