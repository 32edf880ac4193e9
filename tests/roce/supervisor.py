# SPDX-License-Identifier: GPL-2.0-or-later
"""Child processes whose descendants end with the program, however it ends.

A virtual machine of `soft-roce/lab up` lives on after that command, in a session of its own. This
process is the subreaper of such orphans: the kernel makes them its children, so that it can find
and end them. If this process is killed by SIGKILL, its children get SIGTERM, and clean up by
themselves."""

import ctypes
import os
import signal
import time
import traceback

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
END_SECONDS = 60  # for children that clean up after SIGTERM


def supervise(actions):
    """Runs each action in a child process, and returns after all have ended. Kills the processes
    that the children have left then, or at an exception."""
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    ours = os.getpid()
    started = []
    try:
        for action in actions:
            started.append(start(action, ours))
        for pid in started:
            os.waitpid(pid, 0)
    finally:
        end(started)


def start(action, parent):
    """Starts a child process for an action. Returns its process ID."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() == parent:  # otherwise the parent ended before the prctl
            action()
            code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:  # pylint: disable=broad-except
        traceback.print_exc()
    finally:
        os._exit(code)


def end(started):
    """Sends SIGTERM to these children. Kills those that remain after END_SECONDS, and all processes
    that they leave."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ENDING}
    deadline = time.monotonic() + END_SECONDS
    for pid in children():
        if pid in started:
            os.kill(pid, signal.SIGTERM)
    while set(children()) & set(started) and time.monotonic() < deadline:
        time.sleep(0.05)
    while left := children():
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        for pid in left:
            os.waitpid(pid, 0)
    for number, handler in before.items():
        signal.signal(number, handler)


def children():
    """Reaps the children that have ended, and returns the process IDs of the others."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return []
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]
