# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest runs on one side. Whatever the source's QEMU is told after the hand-over, the destination's memory stays
right, and both operators hear of it. After a failure before the hand-over the source's guest runs on, however long that
takes."""

import contextlib
import fcntl
import os
import struct

from harness.case import case
from harness.lab import Move
from harness.process import LONG, Failure, expect, wait_for
from harness.vm import GuestSpec

LET_RUN = ("event RESUME", "QEMU lets the guest run already")  # by an event, or as the watch begins
HANDED_OVER = "the guest at the source, which was handed over"
FENCED = "its RAM is write-protected: what the destination reads has not changed"


def start_midway(lab, bandwidth="1M", settings=(), **kind):
    """In postcopy, with most of the pages still at the source, and fenced there."""
    move = Move(lab, settings=("auto-recover=off", *settings), **kind)
    move.start_midway(bandwidth, fraction=0.98)
    wait_for("the source's RAM is fenced", LONG, lambda: "is write-protected, which took" in move.source.process.output())
    return move


def expect_both_said(move, *words):
    for words in (HANDED_OVER, *words):
        for engine in move.engines:
            engine.wait_said(words)


def order(move, *commands):
    """Tells the source's QEMU something. The answers may have to wait until the fence is lifted."""
    for command in commands:
        move.source_vm.qmp.send(command)
    return len(commands)


def reset_instead_of_end(move):
    """The tests' QEMUs have -no-reboot."""
    move.source_vm.qmp.command("set-action", reboot="reset")


def hear(move, count):
    """By now it has answered."""
    for _ in range(count):
        expect(move.source_vm.qmp.answer(LONG), "the source's QEMU does not answer after the fence was lifted")


def finish(move, orders):
    move.full_speed()
    move.wait_completed()
    hear(move, orders)
    wait_for("the source's guest is stopped", LONG, lambda: move.source_vm.status() != "running")
    move.source_vm.quit()
    move.destination_vm.console.wait_verified(move.destination_vm.spec)
    move.destination_vm.console.expect_sound()



@case("cont-at-the-source-in-mid-postcopy-changes-no-page")
def cont(lab):
    move = start_midway(lab)
    orders = order(move, "cont")
    expect_both_said(move, LET_RUN, FENCED)
    move.expect_midway()
    finish(move, orders)


@case("cont-again-and-again-at-the-source-while-the-path-is-cut-changes-no-page")
def cont_cut(lab):
    """The destination hears of it when it is connected again."""
    move = start_midway(lab)
    move.network.link_down(1)
    move.wait_paused()
    orders = order(move, *["cont"] * 20)
    move.source.wait_said(LET_RUN)
    move.resume(link=2)
    expect_both_said(move, LET_RUN, FENCED)
    finish(move, orders)


def run_unwatched(move):
    """Lets the source's guest run for as long as it takes it to write all its pages, if it could."""
    console, spec = move.source_vm.console, move.source_vm.spec
    first = console.last()
    with contextlib.suppress(Failure):
        wait_for("the source's guest visits all its pages", 6, lambda: spec.went_round(first, console.last()))


def without_engine(lab, *commands):
    """The kernel holds the guest's writes when nobody watches. The next engine finds a QEMU that does not answer, or
    whose guest runs, and stops it when it can."""
    move = start_midway(lab)
    move.source.kill()
    move.source.argv = [*move.source.argv, "--set", "guest-timeout=2000"]  # it meets a QEMU that does not answer
    if "system_reset" in commands:
        reset_instead_of_end(move)
    orders = order(move, *commands)
    run_unwatched(move)
    move.source.resume()
    wait_for("the next engine says so", LONG, lambda: HANDED_OVER in move.source.query()["postroad"]["reason"])
    move.destination.wait_status("postcopy-paused")
    move.resume(link=1)
    move.destination.wait_said(HANDED_OVER)
    move.destination.wait_said(FENCED)
    finish(move, orders)


@case("cont-at-the-source-without-an-engine-changes-no-page")
def cont_orphan(lab):
    without_engine(lab, "cont")


@case("system-reset-at-the-source-without-an-engine-changes-no-page")
def reset_orphan(lab):
    without_engine(lab, "system_reset", "cont")


@case("stop-that-hangs-at-the-source-does-not-keep-an-engine-from-following")
def stop_hangs(lab):
    """QEMU's monitor does not answer before the fence is lifted, and the engine that lifts it must not wait for it."""
    move = start_midway(lab)
    move.source.kill()
    orders = order(move, "cont", "stop", "cont", "stop")
    answered = sum(1 for _ in range(orders) if move.source_vm.qmp.answer(1))
    move.source.resume()
    move.source.wait_status("postcopy-paused")
    move.destination.wait_status("postcopy-paused")
    move.resume(link=1)
    finish(move, orders - answered)


@case("system-reset-at-the-source-in-mid-postcopy-changes-no-page")
def system_reset(lab):
    move = start_midway(lab)
    reset_instead_of_end(move)
    orders = order(move, "system_reset", "cont")
    expect_both_said(move, FENCED)
    move.expect_midway()
    finish(move, orders)


@case("cont-at-the-source-after-completion-is-undone")
def cont_late(lab):
    """Its memory matters to nobody any more, but it must not run on both sides."""
    move = start_midway(lab)
    move.full_speed()
    move.wait_completed()
    move.source_vm.qmp.command("cont")
    move.source.wait_said("the destination reads nothing there any more")
    wait_for("the source's guest is stopped", LONG, lambda: move.source_vm.status() == "paused")
    move.expect_guest_sound()


# Failures before the hand-over, with a disk image that only one side may have open for writing


def with_image(lab):
    path = lab.path("disk.raw")
    with open(path, "wb") as image:
        image.truncate(16 << 20)
    spec = GuestSpec(image=path)
    return Move(lab, spec=spec, settings=("auto-recover=off", "heartbeat-timeout=4000"), program="killable-postroad")


class Locked:
    """An image that another program has open and wants nobody to write: QEMU's lock for that."""

    NOBODY_WRITES = 201  # the byte of the file that QEMU locks for it

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        self.fd = os.open(self.path, os.O_RDONLY)
        lock = struct.pack("hhqqi", fcntl.F_RDLCK, os.SEEK_SET, self.NOBODY_WRITES, 1, 0)
        fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, lock)

    def __exit__(self, *_):
        os.close(self.fd)


@case("image-that-is-locked-keeps-the-source-trying-until-it-runs")
def locked(lab):
    move = with_image(lab)
    move.source.restart_to_freeze("source-state-sent")
    move.start()
    move.source.wait_frozen()
    with Locked(move.source_vm.spec.image):
        move.destination.kill()
        move.source.thaw()
        move.source.wait_said("the guest does not run on here yet")
        move.source.wait_said("lock")
        expect(move.source.status() == "failing", f"the source is {move.source.status()}")
        expect("does not run on here yet" in move.source.hmp("info migrate"), "the operator does not see it")
    move.source.wait_status("failed")
    move.expect_source_runs()


def runs(vm):
    """A QEMU whose load has come to nothing may have ended, or be about to."""
    try:
        return vm.status() == "running"
    except (Failure, OSError):
        wait_for(f"{vm.name}, which does not answer, has ended", LONG, lambda: not vm.process.alive())
        return False


def source_runs_again(move):
    wait_for("the source has undone it", LONG, lambda: move.source.status() in ("failed", "cancelled"))
    move.expect_source_runs()
    expect(not runs(move.destination_vm), "the guest runs at the destination, too")


def cut_at(lab, point):
    move = with_image(lab)
    move.source.restart_to_freeze(point)
    move.start()
    move.source.wait_frozen()
    move.network.link_down(1)
    move.source.thaw()
    source_runs_again(move)


def killed_at(lab, point):
    move = with_image(lab)
    move.destination.restart_to_be_killed(point)
    move.start()
    move.destination.note_killed()
    source_runs_again(move)


# What the destination is once it goes on. When it has loaded, it may go on with that before it hears that the source is gone.
THAWED = {
    "destination-listening": ("failed",),
    "destination-loaded": ("failed", "postcopy-paused"),
    "destination-loaded-noted": ("failed", "postcopy-paused"),
}


def frozen_at(lab, point):
    """The destination goes on when the source has long taken its guest back."""
    move = with_image(lab)
    move.destination.restart_to_freeze(point)
    move.start()
    move.destination.wait_frozen()
    source_runs_again(move)
    move.destination.thaw()
    ends = THAWED[point]
    wait_for(f"the destination is {ends}", LONG, lambda: move.destination.status() in ends)
    source_runs_again(move)


for _point in ("source-stopped", "source-state-sent"):
    case(f"path-cut-at-{_point}-with-an-image-and-the-source-runs-on")(lambda lab, point=_point: cut_at(lab, point))
for _point in ("destination-listening", "destination-loaded", "destination-loaded-noted"):
    case(f"engine-killed-at-{_point}-with-an-image-and-the-source-runs-on")(
        lambda lab, point=_point: killed_at(lab, point)
    )
for _point in ("destination-listening", "destination-loaded", "destination-loaded-noted"):
    case(f"engine-frozen-at-{_point}-with-an-image-and-the-source-runs-on")(
        lambda lab, point=_point: frozen_at(lab, point)
    )
