# SPDX-License-Identifier: GPL-2.0-or-later
"""Does what a plan says: each action is a context that is entered to do it and left to undo it."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

from harness.network import LINKS
from harness.process import Failure, die_with_parent, expect
from harness.qmp import QmpError

POSTCOPY = ("postcopy-active", "postcopy-paused", "postcopy-recover-setup", "postcopy-recover")


class Stage:
    """A running migration as the actions see it."""

    def __init__(self, cast, uris):
        self.cast = cast
        self.links = cast.links
        self.uris = uris
        self.held = False  # somebody has paused it by hand
        self.stopped = set()  # names of engines
        self.strangers = []
        self.refused_cancels = 0
        self.kills = 0
        self.on_restart = None  # story's: an engine has come back

    def engine(self, side):
        return getattr(self.cast, side)

    def link(self, which):
        """The link of the path in use, or the other one."""
        used = next((path["uri"] for path in self.cast.source.paths() if path["state"] == "active"), self.uris[0])
        number = int(used.split(":")[1].split(".")[2])
        return number if which != "other" else LINKS[-1] + LINKS[0] - number

    def excuse(self, engines, since):
        for engine in engines:
            for poller in self.cast.pollers(engine)[-1:]:
                poller.excused.append((since, time.monotonic() + 0.02))

    def watch_strangers(self, all_of_them=False):
        """Those that were turned away are forgotten. All of them have to be, in the end."""
        for stranger in list(self.strangers):
            if all_of_them:
                stranger.wait(30)
            if not stranger.alive():
                said = stranger.output()
                expect("still connected" not in said, f"{stranger.name} was never turned away: {said}")
                self.strangers.remove(stranger)


def perform(stage, action):
    return ACTIONS[action.name](stage, action)


@contextmanager
def cut(stage, action):
    stage.links.cut(stage.link(action.path))
    yield
    stage.links.heal()


@contextmanager
def black_hole(stage, action):
    stage.links.black_hole(stage.link(action.path))
    yield
    stage.links.heal()


@contextmanager
def one_way(stage, action):
    """What this side sends is lost; it hears everything."""
    stage.links.black_hole(stage.link(action.path), sender=stage.cast.host(action.side))
    yield
    stage.links.heal()


@contextmanager
def outage(stage, action):
    del action
    for link in LINKS:
        stage.links.black_hole(link)
    yield
    stage.links.heal()


@contextmanager
def pause(stage, action):
    try:
        stage.engine(action.side).qmp.command("migrate-pause")
        stage.held = True
    except QmpError:
        pass  # it is paused for another reason just now
    yield


@contextmanager
def kill(stage, action):
    """The engine dies; what an operator, or systemd, starts in its place goes on."""
    engine = stage.engine(action.side)
    engine.kill()
    stage.kills += 1
    yield
    engine.resume()
    stage.cast.watch(engine)
    stage.on_restart(engine)


@contextmanager
def stall(stage, action):
    engine = stage.engine(action.side)
    if not engine.process.alive():
        yield
        return
    since = time.monotonic()
    stage.cast.signal(engine, signal.SIGSTOP)
    stage.stopped.add(engine.name)
    try:
        yield
    finally:
        stage.cast.signal(engine, signal.SIGCONT)
        stage.stopped.discard(engine.name)
        stage.excuse([engine], since)


@contextmanager
def cancel(stage, action):
    """The guest has been handed over: there is nothing to cancel, on either side."""
    engine = stage.engine(action.side)
    if engine.name in stage.stopped or not engine.process.alive():
        yield
        return
    try:
        engine.qmp.command("migrate_cancel")
        status = engine.status()
        expect(status == "completed", f"{engine.name}: migrate_cancel was taken in {status}")
    except QmpError:
        stage.refused_cancels += 1
    yield


@contextmanager
def stranger(stage, action):
    stage.strangers.append(stage.cast.knock(action.kind))
    yield
    stage.watch_strangers()


FLOOD_CLIENTS, FLOOD_LINES = 8, 200


def flood_once(path):
    """Many clients that ask much at once; some talk nonsense, and none of them waits for the answers."""
    line = json.dumps({"execute": "query-migrate"}).encode() + b"\n"
    clients = []
    for number in range(FLOOD_CLIENTS):
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.settimeout(0.2)
        clients.append(client)
        try:
            client.connect(path)
            client.sendall(b'{"execute": "qmp_capabilities"}\n')
            client.sendall(line * FLOOD_LINES if number % 4 else b"\x00{[" * FLOOD_LINES + b"\n")
        except OSError:
            pass  # it does not take more
    for client in clients:
        client.close()


@contextmanager
def flood(stage, action):
    path = stage.engine(action.side).qmp_path
    over = threading.Event()

    def run():
        while not over.is_set():
            flood_once(path)
            over.wait(0.02)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def starve(stage, action):
    """Each CPU has something else to do, of the same priority."""
    del action
    since = time.monotonic()
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"], preexec_fn=die_with_parent)
        for _ in range(2 * os.cpu_count())
    ]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()
        stage.excuse([stage.cast.source, stage.cast.destination], since)


ACTIONS = {
    "cut": cut,
    "black-hole": black_hole,
    "one-way": one_way,
    "outage": outage,
    "pause": pause,
    "kill": kill,
    "stall": stall,
    "cancel": cancel,
    "stranger": stranger,
    "flood": flood,
    "starve": starve,
}

__all__ = ["Failure", "POSTCOPY", "Stage", "perform"]
