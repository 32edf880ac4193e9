# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest runs on one side. Whatever commands the source's QEMU gets after the hand-over, the
destination's memory stays right, and both engines report it. After a failure before the hand-over
the source's guest runs on, however long that takes."""

import contextlib
import fcntl
import os
import struct

from harness.case import case
from harness.lab import Move
from harness.process import LONG, Failure, expect, wait_for
from harness.vm import GuestSpec

# What the watch says of a guest that runs: it has seen the event, or was just about to begin.
LET_RUN = ("event RESUME", "QEMU lets the guest run already")
HANDED_OVER = "the guest at the source, which was handed over"
FENCED = "its RAM is write-protected: what the destination reads has not changed"


def start_midway(lab, bandwidth="1M", settings=(), **kind):
    """Waits for postcopy with the source's RAM fenced. Most of the pages are still missing."""
    move = Move(lab, settings=("auto-recover=off", *settings), **kind)
    move.start_midway(bandwidth, fraction=0.98)
    wait_for("the source's RAM is fenced", LONG, lambda: "is write-protected, which took" in move.source.process.output())
    return move


def expect_both_said(move, *words):
    for words in (HANDED_OVER, *words):
        for engine in move.engines:
            engine.wait_said(words)


def send_commands(move, *commands):
    """Sends commands to the source's QEMU, and returns how many. It may not answer before the
    fence is lifted."""
    for command in commands:
        move.source_vm.qmp.send(command)
    return len(commands)


def reset_instead_of_end(move):
    """Has the source's QEMU reset its guest. The tests' QEMUs have -no-reboot, which would end
    it."""
    move.source_vm.qmp.command("set-action", reboot="reset")


def read_answers(move, count):
    """Reads the answers of the source's QEMU to that many commands."""
    for _ in range(count):
        expect(move.source_vm.qmp.answer(LONG), "the source's QEMU does not answer after the fence was lifted")


def finish(move, sent):
    move.full_speed()
    move.wait_completed()
    read_answers(move, sent)
    wait_for("the source's guest is stopped", LONG, lambda: move.source_vm.status() != "running")
    move.source_vm.quit()
    move.destination_vm.console.wait_verified(move.destination_vm.spec)
    move.destination_vm.console.expect_sound()



@case("cont-at-the-source-in-mid-postcopy-changes-no-page")
def cont(lab):
    move = start_midway(lab)
    sent = send_commands(move, "cont")
    expect_both_said(move, LET_RUN, FENCED)
    move.expect_midway()
    finish(move, sent)


@case("cont-again-and-again-at-the-source-while-the-path-is-cut-changes-no-page")
def cont_cut(lab):
    """The destination is informed when it is connected again."""
    move = start_midway(lab)
    move.network.link_down(1)
    move.wait_paused()
    sent = send_commands(move, *["cont"] * 20)
    move.source.wait_said(LET_RUN)
    move.resume(link=2)
    expect_both_said(move, LET_RUN, FENCED)
    finish(move, sent)


def run_unwatched(move):
    """Waits for the time in which the source's guest would write all its pages, if it could."""
    console, spec = move.source_vm.console, move.source_vm.spec
    first = console.last()
    with contextlib.suppress(Failure):
        wait_for("the source's guest visits all its pages", 6, lambda: spec.went_round(first, console.last()))


def without_engine(lab, *commands):
    """The write protection holds the guest's writes while there is no engine. The next engine
    finds a QEMU that does not answer, or whose guest runs, and stops it when it can."""
    move = start_midway(lab)
    move.source.kill()
    # QEMU may not answer the next engine.
    move.source.argv = [*move.source.argv, "--set", "guest-timeout=2000"]
    if "system_reset" in commands:
        reset_instead_of_end(move)
    sent = send_commands(move, *commands)
    run_unwatched(move)
    move.source.resume()
    wait_for("the next engine says so", LONG, lambda: HANDED_OVER in move.source.query()["postroad"]["reason"])
    move.destination.wait_status("postcopy-paused")
    move.resume(link=1)
    move.destination.wait_said(HANDED_OVER)
    move.destination.wait_said(FENCED)
    finish(move, sent)


@case("cont-at-the-source-without-an-engine-changes-no-page")
def cont_orphan(lab):
    without_engine(lab, "cont")


@case("system-reset-at-the-source-without-an-engine-changes-no-page")
def reset_orphan(lab):
    without_engine(lab, "system_reset", "cont")


@case("stop-that-hangs-at-the-source-does-not-keep-an-engine-from-following")
def stop_hangs(lab):
    """QEMU's monitor does not answer before the fence is lifted. The engine that lifts it must not
    wait for the answer."""
    move = start_midway(lab)
    move.source.kill()
    sent = send_commands(move, "cont", "stop", "cont", "stop")
    answered = sum(1 for _ in range(sent) if move.source_vm.qmp.answer(1))
    move.source.resume()
    move.source.wait_status("postcopy-paused")
    move.destination.wait_status("postcopy-paused")
    move.resume(link=1)
    finish(move, sent - answered)


@case("system-reset-at-the-source-in-mid-postcopy-changes-no-page")
def system_reset(lab):
    move = start_midway(lab)
    reset_instead_of_end(move)
    sent = send_commands(move, "system_reset", "cont")
    expect_both_said(move, FENCED)
    move.expect_midway()
    finish(move, sent)


@case("cont-at-the-source-after-completion-is-undone")
def cont_late(lab):
    """The destination does not need its memory any more. But the guest must not run on both
    sides."""
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
    """Has a lock on an image that keeps QEMU from writing it, as another program might."""

    NOBODY_WRITES = 201  # QEMU's lock against writers is on this byte of the file

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
        expect("does not run on here yet" in move.source.hmp("info migrate"), "info migrate does not show it")
    move.source.wait_status("failed")
    move.expect_source_runs()


def runs(vm):
    """Whether its guest runs. A QEMU whose load has failed may have ended, or be about to end."""
    try:
        return vm.status() == "running"
    except (Failure, OSError):
        wait_for(f"{vm.name}, which does not answer, has ended", LONG, lambda: not vm.process.alive())
        return False


def source_runs_again(move):
    wait_for("the source has given up the migration", LONG, lambda: move.source.status() in ("failed", "cancelled"))
    move.expect_source_runs()
    expect(not runs(move.destination_vm), "the guest runs at the destination as well")


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


# The states of the destination after it goes on, for each crash point. When it has loaded the
# state, it may go on with that before it notices that the source is gone.
THAWED = {
    "destination-listening": ("failed",),
    "destination-loaded": ("failed", "postcopy-paused"),
    "destination-loaded-noted": ("failed", "postcopy-paused"),
}


def frozen_at(lab, point):
    """The destination goes on long after the source has resumed its guest."""
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
