# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs that get no more threads."""

import contextlib
import os
import struct

from .process import LONG, wait_for


class Threads:
    """How many more threads an engine may begin."""

    def __init__(self, lab, name):
        self.path = lab.path(f"threads-{name}")
        self.allow_all()
        self.wrapper = ("env", f"LD_PRELOAD={lab.build_file('libthread-shim.so')}", f"THREAD_SHIM={self.path}")

    def allow(self, n):
        with open(self.path, "r+b" if os.path.exists(self.path) else "wb") as file:
            file.write(struct.pack("=i", n))

    def allow_all(self):
        self.allow(1 << 20)


def thread_names(engine):
    tasks = f"/proc/{engine.process.pid}/task"
    names = []
    for task in os.listdir(tasks):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"{tasks}/{task}/comm") as comm:
            names.append(comm.read().strip())
    return names


def wait_warm(engine):
    """A thread that each engine begins with has ended, and is not going to make room for another one."""
    wait_for("the engine has warmed up", LONG, lambda: "warm-up" not in thread_names(engine))
