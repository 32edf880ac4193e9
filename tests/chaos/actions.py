# SPDX-License-Identifier: GPL-2.0-or-later
"""The actions of a plan. Each is a context manager: entering it disturbs the migration, leaving it
undoes that."""

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


class Target:
    """The migration that the actions disturb."""

    def __init__(self, setup, uris):
        self.setup = setup
        self.links = setup.links
        self.uris = uris
        self.paused_by_operator = False  # with migrate-pause
        self.stopped = set()  # names of engines
        self.strangers = []
        self.refused_cancels = 0
        self.kills = 0
        self.on_restart = None  # called with an engine that was restarted

    def engine(self, side):
        return getattr(self.setup, side)

    def link(self, which):
        """The link of the path in use, or the other one."""
        used = next(
            (path["uri"] for path in self.setup.source.paths() if path["state"] == "active"),
            self.uris[0],
        )
        number = int(used.split(":")[1].split(".")[2])
        return number if which != "other" else LINKS[-1] + LINKS[0] - number

    def excuse(self, engines, since):
        """The engines could not run from `since` until now: slow answers do not count."""
        for engine in engines:
            for poller in self.setup.pollers(engine)[-1:]:
                poller.excused.append((since, time.monotonic() + 0.02))

    def check_strangers(self, wait_for_all=False):
        """Checks the strangers whose connections have ended. At the end of a round all must have
        ended."""
        for stranger in list(self.strangers):
            if wait_for_all:
                stranger.wait(30)
            if not stranger.alive():
                said = stranger.output()
                expect(
                    "still connected" not in said, f"{stranger.name} was never disconnected: {said}"
                )
                self.strangers.remove(stranger)


def run_action(target, action):
    return ACTIONS[action.name](target, action)


@contextmanager
def cut(target, action):
    target.links.cut(target.link(action.path))
    yield
    target.links.heal()


@contextmanager
def black_hole(target, action):
    target.links.black_hole(target.link(action.path))
    yield
    target.links.heal()


@contextmanager
def one_way(target, action):
    """Drops what this side sends on the link. What the other side sends arrives."""
    target.links.black_hole(target.link(action.path), sender=target.setup.host(action.side))
    yield
    target.links.heal()


@contextmanager
def outage(target, action):
    del action
    for link in LINKS:
        target.links.black_hole(link)
    yield
    target.links.heal()


@contextmanager
def pause(target, action):
    try:
        target.engine(action.side).qmp.command("migrate-pause")
        target.paused_by_operator = True
    except QmpError:
        pass  # it is already paused for another reason
    yield


@contextmanager
def kill(target, action):
    """Kills the engine. Another one takes its place with --resume, as an operator or systemd would
    start it."""
    engine = target.engine(action.side)
    engine.kill()
    target.kills += 1
    yield
    engine.resume()
    target.setup.watch(engine)
    target.on_restart(engine)


@contextmanager
def stall(target, action):
    engine = target.engine(action.side)
    if not engine.process.alive():
        yield
        return
    since = time.monotonic()
    target.setup.signal(engine, signal.SIGSTOP)
    target.stopped.add(engine.name)
    try:
        yield
    finally:
        target.setup.signal(engine, signal.SIGCONT)
        target.stopped.discard(engine.name)
        target.excuse([engine], since)


@contextmanager
def cancel(target, action):
    """Tries to cancel. The guest was handed over, so both sides have to refuse."""
    engine = target.engine(action.side)
    if engine.name in target.stopped or not engine.process.alive():
        yield
        return
    try:
        engine.qmp.command("migrate_cancel")
        status = engine.status()
        expect(
            status == "completed", f"{engine.name}: migrate_cancel was accepted in state {status}"
        )
    except QmpError:
        target.refused_cancels += 1
    yield


@contextmanager
def stranger(target, action):
    target.strangers.append(target.setup.start_stranger(action.kind))
    yield
    target.check_strangers()


FLOOD_CLIENTS, FLOOD_LINES = 8, 200


def flood_once(path):
    """Many clients that each send many commands at once. A quarter sends garbage; none reads the
    answers."""
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
            pass  # the engine does not accept more
    for client in clients:
        client.close()


@contextmanager
def flood(target, action):
    path = target.engine(action.side).qmp_path
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
def starve(target, action):
    """Loads each CPU with busy processes of the same priority."""
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
        target.excuse([target.setup.source, target.setup.destination], since)


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

__all__ = ["Failure", "POSTCOPY", "Target", "run_action"]
