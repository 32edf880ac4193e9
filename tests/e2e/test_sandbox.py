# SPDX-License-Identifier: GPL-2.0-or-later
"""Engines give up privileges and system calls, and still do all of their work."""

import os
import pwd
import tempfile

from harness.case import case
from harness.lab import Move
from harness.process import expect

# NET_BIND_SERVICE, DAC_OVERRIDE and IPC_LOCK; monitor/sandbox.c says why.
KEPT = 1 << 10 | 1 << 1 | 1 << 14


def threads(engine):
    """Yields the status of each thread of an engine, as a dictionary."""
    tasks = f"/proc/{engine.process.pid}/task"
    for task in os.listdir(tasks):
        try:
            with open(f"{tasks}/{task}/status") as status:
                yield dict(line.rstrip("\n").split(":\t", 1) for line in status if ":\t" in line)
        except (FileNotFoundError, ProcessLookupError):  # the thread has ended
            continue


def expect_confined(engine, uid, kept):
    seen = list(threads(engine))
    expect(len(seen) > 2, f"{engine.name} has only {len(seen)} threads")
    for status in seen:
        where = f"thread {status['Name']} of {engine.name}"
        expect(status["NoNewPrivs"] == "1", f"{where} may gain privileges")
        expect(status["Seccomp"] == "2", f"{where} has no filter of system calls: {status['Seccomp']}")
        expect(status["Uid"].split() == [str(uid)] * 4, f"{where} is of users {status['Uid']}, not {uid}")
        for which in ("CapEff", "CapPrm"):
            more = int(status[which], 16) & ~kept
            expect(not more, f"{where} has more capabilities than it needs: {which} {more:x}")


def recover_confined(lab, scheme, uid, kept, options=()):
    """A recovery creates a listener, a connection and lanes after privileges were given up."""
    move = Move(lab, scheme=scheme, settings=("auto-recover=off",), options=options)
    move.slow_down()
    move.start()
    move.wait_midway()
    for engine in move.engines:
        expect_confined(engine, uid, kept)
    move.network.link_down(1)
    move.wait_paused()
    move.destination.hmp(f"migrate_recover {scheme}:0.0.0.0:5555")
    move.resume(link=2, port=5555)
    move.full_speed()
    move.wait_completed()
    move.expect_guest_sound()
    for engine in move.engines:
        expect_confined(engine, uid, kept)


@case("recover-in-the-sandbox-as-root")
def as_root(lab):
    recover_confined(lab, "ofi", 0, KEPT)


@case("recover-in-the-sandbox-as-another-user")
def as_another_user(lab):
    # Only root can read the lab's directory. The engines make their own in this one, as this user.
    with tempfile.TemporaryDirectory(prefix="postroad-states-") as states:
        os.chmod(states, 0o711)
        options = ("--user", "nobody", "--state-dir", os.path.join(states, "nobody"))
        recover_confined(lab, "tcp", pwd.getpwnam("nobody").pw_uid, 0, options)
