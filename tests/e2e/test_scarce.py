# SPDX-License-Identifier: GPL-2.0-or-later
"""Engines that run out of descriptors, memory or threads. Before the hand-over the migration fails
with a reason, after it the migration pauses."""

import contextlib
import os
import re
import resource

from harness.case import case
from harness.light import LightMove, TestGuest
from harness.process import LONG, Failure, expect, wait_for
from harness.qmp import Qmp, QmpError
from harness.threads import Threads, thread_names, wait_warm

MIB = 1 << 20
SETTLED_FILES = 4  # descriptors that an engine opens in its first migration and keeps
# A peer that can't answer is soon given up.
IMPATIENT = ("handshake-timeout=2000", "connect-timeout=2000")


def open_files(engine):
    return len(os.listdir(f"/proc/{engine.process.pid}/fd"))


def address_space(engine):
    with open(f"/proc/{engine.process.pid}/statm") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()


@contextlib.contextmanager
def limited(engine, what, value):
    before = resource.prlimit(engine.process.pid, what)
    resource.prlimit(engine.process.pid, what, (value, before[1]))
    try:
        yield
    finally:
        if engine.process.alive():
            resource.prlimit(engine.process.pid, what, before)


def attempt(move, limit):
    """Tries one migration. Returns whether it has completed. If it has not, there must be a
    reason, and the guest is at the source."""
    try:
        move.source.qmp.command("migrate", uri=move.uri(link=1))
    except QmpError as refusal:
        expect("raise the engine's limits" in str(refusal), f"with {limit} it is refused: {refusal}")
        return False
    info = wait_for(
        f"the migration ends, with {limit}",
        LONG,
        lambda: next((i for i in [move.source.query()] if i["status"] in ("completed", "failed")), None),
    )
    for engine in move.engines:
        expect(engine.process.alive(), f"{engine.name} did not survive {limit}: {engine.process.output()[-600:]}")
    if info["status"] == "completed":
        return True
    expect(info.get("error-desc"), f"no reason is given, with {limit}")
    wait_for(
        f"the destination is ready for another try, with {limit}",
        LONG,
        lambda: move.destination.status() in ("none", "failed", "cancelled"),
    )
    return False


def wait_runs(move, limit):
    """Waits until the source's guest runs. It prints a line a second, and may have been stopped
    for a moment."""
    wait_for(f"the source's guest runs, with {limit}", LONG, lambda: move.source_guest.lines()[-1][0] == "running")


def walk(lab, scheme, side, what, values, tls=False):
    """Tries one limit after the other, until one is high enough."""
    move = LightMove(lab, scheme=scheme, size="16M", settings=IMPATIENT, tls=tls)
    engine = getattr(move, side)
    before = [open_files(e) for e in move.engines]
    refused = 0
    for value, name in values(engine):
        with limited(engine, what, value):
            worked = attempt(move, name)
        if worked:
            break
        refused += 1
        wait_runs(move, name)
        wait_for(
            "what was opened for nothing is closed again",
            LONG,
            lambda: all(open_files(e) <= n + SETTLED_FILES for e, n in zip(move.engines, before)),
        )
    else:
        expect(False, "no limit was high enough")
    expect(refused, f"the lowest limit was enough: {name}")
    move.wait_completed()
    move.expect_guest_sound()


def files(engine):
    before = open_files(engine)
    return ((before + more, f"room for {more} descriptors at the {engine.name}") for more in range(100))


def memory(engine):
    before = address_space(engine)
    steps = (1, 2, 4, 6, 8, 10, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 128, 192, 256, 384, 512)
    return ((before + more * MIB, f"room for {more} MiB at the {engine.name}") for more in steps)


for _side in ("source", "destination"):
    for _over in ("ofi", "tcp", "tls"):
        case(f"too-few-descriptors-at-the-{_side}-are-refused-in-words-over-{_over}")(
            lambda lab, side=_side, over=_over: walk(
                lab, "ofi" if over == "ofi" else "tcp", side, resource.RLIMIT_NOFILE, files, tls=over == "tls"
            )
        )
    case(f"too-little-memory-at-the-{_side}-is-refused-in-words")(
        lambda lab, side=_side: walk(lab, "ofi", side, resource.RLIMIT_AS, memory)
    )


def serves(lab, engine, path):
    """Whether a new engine serves its monitor. If it does not, it has ended."""
    wait_for("the engine serves or ends", LONG, lambda: os.path.exists(path) or not engine.alive())
    if not engine.alive():
        return False
    try:
        monitor = Qmp(path)
    except Failure:  # the engine may lack something after it has created its socket
        engine.wait()
        return False
    monitor.command("quit")
    engine.wait()
    return True


@case("too-few-descriptors-to-start-are-refused-in-words")
def few_files_at_start(lab):
    host = lab.network.source
    guest = TestGuest(lab, host, "guest", "16M")
    guest.wait_running()
    for limit in range(4, 100):
        path = lab.path(f"limit-{limit}.qmp")
        argv = ["prlimit", f"--nofile={limit}", lab.engine_file(), "--guest", guest.option(), "--qmp", path]
        engine = lab.start(f"limit-{limit}", host.command(argv))
        if serves(lab, engine, path):
            break
        said = engine.output()
        expect(engine.exit_code() in (1, 127), f"with {limit} descriptors it ended with {engine.exit_code()}: {said}")
        expect("open" in said, f"with {limit} descriptors it said: {said}")
    expect(limit > 10, f"{limit} descriptors were enough: the test proves nothing")
    guest.wait_goes_on()
    guest.expect_sound()


@contextlib.contextmanager
def recovery_with(lab, side, what, now):
    """A migration that loses its path while an engine is limited to what it has now. When the
    limit is gone, it recovers."""
    move = LightMove(lab, settings=("standby-paths=off", *IMPATIENT))
    engine = getattr(move, side)
    move.start_midway("1M", fraction=0.9)
    with limited(engine, what, now(engine)):
        move.network.link_down(1)
        yield move
    move.wait_recovered()
    move.finish()


def attempts(move):
    return move.source.statuses().count("postcopy-recover-setup")


def recovery_lacks_files(lab, side):
    """Recoveries fail, and go back to paused, until the engine has descriptors again."""
    with recovery_with(lab, side, resource.RLIMIT_NOFILE, lambda engine: open_files(engine) - 8) as move:
        wait_for("several recoveries have failed", LONG, lambda: attempts(move) >= 4)
        move.expect_midway()
        states = {e.name: e.status() for e in move.engines}
        expect("completed" not in states.values(), f"it went on without descriptors: {states}")
        expect(move.source.query()["postroad"]["recoveries"] == 0, "it recovered without descriptors")


def recovery_with_no_more_memory(lab, side):
    """The memory that the threads of the lost path have freed may be enough for the next path. If
    not, the recovery fails, and the engine lives on."""
    with recovery_with(lab, side, resource.RLIMIT_AS, lambda engine: address_space(engine) - 64 * MIB) as move:
        wait_for(
            "a recovery works, or several have failed",
            LONG,
            lambda: attempts(move) >= 4 or move.source.query()["postroad"]["recoveries"],
        )
        move.expect_midway()


for _side in ("source", "destination"):
    case(f"recovery-without-descriptors-at-the-{_side}-stays-paused-until-there-are-some")(
        lambda lab, side=_side: recovery_lacks_files(lab, side)
    )


@case("recovery-with-no-more-memory-at-the-source-is-survived")
def recovery_memory_source(lab):
    recovery_with_no_more_memory(lab, "source")


@case("recovery-with-no-more-memory-at-the-destination-is-survived")
def recovery_memory_destination(lab):
    recovery_with_no_more_memory(lab, "destination")


def lacked_threads(engine):
    return set(re.findall(r'no thread "(\S+)"', engine.process.output()))


def threads_walk(lab, side, wanted):
    """Allows one more thread in each try, until there are enough."""
    threads = Threads(lab, side)
    wrappers = {"source": (threads.wrapper, ()), "destination": ((), threads.wrapper)}[side]
    move = LightMove(lab, size="16M", settings=(*IMPATIENT, "verify=on"), wrappers=wrappers)
    engine = getattr(move, side)
    wait_warm(engine)
    before = len(thread_names(engine))
    for n in range(100):
        wait_for("the threads of the last try have ended", LONG, lambda: len(thread_names(engine)) <= before)
        threads.allow(n)
        if attempt(move, f"room for {n} threads at the {side}"):
            break
        threads.allow_all()
        wait_runs(move, f"{n} threads")
    lacked = lacked_threads(engine)
    expect(lacked >= wanted, f"it never lacked the threads {wanted - lacked}, only {lacked}")
    move.wait_completed()
    move.expect_guest_sound()


@case("too-few-threads-at-the-source-are-refused-in-words")
def few_threads_source(lab):
    threads_walk(lab, "source", {"migration", "control"})


@case("too-few-threads-at-the-destination-are-refused-in-words")
def few_threads_destination(lab):
    threads_walk(lab, "destination", {"verify", "fault", "pull"})


def resume_with_more_and_more_threads(lab, engine, threads):
    """Starts the engine with one more thread each time, until it serves. Returns the names of the
    threads that it has lacked."""
    for n in range(100):
        threads.allow(n)
        engine.restart("--resume")
        if serves(lab, engine.process, engine.qmp_path):
            break
        said = engine.process.output().splitlines()[-1]
        expect(engine.process.exit_code() == 1, f"with {n} threads it ended with {engine.process.exit_code()}: {said}")
        expect("thread" in said, f"with {n} threads it said: {said}")
        engine.process.name = f"lacking-{engine.name}"  # its exit code is no failure
    return lacked_threads(engine)


def resume_lacks_threads(lab, side):
    """An engine that lacks threads ends with a reason, and the next one can continue."""
    threads = Threads(lab, side)
    wrappers = {"source": (threads.wrapper, ()), "destination": ((), threads.wrapper)}[side]
    move = LightMove(lab, settings=("auto-recover=off", "standby-paths=off", "verify=on"), wrappers=wrappers)
    engine = getattr(move, side)
    move.slow_down("1M")
    move.start()
    move.wait_midway(fraction=0.9)
    engine.kill()
    os.unlink(engine.qmp_path)
    wanted = {"source": {"migration"}, "destination": {"load", "verify", "fault", "pull"}}[side]
    lacked = set()
    for _ in range(3):  # a thread that ends early makes room for another, which is not lacked then
        lacked |= resume_with_more_and_more_threads(lab, engine, threads)
        if lacked >= wanted:
            break
    threads.allow_all()
    engine.resume()
    expect(lacked >= wanted, f"it never lacked the threads {wanted - lacked}, only {lacked}")
    move.wait_paused()
    move.resume(link=1)
    move.full_speed()
    move.wait_completed()
    move.expect_guest_sound()


@case("resume-without-threads-at-the-source-fails-in-words")
def resume_threads_source(lab):
    resume_lacks_threads(lab, "source")


@case("resume-without-threads-at-the-destination-fails-in-words")
def resume_threads_destination(lab):
    resume_lacks_threads(lab, "destination")
