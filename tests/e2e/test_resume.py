# SPDX-License-Identifier: GPL-2.0-or-later
"""Engines that die, and the engines that are started after them."""

import os
import shutil

from harness.case import case
from harness.lab import Move
from harness.process import LONG, expect, wait_for
from harness.twins import Twins


def kill_and_recover(lab, scheme, *sides):
    """The engines of these sides die in mid-pull, and are started again."""
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
        case(f"killed-in-mid-pull-{_name}-over-{_scheme}", light=True)(
            lambda lab, scheme=_scheme, sides=_sides: kill_and_recover(lab, scheme, *sides)
        )


# With a QEMU


def move_midway(lab, scheme="ofi"):
    move = Move(lab, scheme=scheme, settings=("auto-recover=off",))
    move.start_midway()
    return move


@case("killed-beside-both-qemus")
def qemu_both(lab):
    move = move_midway(lab)
    for engine in move.engines:
        engine.kill()
    for engine in move.engines:
        engine.resume()
    move.wait_paused()
    move.finish_over(link=1)


@case("killed-while-the-main-loop-of-qemu-is-stuck")
def qemu_stuck(lab):
    """QEMU's monitor does not answer before a page has come. Only the new engine can bring it in,
    so it must not wait for QEMU's monitor."""
    move = move_midway(lab)
    move.destination.kill()
    qemu = move.destination_vm
    qemu.qmp.send("pmemsave", val=0, size=qemu.spec.ram_mb << 20, filename=lab.path("memory"))
    answer = qemu.qmp.answer(1)
    expect(answer is None, f"QEMU's monitor was to hang on a missing page, but answers {answer}")
    move.destination.restart("--resume")
    move.destination.connect()
    move.wait_paused()
    answer = qemu.qmp.answer(1)
    expect(answer is None, f"QEMU's monitor was to hang still, but answers {answer}")
    move.resume(link=1)
    move.full_speed()
    answer = qemu.qmp.answer(LONG)
    expect(answer and "return" in answer, f"after the recovery QEMU's monitor answers {answer}")
    move.wait_completed()
    move.expect_guest_sound()


@case("killed-when-the-source-qemu-is-stopped-and-it-runs-on")
def qemu_runs_on(lab):
    """The source's engine dies when it has stopped and saved its QEMU, and has not handed it
    over."""
    move = Move(lab, settings=("auto-recover=off",), program="killable-postroad")
    move.source.restart_to_be_killed("source-loaded")
    move.start()
    move.source.note_killed()
    expect(move.source_vm.status() != "running", "the guest was to be stopped when the engine died")
    move.source.resume()
    wait_for("the engine says what happened", LONG, lambda: "it runs on here" in move.source.process.output())
    move.expect_source_runs()


@case("killed-before-qemu-is-let-run-at-the-destination")
def qemu_not_started(lab):
    """The destination has seen RUN, so its next engine lets the guest run, whatever the source
    does. QEMU's monitor may not answer from then on, not even to `cont`: the guest waits for
    pages, perhaps with QEMU's lock held."""
    move = Move(lab, settings=("auto-recover=off",), program="killable-postroad")
    move.destination.restart_to_be_killed("destination-run-noted")
    move.start()
    move.destination.note_killed()
    expect(move.destination_vm.status() != "running", "the guest was to be stopped when the engine died")
    move.destination.resume()
    said = move.destination.process.output()
    asked = "can't be started" not in said or "no answer to 'cont'" in said
    expect(asked, f"the next engine did not let it run: {said[-500:]}")
    move.source.wait_status("postcopy-paused")
    move.finish_over(link=1)


# Guests that die


@case("qemu-that-dies-at-the-destination-is-told-on-both-sides")
def destination_qemu_dies(lab):
    """No recovery is possible, and none is tried endlessly."""
    move = Move(lab)
    move.slow_down()
    move.source.hmp(f"migrate -d {move.uri(link=1)},{move.uri(link=2)}")
    move.wait_midway()
    move.destination_vm.process.kill()
    for engine in move.engines:
        engine.wait_said("the guest is gone at the destination")
        engine.wait_status("postcopy-paused")
    expect("gone" in move.destination.query().get("error-desc", ""), "the destination does not show it")
    attempts = move.source.statuses().count("postcopy-recover-setup")
    move.resume(link=2)
    move.source.wait_said("there is nothing to resume")
    move.source.wait_status("postcopy-paused")
    tried = move.source.statuses().count("postcopy-recover-setup")
    expect(tried <= attempts + 1, f"the source has tried {tried} times")
    for engine in move.engines:
        engine.hmp("info migrate")


@case("qemu-that-dies-at-the-source-is-told-on-both-sides-and-not-missed")
def source_qemu_dies(lab):
    """Only its memory is needed, which its engine has mapped as well."""
    move = move_midway(lab)
    move.source_vm.process.kill()
    move.source.wait_said("its RAM is kept by this engine")
    move.destination.wait_said("the source's guest process is gone")
    move.network.link_down(1)
    move.wait_paused()
    move.resume(link=2)
    move.full_speed()
    move.wait_completed()
    move.destination_vm.console.wait_verified(move.destination_vm.spec)
    move.destination_vm.console.expect_sound()


# Starts that are refused, and records that are missing


def start_refused(twins, engine, *options):
    """Starts the engine again with these options. It must refuse and end. Returns what it
    prints."""
    before = len(engine.process.output())
    engine.restart(*options)
    code = engine.process.wait()
    expect(code == 1, f"{engine.name} ended with {code}")
    engine.process.name = f"refused-{engine.name}"
    return engine.process.output()[before:]


@case("resume-has-to-be-asked-for-on-both-sides", light=True)
def unasked(lab):
    twins = Twins(lab)
    twins.start_midway()
    for engine in twins.engines:
        engine.kill()
    for engine, words in (
        (twins.source, "belongs to the destination"),
        (twins.destination, "in the middle of its migration"),
    ):
        said = start_refused(twins, engine)
        for word in (words, "--resume"):
            expect(word in said, f"the refusal lacks {word!r}: {said}")
    expect(not twins.source_guest.running(), "the guest runs at the source")
    for engine in twins.engines:
        engine.resume()
    twins.recover()
    twins.finish()


@case("guest-whose-record-is-lost-is-not-taken-for-the-sources", light=True)
def lost_record(lab):
    """The write protection of its RAM shows that the guest was handed over."""
    twins = Twins(lab)
    twins.start_midway()
    twins.source.kill()
    state, away = lab.path(f"state-{twins.source.name}"), lab.path("away")
    os.rename(state, away)
    for options in ((), ("--resume",)):
        said = start_refused(twins, twins.source, *options)
        for word in ("write-protected", "--state-dir"):
            expect(word in said, f"the refusal lacks {word!r}: {said}")
    expect(not twins.source_guest.running(), "the guest runs at the source")
    shutil.rmtree(state, ignore_errors=True)
    os.rename(away, state)
    twins.source.resume()
    twins.recover()
    twins.finish()


@case("second-engine-beside-a-guest-that-is-served-is-refused-on-both-sides", light=True)
def second_engines(lab):
    twins = Twins(lab)
    twins.start_midway()
    for engine in twins.engines:
        for options in ((), ("--resume",)):
            other = lab.start("second-engine", engine.argv + list(options))
            expect(other.wait() == 1, f"a second engine beside {engine.name} ended with {other.exit_code()}")
            said = other.output()
            expect("another engine is attached" in said, f"the refusal does not say why: {said}")
    twins.finish()


@case("resume-of-nothing-begins-anew", light=True)
def nothing_to_resume(lab):
    """So --resume may be used at every start."""
    twins = Twins(lab)
    for engine in twins.engines:
        engine.process.stop()
        engine.resume()
        wait_for(f"{engine.name} says so", LONG, lambda e=engine: "nothing to resume" in e.process.output())
    twins.migrate()
    twins.finish()


@case("record-of-a-guest-that-is-gone-says-nothing-about-the-next-one", light=True)
def stale_record(lab):
    twins = Twins(lab)
    twins.start_midway()
    twins.source.kill()
    twins.source_guest.process.kill()
    twins.source_guest.start_again()
    twins.source.restart()
    twins.source.connect()
    wait_for("the engine says so", LONG, lambda: "is about a guest that is gone" in twins.source.process.output())
    expect(twins.source.status() == "none", f"the source is {twins.source.status()}")
    twins.source_guest.wait_working()
    twins.destination_guest.process.kill()  # it would wait for pages for ever


@case("killed-several-times-in-a-row", light=True)
def several_times(lab):
    twins = Twins(lab)
    twins.start_midway()
    for round_ in range(6):
        victims = (twins.source, twins.destination, twins.engines)[round_ % 3]
        for engine in victims if isinstance(victims, tuple) else (victims,):
            engine.kill()
            engine.resume()
        twins.recover()
        twins.expect_midway()
    twins.finish()


def start_over_both_links(lab):
    """Starts a migration with two listed paths. The engines may recover by themselves."""
    twins = Twins(lab, settings=())
    twins.source.qmp.command("migrate", uri=f"{twins.uri(1)},{twins.uri(2)}")
    twins.wait_active()
    return twins


@case("killed-engines-recover-by-themselves-over-the-listed-paths", light=True)
def by_themselves(lab):
    """Nobody asks for the recovery after an engine was started again."""
    twins = start_over_both_links(lab)
    for engine in (twins.destination, twins.source):
        engine.kill()
        engine.resume()
        wait_for(
            f"both sides go on after the death of {engine.name}",
            LONG,
            lambda: all(e.status() == "postcopy-active" for e in twins.engines),
        )
        twins.expect_midway()
    twins.finish()


@case("pause-by-hand-outlives-the-engines", light=True)
def held(lab):
    """Only the operator ends it. The engines do not recover by themselves, neither over another
    listed path nor after a new start."""
    twins = start_over_both_links(lab)
    twins.source.hmp("migrate_pause")
    twins.destination.wait_status("postcopy-paused")
    wait_for("the source has noted it", LONG, lambda: "held=true" in twins.record())
    for engine in twins.engines:
        engine.kill()
        engine.resume()
    expect(twins.source.status() == "postcopy-paused", f"the source is {twins.source.status()}")
    seen = twins.source.statuses() + twins.destination.statuses()
    expect("postcopy-recover" not in seen, f"an engine tried to recover by itself: {seen}")
    twins.finish()
