# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs that can start only a limited number of threads (tests/e2e/thread-shim.c)."""

import contextlib
import os
import struct

from .process import LONG, wait_for


class Threads:
    """The number of threads that an engine may still start."""

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
    """Waits for the end of the warm-up thread, which each engine has at its start. Its end would
    make room for another thread in the middle of a test."""
    wait_for("the engine has warmed up", LONG, lambda: "warm-up" not in thread_names(engine))
