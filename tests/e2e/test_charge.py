# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel charges the pages that come in to the guest's memory cgroup, not to the engine's."""

import glob
import os
import signal
import subprocess

from harness.case import case
from harness.cgroup import Cgroups, cgroups
from harness.lab import Move
from harness.light import LightMove
from harness.process import LONG, die_with_parent, expect, wait_for
from harness.vm import GuestSpec

MIB = 1 << 20
LIMIT = 32 * MIB
DATA_MB = 512  # of pages that are not zero, at least
ROOM_MB = 96  # more RAM, which holds zeros
BY_HAND = ("auto-recover=off",)


class Charged:
    """The destination's engine in a group with a low limit, and its guest in another group."""

    def __init__(self, groups):
        self.engine = groups.new("engine")
        self.guest = groups.new("guest")
        self.engine.limit(LIMIT)
        self.before = 0

    def put(self, move, guest):
        """Puts the guest and the engine into their groups. No page has come in yet."""
        self.guest.add(guest.pid)
        move.destination.process.stop()
        move.destination.argv = [*self.engine.wrapper(), *move.destination.argv]
        move.destination.restart()
        move.destination.connect()
        self.before = self.guest.current()

    def expect_no_userfaultfd(self, guest):
        """Expects that in the guest's group only the guest itself has a userfaultfd open. Another
        process with one open could keep a killed guest from ending."""
        for pid in set(self.guest.processes()) - {guest.pid}:
            files = [os.readlink(path) for path in glob.glob(f"/proc/{pid}/fd/*")]
            expect(not any("userfaultfd" in file for file in files), f"process {pid} has {files}")

    def expect_charged_to_guest(self, megabytes=DATA_MB):
        used, peak, grown = self.engine.current(), self.engine.peak(), self.guest.current() - self.before
        told = f"engine: {used / MIB:.1f} MiB, at most {(peak or used) / MIB:.1f}; guest: {grown / MIB:.0f} MiB more"
        expect(grown >= megabytes * MIB, f"the guest's group was not charged the {megabytes} MiB that have come in: {told}")
        expect(max(used, peak or 0) < LIMIT, f"the engine's group has been full: {told}; {self.engine.failures()}")


def light_move(lab, scheme):
    return LightMove(lab, scheme=scheme, size=f"{DATA_MB + ROOM_MB}M", settings=BY_HAND)


def qemu_move(lab, scheme, vm):
    spec = GuestSpec(ram_mb=DATA_MB + 2 * ROOM_MB, work_mb=DATA_MB, work_rate=60000)
    return Move(lab, scheme=scheme, spec=spec, settings=BY_HAND, vm=vm)


def guest_of(move):
    return move.destination_guest.process if isinstance(move, LightMove) else move.destination_vm.process


def expect_alive(process):
    expect(process.alive(), f"{process.name} has ended ({process.exit_code()}): {process.output()[-500:]}")


def bring_in(move, charged):
    """Moves, with a link that is cut in the middle."""
    charged.put(move, guest_of(move))
    move.slow_down("30M")
    move.start(link=1)
    move.wait_midway()
    charged.expect_no_userfaultfd(guest_of(move))
    move.network.link_down(1)
    move.wait_paused()
    move.network.link_up(1)
    move.full_speed()
    move.resume(link=1)
    move.wait_completed()
    charged.expect_charged_to_guest()
    move.expect_guest_sound()


for _scheme in ("tcp", "ofi"):

    @case(f"small-engine-brings-in-a-large-guest-of-the-library-over-{_scheme}")
    def library(lab, scheme=_scheme):
        with cgroups(lab) as groups:
            bring_in(light_move(lab, scheme), Charged(groups))

    for _how, _vm in (("attached", {}), ("preload", {"agent": True})):

        @case(f"small-engine-brings-in-a-large-qemu-over-{_scheme}-{_how}", heavy=True)
        def qemu(lab, scheme=_scheme, vm=_vm):
            with cgroups(lab) as groups:
                bring_in(qemu_move(lab, scheme, vm), Charged(groups))


@case("small-engine-that-is-killed-is-followed-by-a-small-engine")
def followed(lab):
    with cgroups(lab) as groups:
        charged = Charged(groups)
        move = light_move(lab, "tcp")
        charged.put(move, guest_of(move))
        move.slow_down("30M")
        move.start(link=1)
        move.wait_midway()
        move.destination.kill()
        move.destination.resume()
        move.source.wait_status("postcopy-paused")
        move.destination.wait_status("postcopy-paused")
        move.resume(link=1)
        move.wait_completed()
        charged.expect_charged_to_guest()
        move.expect_guest_sound()


@case("guest-whose-memory-cgroup-is-full-waits-until-there-is-room", heavy=True)
def full(lab):
    """The kernel kills the process that allocates the guest's pages, and not the guest. Both
    engines report it."""
    with cgroups(lab) as groups:
        charged = Charged(groups)
        move = qemu_move(lab, "tcp", {})
        charged.put(move, guest_of(move))
        charged.guest.limit(charged.before + DATA_MB // 2 * MIB)
        move.start(link=1)
        move.destination.wait_status("postcopy-paused")
        expect_alive(guest_of(move))
        move.destination.wait_said("memory cgroup is full: raise that cgroup's limit (memory.max), and start this engine anew")
        move.source.wait_status("postcopy-paused")
        move.expect_midway()
        # QEMU itself may need memory at any time, as this process does.
        user = [*charged.guest.wrapper(), "dd", "if=/dev/zero", "of=/dev/null", "bs=8M", "count=1", "status=none"]
        done = subprocess.run(user, check=False)
        expect(done.returncode == 0, f"a process of the guest's group that needs memory ended with {done.returncode}")
        expect_alive(guest_of(move))
        charged.guest.limit(charged.before + 2 * DATA_MB * MIB)
        move.destination.process.stop()
        move.destination.resume()
        move.destination.wait_status("postcopy-paused")
        move.resume(link=1)
        move.wait_completed()
        charged.expect_charged_to_guest()
        move.expect_guest_sound()


@case("engine-that-cannot-join-the-guests-memory-cgroup-says-what-that-means")
def not_joined(lab):
    with cgroups(lab) as groups:
        move = Move(lab, scheme="tcp", spec=GuestSpec(ram_mb=160, work_mb=32, fresh=True), settings=BY_HAND)
        engine, guest = groups.new("engine"), groups.new("guest")
        guest.add(guest_of(move).pid)
        move.destination.process.stop()
        # The engine does not find the cgroups at the place that the kernel names.
        hidden = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', groups.root)
        move.destination.argv = [*engine.wrapper(), *hidden, *move.destination.argv]
        move.destination.restart()
        move.destination.connect()
        move.start(link=1)
        move.destination.wait_said("must not have a limit below the guest's size")
        move.wait_completed()
        expect(engine.current() > 32 * MIB, "the pages were not charged to the engine")
        move.expect_guest_sound()


@case("memory-cgroups-of-a-test-that-is-killed-are-removed", light=True)
def removed(lab):
    """The groups of these tests themselves: no other program would remove them."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        die_with_parent()
        os.close(reader)
        groups = Cgroups()
        groups.new("engine")
        os.write(writer, groups.path.encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(writer)
    with os.fdopen(reader) as told:
        path = told.read()
    os.waitpid(child, 0)
    expect(path, "the child made no cgroup")
    wait_for(f"{path} is removed", LONG, lambda: not os.path.exists(path))
