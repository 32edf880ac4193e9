# SPDX-License-Identifier: GPL-2.0-or-later
"""Engines that stand still for a while: they are stopped by a signal, or nobody reads their log."""

import contextlib
import fcntl
import itertools
import os
import struct
import time

from harness.case import case
from harness.light import Frozen, LightMove
from harness.process import LONG, expect, wait_for

FREEZE_SECONDS = 10
CALM_ATTEMPTS = 10  # on a busy machine some migrations have an engine that got no CPU for a second
F_SETPIPE_SZ = 1031
# Bytes a second, and us that a thread of a guest rests after 16 pages: 64 MiB travel for more than
# a minute.
SLOW, PACE = "512K", "200000"


def pairs_midway(lab):
    """Starts a pair for each transport, side and kind of recovery, and waits for postcopy. Returns
    a list of (engine to be frozen, pair, whether it recovers by itself)."""
    pairs = []
    for scheme, side, auto in itertools.product(("ofi", "tcp"), ("source", "destination"), ("on", "off")):
        move = LightMove(
            lab,
            scheme=scheme,
            settings=(f"auto-recover={auto}",),
            port=4444 + len(pairs),
            name=f"-{scheme}-{side}-{auto}",
            pace=PACE,
        )
        move.slow_down(SLOW)
        pairs.append((getattr(move, side), move, auto == "on"))
    # All at once, because the guests' faults bring in pages as well.
    for _, move, _ in pairs:
        move.start()
    for _, move, _ in pairs:
        move.wait_midway(fraction=0.99)
    return pairs


def losses(engine):
    """Counts how often an engine has lost a path that was in use."""
    states = engine.statuses()
    return sum(1 for a, b in zip(states, states[1:]) if (a, b) == ("postcopy-active", "postcopy-paused"))


@case("engines-that-were-stopped-for-10-s-go-on", heavy=True)
def freeze(lab):
    pairs = pairs_midway(lab)
    began = time.monotonic()
    for _, move, _ in pairs:
        move.expect_midway()
    with contextlib.ExitStack() as frozen:
        for engine, _, _ in pairs:
            frozen.enter_context(Frozen(engine))
        for engine, move, _ in pairs:
            other = move.destination if engine is move.source else move.source
            wait_for(f"{other.name} notices", LONG, lambda e=other: e.status() != "postcopy-active")
        wait_for(
            f"{FREEZE_SECONDS} s have passed", LONG, lambda: time.monotonic() > began + FREEZE_SECONDS
        )
    for _, move, auto in pairs:
        if not auto:
            move.wait_paused()
            move.resume(link=2)
    for engine, move, _ in pairs:
        wait_for(
            f"{engine.name} goes on after it was frozen",
            LONG,
            lambda m=move: all(e.status() in ("postcopy-active", "completed") for e in m.engines),
        )
        move.full_speed()
    for engine, move, _ in pairs:
        move.wait_completed()
        for either in move.engines:
            expect(losses(either) <= 2, f"{either.name} paused over and over: {either.statuses()}")
        expect(move.destination.query()["postroad"]["faults"] > 0, "the guest did not fault: the test proves nothing")
        said = engine.process.output()
        expect("this engine stood still for" in said, f"{engine.name} does not say that it stood still: {said}")
        move.expect_guest_sound()


def move_with_full_log(lab, side, wrapper):
    """A whole migration with a recovery, while the log of one engine accepts no output."""
    move = LightMove(lab, wrappers=[wrapper if side == s else () for s in ("source", "destination")])
    move.start_midway(fraction=0.95)
    wait_for("link2 stands by", LONG, lambda: any(path["state"] == "standby" for path in move.source.paths()))
    move.network.link_down(1)
    move.wait_recovered()
    move.expect_midway()
    move.finish()
    return move


def log_into_a_full_pipe(lab, side):
    """The log is a pipe that is full, and that nobody reads before the migration has completed."""
    fifo = lab.path("log.fifo")
    os.mkfifo(fifo)
    pipe = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    try:
        fcntl.fcntl(pipe, F_SETPIPE_SZ, 4096)
        with contextlib.suppress(BlockingIOError):
            while os.write(pipe, b"."):
                pass
        move = move_with_full_log(lab, side, ("sh", "-c", f'exec "$@" 2>{fifo}', "sh"))
        got = bytearray()

        def log_is_complete():
            with contextlib.suppress(BlockingIOError):
                got.extend(os.read(pipe, 65536))
            return b"-> completed" in got

        wait_for(f"the log of the {side} comes when the pipe is read", LONG, log_is_complete)
        expect(b"postcopy-active -> postcopy-paused" in got, f"lines are missing: {got.decode()}")
        # As the engine ends nobody reads the pipe, and that does not delay it.
        with contextlib.suppress(BlockingIOError):
            while os.write(pipe, b"."):
                pass
        engine = getattr(move, side).process
        engine.popen.terminate()
        engine.wait()
    finally:
        os.close(pipe)


@case("log-into-a-pipe-that-nobody-reads-holds-up-no-source", light=True)
def full_pipe_source(lab):
    log_into_a_full_pipe(lab, "source")


@case("log-into-a-pipe-that-nobody-reads-holds-up-no-destination", light=True)
def full_pipe_destination(lab):
    log_into_a_full_pipe(lab, "destination")


@case("log-on-a-full-disk-holds-up-nobody-and-what-is-missing-is-said", light=True)
def full_disk(lab):
    disk = lab.path("disk")
    os.mkdir(disk)
    fill = f"mount -t tmpfs -o size=64k none {disk} && (cat /dev/zero >{disk}/rest 2>/dev/null; true)"
    wrapper = ("unshare", "--mount", "sh", "-c", f'{fill} && exec "$@" 2>>{disk}/log', "sh")
    move = move_with_full_log(lab, "source", wrapper)
    inside = f"/proc/{move.source.process.pid}/root{disk}"
    with open(f"{inside}/log") as log:
        expect(not log.read(), "the disk was not full: the test proves nothing")
    os.unlink(f"{inside}/rest")
    # The mount is gone with the engine, unless the file is open.
    with open(f"{inside}/log") as log:
        move.source.hmp("quit")
        move.source.process.wait()
        said = log.read()
    expect("lines of the log are missing here" in said, f"the log does not say what is missing: {said!r}")
    expect("No space left on device" in said, f"the log does not say why: {said!r}")


def guest_does_not_answer(lab, side):
    """The engine says what it waits for while it waits. Its monitor answers all the time."""
    move = LightMove(lab, settings=("guest-timeout=60000",))
    engine = getattr(move, side)
    word = 'thread "migration": preparing the guest for' if side == "source" else 'thread "load": preparing the guest'
    with Frozen(getattr(move, f"{side}_guest")):
        began = time.monotonic()
        move.start()
        wait_for(f"{engine.name} says what it waits for", LONG, lambda: word in engine.process.output())
        took = time.monotonic() - began
        expect(took >= 1, f"it was said after {took:.1f} s, too soon to be a stall")
        expect(engine.query()["postroad"]["stalls"] >= 1, f"it is not counted: {engine.query()['postroad']}")
        wait_for("info migrate shows it", LONG, lambda: "preparing the guest" in engine.hmp("info migrate"))
    wait_for("it says that it goes on", LONG, lambda: "goes on after" in engine.process.output())
    move.wait_completed()
    move.expect_guest_sound()


@case("guest-that-does-not-answer-is-named-at-the-source", light=True)
def mute_guest_source(lab):
    guest_does_not_answer(lab, "source")


@case("guest-that-does-not-answer-is-named-at-the-destination", light=True)
def mute_guest_destination(lab):
    guest_does_not_answer(lab, "destination")


@case("watchdog-says-nothing-in-a-healthy-migration-with-a-recovery", alone=True)
def healthy(lab):
    """Engines that get no CPU for a second say so. Such an attempt does not count."""
    for attempt in range(CALM_ATTEMPTS):
        move = LightMove(lab, port=4444 + attempt, name=f"-{attempt}")
        move.start_midway(fraction=0.95)
        move.network.link_down(1)
        move.wait_recovered()
        move.finish()
        move.network.link_up(1)
        if not any("stood still" in engine.process.output() for engine in move.engines):
            break
    for engine in move.engines:
        extras = engine.query()["postroad"]
        expect(extras["stalls"] == 0, f"{engine.name}: {extras.get('last-stall')}")
        expect("stood still" not in engine.process.output(), f"{engine.name}: {engine.process.output()}")


YEAR = 365 * 24 * 3600


@case("wall-clock-that-jumps-pauses-nobody", light=True)
def clock_jumps(lab):
    """The wall clocks of both engines jump by years, forth and back. No timer depends on them."""
    clock = lab.path("clock")

    def jump(seconds):
        with open(clock, "r+b" if os.path.exists(clock) else "wb") as file:
            file.write(struct.pack("=q", seconds))

    jump(0)
    shim = ("env", f"LD_PRELOAD={lab.build_file('libclock-shim.so')}", f"CLOCK_SHIM={clock}")
    move = LightMove(lab, wrappers=(shim, shim))
    move.start_midway(fraction=0.97)
    for seconds in (3600, -3600, 20 * YEAR, -10 * YEAR, 20 * YEAR):
        jump(seconds)
        left = move.expect_midway()
        wait_for("pages still come in", LONG, lambda before=left: move.destination.remaining() < before)
    move.expect_midway()
    move.full_speed()
    move.wait_completed()
    for engine in move.engines:
        expect(losses(engine) == 0, f"{engine.name} has paused: {engine.statuses()}")
        total = engine.query()["total-time"]
        expect(total < 600000, f"{engine.name} says that it took {total} ms")
        last = next(line for line in engine.process.output().splitlines() if "-> completed" in line)
        expect(int(last[:4]) >= time.localtime().tm_year + 19, f"the clock did not jump: the test proves nothing: {last}")
    move.expect_guest_sound()
