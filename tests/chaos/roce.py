# SPDX-License-Identifier: GPL-2.0-or-later
"""The setup on the RoCE lab: two virtual hosts, two rails, and paths over rdma:."""

import os
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "roce", "migrate"))

from move import PORT, RAILS, Lab, LabError, Move  # noqa: E402
from harness.process import Failure  # noqa: E402

from checks import Poller  # noqa: E402

WITHOUT = ("flood", "starve")  # actions that only work on this machine, not on the lab's hosts


class Rails:
    """The links of the lab."""

    def __init__(self, lab):
        self.lab = lab

    def cut(self, rail):
        self.lab.cut(rail)

    def black_hole(self, rail, sender=None):
        """The receiving host drops the packets; sender: only those of this host are dropped."""
        receiver = (
            None if sender is None else next(host for host in self.lab.hosts if host is not sender)
        )
        self.lab.inject("blackhole", rail, receiver)

    def heal(self):
        self.lab.restore(*RAILS)


class Stranger:
    """A process on a host of the lab, with the methods of harness.process."""

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
    """By how many seconds a host's monotonic clock is ahead of this machine's."""
    there = float(
        host.run(
            "python3", "-c", "import time; print(time.time() - time.monotonic())", check=True
        ).stdout
    )
    offset, _ = host.clock_offset()
    return time.time() - time.monotonic() - there + offset


class HostPoller(Poller):
    """Polls an engine of the lab on its own host. The time without a CPU is not known there: the
    virtual CPU waits for this machine's CPUs, and the host's kernel does not count that."""

    bound = 2.0  # s
    EVERY = 0.2  # s; the engine shares the virtual CPU

    def __init__(self, engine, clock):  # pylint: disable=super-init-not-called
        """clock: by how many seconds the host's clock is ahead."""
        self.name, self.engine, self.clock = engine.name, engine, clock
        self.excused = []
        argv = [os.path.join(HERE, "poll-monitor"), engine.qmp_path, engine.process.pid, self.EVERY]
        self.process = engine.host.popen("python3", *argv)

    def answers(self):
        return [(asked - self.clock, *rest) for asked, *rest in super().answers()]


class RocePair:
    """The test guest migrates from host a to host b, once."""

    role_of_source = "source"

    def __init__(self, lab, options):
        self.lab, self.links = lab, Rails(lab)
        build = os.path.abspath(options.build)
        self.move = Move(lab, build, size_mb=options.size, pace_us=options.pace)
        self.source, self.destination = self.move.engines
        self.clocks = {host.name: ahead(host) for host in lab.hosts}
        self.all_pollers = {engine.name: [] for engine in self.move.engines}
        for engine in self.move.engines:
            self.watch(engine)

    def next_round(self):
        pass

    def host(self, side):
        return self.lab.a if side == "source" else self.lab.b

    def pollers(self, engine):
        return self.all_pollers[engine.name]

    def watch(self, engine):
        self.pollers(engine).append(HostPoller(engine, self.clocks[engine.host.name]))

    def uris(self, scheme):
        del scheme
        return [self.move.uri(rail) for rail in RAILS]

    def start_stranger(self, kind):
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
        """Ends the guest, which checks all its pages, and the engines."""
        for node in (self.move.destination_guest, self.source, self.destination):
            node.end()

    def close(self):
        for pollers in self.all_pollers.values():
            for poller in pollers:
                poller.process.close()
        self.move.close()

    def logs(self):
        return self.move.logs()


def start(options):
    """Boots a lab, or attaches to the running one in --lab-directory."""
    if options.lab_directory:
        return Lab.attach(options.lab_directory)
    lab = Lab(build=os.path.abspath(options.build))
    lab.start()
    return lab


def run_rounds(options, rounds, run_round):
    """Calls run_round(setup, round) for each round, on one lab."""
    try:
        lab = start(options)
        try:
            for round_ in rounds:
                setup = RocePair(lab, options)
                try:
                    run_round(setup, round_)
                    setup.end()
                except (Failure, LabError) as error:
                    raise Failure(f"{error}\n{setup.logs()}") from None
                finally:
                    setup.close()
        finally:
            if not options.lab_directory:
                lab.stop()
    except LabError as error:
        raise Failure(str(error)) from None
