# SPDX-License-Identifier: GPL-2.0-or-later
"""Peers on the migration port that do not belong to the migration."""

import os
import random
import sys
import time

from harness.case import case
from harness.engine import Engine
from harness.lab import Move
from harness.process import LONG, expect, wait_for
from harness.vm import Qemu

PYTHON = sys.executable

# Connects, sends its third argument, and stays connected until it is killed or turned away.
STRANGER = """
import socket, sys
peer = socket.create_connection((sys.argv[1], int(sys.argv[2])), 10)
peer.sendall(bytes.fromhex(sys.argv[3]))
print("sent", flush=True)
peer.settimeout(200)
try:
    while peer.recv(4096):
        pass
    print("closed", flush=True)
except ConnectionError:
    print("reset", flush=True)
"""

# Connects again and again, sends the same bytes each time, and keeps the last 200 connections.
# Prints "flooding" after the first 1000.
FLOOD = """
import socket, struct, sys
kind, target, start = sys.argv[1], sys.argv[2], bytes.fromhex(sys.argv[3])
say = start * int(sys.argv[4])
held = []
made = 0
while True:
    if kind == "unix":
        peer = socket.socket(socket.AF_UNIX)
    else:
        peer = socket.socket()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    try:
        if kind == "unix":
            peer.settimeout(2)
            peer.connect(target)
        else:
            peer.bind((sys.argv[5], 0))
            peer.settimeout(5)
            peer.connect((target, 4444))
        if kind == "unix":
            peer.setblocking(False)
        if say:
            peer.send(say)
    except OSError:
        pass
    held.append(peer)
    if len(held) > 200:
        held.pop(0).close()
    made += 1
    if made == 1000:
        print("flooding", flush=True)
"""


def garbage():
    """Returns what strangers send: nothing, noise, other protocols, and false lengths."""
    noise = random.Random(1)
    return {
        "silent": b"",
        "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "noise": bytes(noise.randrange(256) for _ in range(4096)),
        "half-a-header": b"\x00\x01\x00",
        "huge-hello": b"\x00\x01\x00\x00\xff\xff\xff\xff",
        "short-hello": b"\x00\x01\x00\x00\x00\x00\x00\x04PSTR",
        "lying-hello": b"\x00\x01\x00\x00\x00\x00\x01\x00PSTR" + b"\xff" * 252,
        "bare-command": b"\x01\x05\x00\x00\x00\x00\x00\x00",
        "foreign-lane": b"\x00\x03\x00\x00\x00\x00\x00\x2dPSTR" + b"\x00" * 41,
    }


def send_garbage(lab, port=4444):
    host = lab.network.source
    strangers = []
    for name, data in garbage().items():
        argv = ["python3", "-c", STRANGER, host_address(lab), str(port), data.hex()]
        strangers.append(lab.start(f"stranger-{name}", host.command(argv), gently=False))
    return strangers


def host_address(lab):
    return lab.network.destination.address(2)


@case("strangers-do-not-disturb-a-running-migration")
def strangers_while_running(lab):
    move = Move(lab)
    move.slow_down()
    move.start()
    move.wait_midway()
    strangers = send_garbage(lab)
    wait_for("the strangers have spoken", LONG, lambda: all("sent" in s.output() for s in strangers))
    move.expect_midway()
    move.full_speed()
    move.wait_completed()
    states = move.source.statuses() + move.destination.statuses()
    expect("postcopy-paused" not in states, f"the strangers disturbed the migration: {states}")
    move.expect_guest_sound()


@case("strangers-do-not-disturb-a-paused-migration")
def strangers_while_paused(lab):
    move = Move(lab, settings=("auto-recover=off",))
    move.slow_down()
    move.start()
    move.wait_midway()
    move.network.link_down(1)
    move.wait_paused()
    strangers = send_garbage(lab)
    wait_for(
        "every stranger is turned away",
        LONG,
        lambda: all("closed" in s.output() or "reset" in s.output() for s in strangers),
    )
    expect(move.destination.status() == "postcopy-paused", "a stranger moved the paused migration")
    move.finish_over(link=2)


def descriptors(engine):
    return len(os.listdir(f"/proc/{engine.process.pid}/fd"))


def flood(lab, engines):
    """Floods the destination's port, from an address that is not the source's, and both
    monitors."""
    host = lab.network.source
    host.run("ip", "address", "add", "10.77.2.99/24", "dev", "link2")
    floods = []
    for name in ("silent", "http", "huge-hello", "lying-hello", "foreign-lane"):
        argv = [PYTHON, "-c", FLOOD, "tcp", host_address(lab), garbage()[name].hex(), "1", "10.77.2.99"]
        floods.append(lab.start(f"flood-{name}", host.command(argv), gently=False))
    for engine in engines:
        for name, start, times in (("line", b"{[x", 1000000), ("silent", b"", 0)):
            argv = [PYTHON, "-c", FLOOD, "unix", engine.qmp_path, start.hex(), str(times)]
            floods.append(lab.start(f"flood-monitor-{name}-{engine.name}", argv, gently=False))
    wait_for("all floods have begun", LONG, lambda: all("flooding" in f.output() for f in floods))
    return floods


@case("flood-of-the-port-and-the-monitors-disturbs-nothing", alone=True)
def flooded(lab):
    """The migration does not pause, the monitor's first client is answered, and the source can
    connect again."""
    move = Move(lab, scheme="tcp", settings=("auto-recover=off", "connect-timeout=5000"))
    move.slow_down("256K")
    move.start()
    move.wait_midway(0.95)
    before = [descriptors(engine) for engine in move.engines]
    floods = flood(lab, move.engines)
    for engine in move.engines:
        began = time.monotonic()
        expect(engine.status() == "postcopy-active", f"{engine.name} is {engine.status()} in the flood")
        taken = time.monotonic() - began
        expect(taken < LONG / 4, f"{engine.name} took {taken:.3f} s to answer in the flood")
    move.network.link_down(1)
    move.wait_paused()
    move.source.qmp.command("migrate", uri=move.uri(link=2), resume=True)
    for engine in move.engines:
        engine.wait_status("postcopy-active")
    for process in floods:
        process.kill()
    for engine, count in zip(move.engines, before):
        wait_for(
            f"{engine.name} has closed what it opened for the flood",
            LONG,
            lambda engine=engine, count=count: descriptors(engine) <= count,
        )
        expect(engine.query()["postroad"]["pauses"] == 1, f"{engine.name} paused more than once")
    move.full_speed()
    move.wait_completed()
    move.expect_guest_sound()


@case("source-of-another-migration-is-turned-away")
def another_migration(lab):
    """A second source connects to a destination that is in use. Its guest runs on, and the first
    migration is not disturbed."""
    move = Move(lab)
    other_vm = Qemu(lab, lab.network.source, move.source_vm.spec, name="qemu-other")
    other = Engine(lab, lab.network.source, other_vm.guest_option(), name="postroad-other")
    other_vm.wait_booted()
    move.slow_down()
    move.start()
    move.wait_midway()
    other.hmp(f"migrate -d {move.uri(link=2)}")
    info = other.wait_status("failed")
    expect(info.get("error-desc"), "the refusal has no reason")
    other_vm.console.wait_running("other source")
    move.full_speed()
    move.wait_completed()
    states = move.source.statuses() + move.destination.statuses()
    expect("postcopy-paused" not in states, f"another source disturbed the migration: {states}")
    move.expect_guest_sound()


@case("peer-that-is-not-postroad-is-named-so")
def not_postroad(lab):
    """The source connects to a server of another protocol."""
    move = Move(lab, settings=("handshake-timeout=2000",))
    host = lab.network.destination
    server = lab.start(
        "other-server",
        host.command(["socat", "TCP-LISTEN:8080,fork,reuseaddr", "SYSTEM:echo HTTP/1.1 400 Bad Request"]),
        gently=False,
    )
    wait_for("the other server listens", LONG, lambda: ":8080" in host.run("ss", "-ltn"))
    move.source.hmp(f"migrate -d {move.uri(port=8080)}")
    info = move.source.wait_status("failed")
    expect("8080" in info["error-desc"], f"the error does not name the path: {info['error-desc']}")
    move.expect_source_runs()
    lab.kill_tree(server)
