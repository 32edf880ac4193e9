# SPDX-License-Identifier: GPL-2.0-or-later
"""A migration between the two hosts of the RoCE lab: guests and engines, the steps, and the times
of a failover.

Host a is the source, host b the destination. On each host run a guest (guests.py), an engine, and
the operator's commands for it."""

import itertools
import os
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]

import runner  # noqa: E402,F401
from guests import MB, HostQmp, Workload  # noqa: E402
from harness.engine import Engine  # noqa: E402
from harness.process import Failure, expect, wait_for  # noqa: E402
from roce_lab import FAULTS, RAILS, Lab, LabError, on_each  # noqa: E402

PORT, TCP_PORT = 4444, 4445
SLOW = "256K"  # a guest's memory takes half a minute, so that a cut hits the middle of it
# Emulated hosts get no CPU for long moments on a busy machine: READs get 2.1 s (urgent) and 3.2 s
# (bulk), heartbeats 5 s, the first attempt to connect a lane 3 s.
PATIENT_URI = "connect-timeout-ms=3000"
BOTH = f"rdma:0.0.0.0:{PORT}?ack-timeout=17&{PATIENT_URI},tcp:0.0.0.0:{TCP_PORT}"
PATIENT = ("heartbeat-timeout=5000", "connect-timeout=10000", "handshake-timeout=20000")
IN_PAUSE = {"postcopy-paused", "postcopy-recover-setup", "postcopy-recover"}
NUMBERS = itertools.count(1)


class HostEngine(Engine):  # pylint: disable=super-init-not-called
    """The engine of a host's guest."""

    def __init__(  # pylint: disable=too-many-arguments
        self, host, name, build, directory, guest, incoming=None, settings=(), options=(), env=None, wrapper=()
    ):
        self.host = host
        self.name = name
        self.ctl = f"{build}/postroadctl"
        self.qmp_path = f"{directory}/{name}.qmp"
        argv = [*wrapper, f"{build}/postroad", "--guest", guest.option, "--qmp", self.qmp_path]
        argv += ["--log", "debug", "--insecure"]  # only the lab's hosts can use the rails
        argv += ["--incoming", incoming] if incoming else []
        argv += options
        for setting in settings:
            argv += ["--set", setting]
        self.argv, self.env = argv, env
        self.process = host.popen(*argv, env=env)
        self.qmp = None

    def kill(self):
        """Kills the engine with SIGKILL."""
        self.qmp.close()
        self.process.signal(9)
        code = self.process.wait(20)
        expect(code == -9, f"{self.name} ended with {code}: {self.process.output()[-1000:]}")

    def resume(self):
        self.process = self.host.popen(*self.argv, "--resume", env=self.env)
        self.connect()

    def connect(self):
        try:
            self.qmp = HostQmp(self.host, self.qmp_path)
        except Failure as failure:
            raise Failure(f"{failure}; {self.name} said: {self.process.output()[-1000:]}") from None

    def hmp(self, line, seconds=20):
        """Sends a command like postroadctl, whose start takes an emulated host 0.2 s. Returns the
        text that postroadctl would print."""
        self.qmp.send("x-postroad-hmp", **{"command-line": line})
        answer = self.qmp.answer(seconds)
        if answer is None or "error" in answer:
            raise Failure(f"{self.name}: '{line}' failed: {answer and answer['error'].get('desc')}")
        return answer["return"]

    def postroadctl(self, line, seconds):
        return self.host.run(self.ctl, self.qmp_path, line, timeout=seconds)

    def migrations(self):
        """Returns the engine's MIGRATION events so far."""
        return [event for event in self.qmp.drain_events() if event["event"] == "MIGRATION"]

    def end(self):
        """Ends the engine like an operator, and expects that it has not failed before."""
        self.qmp.close()
        self.process.signal(15)
        code = self.process.wait(20)
        output = self.process.output()
        expect(code in (0, -15), f"{self.name} ended with {code}: {output[-1000:]}")
        for mark in ("Sanitizer", "runtime error:", "CRITICAL", "assertion"):
            expect(mark not in output, f"{self.name}: {mark}")


class Move:
    """Guests and engines, and the steps of a migration as one call each."""

    def __init__(  # pylint: disable=too-many-arguments
        self,
        lab,
        build,
        guest=Workload,
        incoming=BOTH,
        settings=(),
        patience=PATIENT,
        options=(),
        wrapper=(),
        destination_env=None,
        uri_options="",
        **kind,
    ):
        """options: more options of both engines. wrapper: a command that execs the engine.
        uri_options: of all rdma: URIs.
        destination_env: environment of the destination's engine. kind: of the guest."""
        self.lab = lab
        self.uri_options = f"?{uri_options}" if uri_options else ""
        self.directory = f"/tmp/move{next(NUMBERS)}"
        self.started = []  # (member, process): close() ends all processes
        self.notes = []  # lines for the report
        settings = (*patience, *settings)

        def start(host):
            arrives = host is lab.b
            host.run("busybox", "mkdir", self.directory, check=True)
            its_guest = self._keep(guest(host, build, self.directory, incoming=arrives, **kind))
            its_guest.wait_ready()
            where = (build, self.directory, its_guest)
            name, listen = ("destination", incoming) if arrives else ("source", None)
            env = destination_env if arrives else None
            engine = self._keep(HostEngine(host, name, *where, listen, settings, options, env, wrapper))
            engine.connect()
            return its_guest, engine

        started = on_each(lab.hosts, start)
        (self.source_guest, self.destination_guest), self.engines = zip(*started)
        self.source, self.destination = self.engines
        self.source_guest.wait_running()

    def _keep(self, member):
        self.started.append((member, member.process))
        return member

    def replace(self, engine):
        """Kills an engine and starts another one in its place."""
        engine.kill()
        self.follow(engine)

    def follow(self, engine):
        """Starts another engine in place of a killed one."""
        engine.resume()
        self._keep(engine)

    def close(self):
        for _, process in self.started:
            process.kill()
        on_each(self.lab.hosts, lambda host: host.run("busybox", "rm", "-rf", self.directory))

    def logs(self):
        """Returns the last lines of all output, for the report of a failure."""
        out = []
        for member, process in self.started:
            name = getattr(member, "name", "guest")
            out.append(f"--- {name} on host {member.host.name}")
            out += process.output().splitlines()[-3 if name == "guest" else -60 :]
        return "\n".join(out)

    def uri(self, rail, scheme="rdma"):
        if scheme == "rdma":
            return f"rdma:{self.lab.b.address(rail)}:{PORT}{self.uri_options}"
        return f"{scheme}:{self.lab.b.address(rail)}:{TCP_PORT}"

    # Steps

    def slow_down(self, bandwidth=SLOW):
        self.destination.hmp(f"migrate_set_parameter max-postcopy-bandwidth {bandwidth}")

    def full_speed(self):
        self.destination.hmp("migrate_set_parameter max-postcopy-bandwidth 0")

    def start(self, *uris):
        self.source.hmp(f"migrate -d {','.join(uris)}")

    def start_slowly(self, *uris, bandwidth=SLOW):
        """Starts a slow migration, and waits until a part of the pages has arrived."""
        self.slow_down(bandwidth)
        self.start(*uris)
        self.wait_midway()

    def wait_midway(self):
        """Waits until some pages have arrived in postcopy while others are missing."""

        def in_postcopy():
            info = self.destination.query()
            expect(info.get("status") not in ("failed", "completed"), f"the destination is {info}")
            return info["ram"]["remaining"] if info.get("status") == "postcopy-active" else 0

        at_first = wait_for("the destination is in postcopy and misses pages", 60, in_postcopy)
        wait_for("more pages come", 60, lambda: self.destination.remaining() < at_first)
        for engine in self.engines:
            wait_for(f"the {engine.name} has said that it is in postcopy", 60, lambda e=engine: in_postcopy_now(e))
        self.expect_midway()

    def expect_midway(self):
        left = self.destination.remaining()
        expect(left > 0, "all pages had arrived before the path could be cut: the test proves nothing")
        return left

    def wait_all(self, status, seconds=60):
        for engine in self.engines:
            engine.wait_status(status, seconds)

    def complete(self, seconds=90):
        """Waits for the end of the migration. Then the guest must run at the destination only, with
        the right contents."""
        self.full_speed()
        self.wait_all("completed", seconds)
        expect(self.source.remaining() == self.destination.remaining() == 0, "completed with pages remaining")
        self.destination_guest.wait_verifies()
        self.source_guest.expect_stopped()

    def finish(self):
        """Completes the migration, and ends both engines and the destination's guest. The source's
        guest stays, stopped."""
        self.complete()
        for member in (self.destination_guest, self.source, self.destination):
            member.end()

    def cut(self, what):
        """Calls `what`, which breaks the path in use. Returns a Cut that observes the effects."""
        self.expect_midway()
        cut = Cut(self)
        what()
        return cut


def in_postcopy_now(engine):
    """Returns whether the engine's last event says so. An event may arrive later than an answer of
    the other engine."""
    events = engine.migrations()
    return bool(events) and events[-1]["data"]["status"] == "postcopy-active"


class Cut:
    """The loss of a path and the recovery, observed in the events of both sides."""

    def __init__(self, move):
        self.move = move
        self.seen = {engine.name: len(engine.migrations()) for engine in move.engines}
        self.at = time.time()

    def migrations(self, engine):
        """Returns the engine's MIGRATION events since the cut."""
        return engine.migrations()[self.seen[engine.name] :]

    def events(self, engine):
        """Returns (status, time in seconds by the engine's clock) of the events since the cut."""
        return [
            (
                event["data"]["status"],
                event["timestamp"]["seconds"] + event["timestamp"]["microseconds"] / 1e6,
            )
            for event in self.migrations(engine)
        ]

    def statuses(self, engine):
        return [status for status, _ in self.events(engine)]

    def reason(self, engine, status):
        """Returns the first reason that the engine gave for this state since the cut."""
        wanted = (event["data"] for event in self.migrations(engine) if event["data"]["status"] == status)
        return next((data.get("reason", "") for data in wanted), None)

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
        """Waits until both have paused, and have been in postcopy again."""
        self.wait_paused(seconds)
        self.wait_seen("postcopy-active", seconds)

    def expect_path(self, uri):
        """Expects that the source reports a recovery over this path."""
        wanted = f"connected again over {uri}"
        events = self.migrations(self.move.source)
        reasons = [event["data"].get("reason") for event in events if event["data"]["status"] == "postcopy-recover"]
        expect(reasons and reasons[-1] == wanted, f"the source should report {wanted}, not {reasons}")

    def expect_only_paused(self):
        for engine in self.move.engines:
            strange = set(self.statuses(engine)) - IN_PAUSE
            expect(not strange, f"{engine.name} left the pause: {self.statuses(engine)}")

    def times(self):
        """Returns the seconds from the cut until both sides were paused, and until both were in
        postcopy again, by this machine's clock."""
        paused, active = [], []
        for engine in self.move.engines:
            ahead, _ = engine.host.clock_offset()
            events = self.events(engine)
            first = next(i for i, (status, _) in enumerate(events) if status == "postcopy-paused")
            paused.append(events[first][1] - ahead)
            active.append(next(at for status, at in events[first:] if status == "postcopy-active") - ahead)
        both_paused, both_active = max(paused) - self.at, max(active) - self.at
        expect(both_paused < both_active, f"paused after {both_paused:.3f} s, active after {both_active:.3f} s")
        return both_paused, both_active

    def report(self, what="cut"):
        """Adds the three figures to the test's report."""
        both_paused, both_active = self.times()
        self.move.notes.append(
            f"{what}: to both paused {both_paused:.2f} s, paused to postcopy-active"
            f" {both_active - both_paused:.2f} s, total {both_active:.2f} s"
        )
        return both_paused, both_active


__all__ = [
    "BOTH",
    "Cut",
    "FAULTS",
    "Failure",
    "Lab",
    "LabError",
    "MB",
    "Move",
    "RAILS",
    "expect",
    "wait_for",
]
