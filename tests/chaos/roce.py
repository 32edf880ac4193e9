# SPDX-License-Identifier: GPL-2.0-or-later
"""The cast on the RoCE lab: two emulated hosts with two rails, paths over rdma:."""

import os
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "roce", "migrate"))

from move import PORT, RAILS, Lab, LabError, Move  # noqa: E402
from harness.process import Failure  # noqa: E402

from watch import Poller  # noqa: E402

WITHOUT = ("flood", "starve")  # what is done on this machine and not on the lab's hosts


class Rails:
    """The links."""

    def __init__(self, lab):
        self.lab = lab

    def cut(self, rail):
        self.lab.cut(rail)

    def black_hole(self, rail, sender=None):
        """A host drops what arrives."""
        hears = None if sender is None else next(host for host in self.lab.hosts if host is not sender)
        self.lab.inject("blackhole", rail, hears)

    def heal(self):
        self.lab.restore(*RAILS)


class Stranger:
    """A process of a lab's host, as harness.process has them."""

    def __init__(self, process, name):
        self.process = process
        self.name = name

    def wait(self, seconds):
        self.process.wait(seconds)

    def alive(self):
        return self.process.alive()

    def output(self):
        return self.process.output()


def ahead(host):
    """What a host's monotonic clock is ahead of ours, in seconds."""
    there = float(host.run("python3", "-c", "import time; print(time.time() - time.monotonic())", check=True).stdout)
    offset, _ = host.clock_offset()
    return time.time() - time.monotonic() - there + offset


class HostPoller(Poller):
    """Asks an engine on a host, from there. What the emulated CPU itself waits for, its kernel does not know."""

    bound = 2.0  # s
    EVERY = 0.2  # s: the engine needs the CPU, too

    def __init__(self, engine, clock):  # pylint: disable=super-init-not-called
        """clock: what the host's is ahead of ours."""
        self.name, self.engine, self.clock = engine.name, engine, clock
        self.excused = []
        argv = [os.path.join(HERE, "poll-monitor"), engine.qmp_path, engine.process.pid, self.EVERY]
        self.process = engine.host.popen("python3", *argv)

    def answers(self):
        return [(asked - self.clock, *rest) for asked, *rest in super().answers()]


class Hosts:
    """The test guest moves from host a to host b, once."""

    role_of_source = "source"

    def __init__(self, lab, options):
        self.lab, self.links = lab, Rails(lab)
        build = os.path.abspath(options.build)
        self.move = Move(lab, build, size_mb=options.size, pace_us=options.pace)
        self.source, self.destination = self.move.engines
        self.clocks = {host.name: ahead(host) for host in lab.hosts}
        self.watching = {engine.name: [] for engine in self.move.engines}
        for engine in self.move.engines:
            self.watch(engine)

    def next_round(self):
        pass

    def host(self, side):
        return self.lab.a if side == "source" else self.lab.b

    def pollers(self, engine):
        return self.watching[engine.name]

    def watch(self, engine):
        self.pollers(engine).append(HostPoller(engine, self.clocks[engine.host.name]))

    def uris(self, scheme):
        del scheme
        return [self.move.uri(rail) for rail in RAILS]

    def knock(self, kind):
        argv = [os.path.join(HERE, "stranger"), self.lab.b.address(2), str(PORT), kind]
        return Stranger(self.lab.a.popen("python3", *argv), f"stranger-{kind}")

    def signal(self, engine, number):
        engine.process.signal(number)

    def expect_source_runs(self):
        self.move.source_guest.wait_running()

    def verify(self):
        self.move.destination_guest.wait_verifies()
        self.move.source_guest.expect_stopped()

    def leave_source(self):
        pass

    def end(self):
        """The guest looks at all its pages once more."""
        for member in (self.move.destination_guest, self.source, self.destination):
            member.end()

    def close(self):
        for pollers in self.watching.values():
            for poller in pollers:
                poller.process.close()
        self.move.close()

    def logs(self):
        return self.move.logs()


def start(options):
    """The lab, booted, or the one that runs there."""
    if options.lab_directory:
        return Lab.attach(options.lab_directory)
    lab = Lab(build=os.path.abspath(options.build))
    lab.start()
    return lab


def play(options, rounds, perform):
    """perform(cast, round) for each round, on one lab."""
    try:
        lab = start(options)
        try:
            for round_ in rounds:
                cast = Hosts(lab, options)
                try:
                    perform(cast, round_)
                    cast.end()
                except (Failure, LabError) as error:
                    raise Failure(f"{error}\n{cast.logs()}") from None
                finally:
                    cast.close()
        finally:
            if not options.lab_directory:
                lab.stop()
    except LabError as error:
        raise Failure(str(error)) from None
