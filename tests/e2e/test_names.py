# SPDX-License-Identifier: GPL-2.0-or-later
"""Names whose look-up hangs. The client that gave the name waits, and no other client."""

import time

from harness.case import case
from harness.engine import Engine
from harness.light import LightMove, TestGuest
from harness.process import LONG, expect, wait_for
from harness.qmp import Qmp
from harness.threads import Threads, wait_warm

NAME = "destination.example"
HUNG = 4  # seconds; a look-up that takes less did not hang
# A thread that looks up a name hangs for as long, and longer than a command waits for it.
RESOLVER_SECONDS = 30


def without_name_server(lab):
    """Returns a wrapper for programs at the destination. Their name server is behind link 2, which
    loses all frames."""
    files = {
        "/etc/resolv.conf": f"nameserver {lab.network.source.address(2)}\noptions timeout:{RESOLVER_SECONDS}\n",
        "/etc/nsswitch.conf": "hosts: files dns\n",
    }
    lab.network.black_hole(2)
    mounts = []
    for number, (name, text) in enumerate(files.items()):
        path = lab.path(f"names-{number}")
        with open(path, "w") as file:
            file.write(text)
        mounts.append(f"mount --bind {path} {name}")
    return ("unshare", "--mount", "sh", "-ec", "; ".join([*mounts, 'exec "$@"']), "sh")


def wait_looks_up(engine):
    wait_for("the name is looked up", LONG, lambda: f"looking up the name {NAME}" in engine.process.output())


def others_are_served_while(engine, command, uri, meanwhile=lambda: None):
    """Gives the engine a command with a name that can't be looked up. Other clients must be served
    until its answer comes. Returns the error in the answer."""
    asker = Qmp(engine.qmp_path)
    began = time.monotonic()
    asker.send(command, uri=uri)
    slowest = 0
    answer = None
    while answer is None:
        answer = asker.answer(0.02)
        if answer is None:
            wait_looks_up(engine)
        asked = time.monotonic()
        engine.query()
        if answer is None:
            meanwhile()
        slowest = max(slowest, time.monotonic() - asked)
    took = time.monotonic() - began
    asker.close()
    expect(took > HUNG, f"the look-up took {took:.2f} s: the test proves nothing")
    expect(slowest < took / 2, f"another client waited for {slowest:.2f} s of the {took:.2f} s that the look-up took")
    expect("error" in answer, f"{command} was answered with {answer}")
    return answer["error"]["desc"]


@case("recover-with-a-name-that-no-one-knows-keeps-no-other-client-waiting", light=True)
def recover_hangs(lab):
    """Another client gives an address meanwhile, and the recovery works over it."""
    move = LightMove(lab, settings=("auto-recover=off", "standby-paths=off"), wrappers=((), without_name_server(lab)))
    given = []

    def give_address():
        if not given:
            given.append(move.destination.hmp("migrate_recover ofi:0.0.0.0:5555"))

    move.slow_down()
    move.start(link=1)
    move.wait_midway(fraction=0.9)
    move.network.link_down(1)
    move.wait_paused()
    said = others_are_served_while(move.destination, "migrate-recover", f"tcp:{NAME}:6666", give_address)
    expect(NAME in said and "took too long" in said, f"the error is: {said}")
    expect(given, "no other command was carried out meanwhile")
    move.network.end_black_hole(2)
    move.resume(link=2, port=5555)
    move.full_speed()
    move.wait_completed()
    move.expect_guest_sound()


@case("incoming-with-a-name-that-no-one-knows-keeps-no-other-client-waiting", light=True)
def incoming_hangs(lab):
    """It does not keep the engine from ending, either."""
    host = lab.network.destination
    guest = TestGuest(lab, host, "guest", "16M", incoming=True)
    engine = Engine(lab, host, guest.option(), wrapper=without_name_server(lab))
    refusals = []

    def ask_too():
        if not refusals:
            refusals.append(engine.refused("migrate_incoming tcp:0.0.0.0:4444", "another one is about to listen"))

    said = others_are_served_while(engine, "migrate-incoming", f"tcp:{NAME}:4444", ask_too)
    expect(NAME in said and "took too long" in said, f"the error is: {said}")
    expect(refusals, "no other command was given meanwhile")
    # The name "localhost" is in /etc/hosts.
    engine.hmp("migrate_incoming ofi:localhost:4444")
    wait_for("it listens", LONG, lambda: "listening on ofi:localhost:4444" in engine.process.output())

    other = Engine(lab, host, TestGuest(lab, host, "other", "16M").option(), name="other", wrapper=without_name_server(lab))
    asker = Qmp(other.qmp_path)
    asker.send("migrate-incoming", uri=f"tcp:{NAME}:4445")
    wait_looks_up(other)
    began = time.monotonic()
    other.qmp.command("quit")
    code = other.process.wait()
    ended = time.monotonic() - began
    expect(code == 0, f"it ended with {code}")
    expect(ended < RESOLVER_SECONDS * 2 / 3, f"it ended after {ended:.1f} s, as if it waited for the look-up")


@case("look-up-without-threads-is-refused-in-words", light=True)
def look_up_lacks_threads(lab):
    host = lab.network.destination
    threads = Threads(lab, "destination")
    guest = TestGuest(lab, host, "guest", "16M", incoming=True)
    engine = Engine(lab, host, guest.option(), wrapper=(*without_name_server(lab), *threads.wrapper))
    wait_warm(engine)
    # The load thread stays alive after it was started. The thread of GIO that looks up is the last.
    lacking = (
        (0, 'no thread "async-command"'),
        (1, 'no thread "load"'),
        (2, 'no thread "spare"'),
        (2, "took too long"),
    )
    for n, words in lacking:
        threads.allow(n)
        engine.refused(f"migrate_incoming tcp:{NAME}:4444", words)
    threads.allow_all()
    engine.hmp("migrate_incoming tcp:0.0.0.0:4444")
