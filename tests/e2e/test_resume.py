# SPDX-License-Identifier: GPL-2.0-or-later
"""Engines that die, and those that follow them."""

from harness.case import case
from harness.lab import Move
from harness.process import expect, wait_for
from harness.twins import Twins


def kill_and_recover(lab, scheme, *sides):
    """The engines of these sides die in mid-pull, and others take their place."""
    twins = Twins(lab, scheme=scheme)
    twins.start_midway()
    victims = [getattr(twins, side) for side in sides]
    for engine in victims:
        engine.kill()
    for engine in victims:
        engine.resume()
        engine.wait_status("postcopy-paused")
    twins.expect_midway()
    twins.recover()
    twins.finish()


for _scheme in ("tcp", "ofi"):
    for _sides in (("destination",), ("source",), ("source", "destination")):
        _name = "both-engines" if len(_sides) == 2 else f"the-{_sides[0]}-engine"
        case(f"killed-in-mid-pull-{_name}-over-{_scheme}")(
            lambda lab, scheme=_scheme, sides=_sides: kill_and_recover(lab, scheme, *sides)
        )


# With a QEMU


def move_midway(lab, scheme="ofi"):
    move = Move(lab, scheme=scheme, settings=("auto-recover=off",))
    move.slow_down()
    move.start()
    move.wait_midway()
    return move


def kill_and_recover_qemu(lab, *sides):
    move = move_midway(lab)
    victims = [getattr(move, side) for side in sides]
    for engine in victims:
        engine.kill()
    for engine in victims:
        engine.resume()
    move.wait_paused()
    move.finish_over(link=1)


@case("killed-beside-a-destination-qemu")
def qemu_destination(lab):
    kill_and_recover_qemu(lab, "destination")


@case("killed-beside-a-source-qemu")
def qemu_source(lab):
    kill_and_recover_qemu(lab, "source")


@case("killed-beside-both-qemus")
def qemu_both(lab):
    kill_and_recover_qemu(lab, "source", "destination")


@case("killed-while-the-main-loop-of-qemu-is-stuck")
def qemu_stuck(lab):
    """QEMU's monitor does not answer before a page has come, and the page comes by the new engine only: that one must
    not wait for QEMU's monitor."""
    move = move_midway(lab)
    move.destination.kill()
    qemu = move.destination_vm
    qemu.qmp.send("pmemsave", val=0, size=qemu.spec.ram_mb << 20, filename=lab.path("memory"))
    answer = qemu.qmp.answer(1)
    expect(answer is None, f"QEMU's monitor was to hang on a missing page, but answers {answer}")
    move.destination.restart("--resume")
    move.destination.connect()
    move.wait_paused(seconds=5)
    answer = qemu.qmp.answer(1)
    expect(answer is None, f"QEMU's monitor was to hang still, but answers {answer}")
    move.resume(link=1)
    move.full_speed()
    answer = qemu.qmp.answer(30)
    expect(answer and "return" in answer, f"after the recovery QEMU's monitor answers {answer}")
    move.wait_completed()
    move.expect_guest_sound()


def qemu_runs_on(lab, kill_at):
    """The source engine dies when it has stopped its QEMU, and has not let it go."""
    move = Move(lab, settings=("auto-recover=off",), program="killable-postroad")
    move.source.process.stop()
    move.source.restart(kill_at=kill_at)
    move.source.connect()
    move.start()
    move.source.note_killed()
    expect(move.source_vm.status() != "running", "the guest was to be stopped when the engine died")
    move.source.resume()
    expect("it runs on here" in move.source.process.output(), "the engine does not say what happened")
    move.expect_source_runs()
    if move.destination.status() == "postcopy-paused":
        move.destination.hmp("migrate_cancel")


@case("killed-when-qemu-is-stopped-and-it-runs-on")
def qemu_stopped(lab):
    qemu_runs_on(lab, "source-ram-told")


@case("killed-when-qemu-is-saved-and-it-runs-on")
def qemu_saved(lab):
    qemu_runs_on(lab, "source-loaded")
