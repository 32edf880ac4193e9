# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory cgroups for engines and guests: of version 2 or 1, whichever has the memory controller on
this machine."""

import contextlib
import os
import subprocess
import tempfile

from .process import Failure, Skip

REMOVE_SECONDS = 10

# Removes the groups when the test's process ends, however it ends. The processes in the groups are
# children of the test's process, and are killed with it.
CLEANER = """
cat >/dev/null
for i in $(seq 200); do
    [ -d "$0" ] || exit 0
    for group in "$0"/*/ "$0"; do rmdir "$group" 2>/dev/null; done
    sleep 0.05
done
"""


def memory_hierarchy():
    """Returns the mount point of the memory controller's hierarchy, and the cgroup version."""
    with open("/proc/mounts") as mounts:
        for line in mounts:
            _, where, kind, options = line.split()[:4]
            if kind == "cgroup" and "memory" in options.split(","):
                return where, 1
            if kind == "cgroup2" and "memory" in read(os.path.join(where, "cgroup.controllers")).split():
                return where, 2
    raise Skip("no memory controller is mounted, neither of cgroup v2 nor of v1")


def read(path):
    with open(path) as file:
        return file.read()


def write(path, text):
    with open(path, "w") as file:
        file.write(str(text))


class Cgroup:
    """One group. Cgroups.new() makes it."""

    NAMES = {
        1: {
            "max": "memory.limit_in_bytes",
            "swap": "memory.memsw.limit_in_bytes",
            "current": "memory.usage_in_bytes",
            "peak": "memory.max_usage_in_bytes",
        },
        2: {"max": "memory.max", "swap": "memory.swap.max", "current": "memory.current", "peak": "memory.peak"},
    }

    def __init__(self, path, version):
        self.path = path
        self.version = version
        os.mkdir(path)

    def _file(self, what):
        return os.path.join(self.path, self.NAMES[self.version][what])

    def limit(self, size):
        """Limits the memory of the group to `size` bytes, and forbids swapping."""
        swap = self._file("swap")
        # The limit of version 1 is for memory and swap together; it must not be below that for
        # memory.
        swaps = [(swap, size if self.version == 1 else 0)] if os.path.exists(swap) else []
        grows = self.version == 1 and size > int(read(self._file("max")))
        for name, value in [*(swaps if grows else []), (self._file("max"), size), *([] if grows else swaps)]:
            write(name, value)

    def current(self):
        return int(read(self._file("current")))

    def peak(self):
        """Returns the most bytes that were in use, or None: kernels before 5.19 do not count it for
        version 2."""
        return int(read(self._file("peak"))) if os.path.exists(self._file("peak")) else None

    def failures(self):
        """Says how often the limit was reached, for the report of a failure."""
        name = "memory.failcnt" if self.version == 1 else "memory.events"
        return read(os.path.join(self.path, name)).strip()

    def processes(self):
        return [int(pid) for pid in read(os.path.join(self.path, "cgroup.procs")).split()]

    def add(self, pid):
        write(os.path.join(self.path, "cgroup.procs"), pid)

    def wrapper(self):
        """Returns a command that joins this group and execs the command that follows it."""
        return ("sh", "-c", 'echo $$ >"$0" && exec "$@"', os.path.join(self.path, "cgroup.procs"))


class Cgroups:
    """A group for other groups. All are removed by close(), or when the test's process ends."""

    def __init__(self):
        self.root, self.version = memory_hierarchy()
        self.path = tempfile.mkdtemp(prefix="postroad-test-", dir=self.root)
        # It has its own session, so that Ctrl-C in the terminal does not interrupt it.
        self.cleaner = subprocess.Popen(
            ["sh", "-c", CLEANER, self.path], stdin=subprocess.PIPE, start_new_session=True
        )
        if self.version == 2:
            for group in (self.root, self.path):
                write(os.path.join(group, "cgroup.subtree_control"), "+memory")

    def new(self, name):
        return Cgroup(os.path.join(self.path, name), self.version)

    def close(self):
        self.cleaner.stdin.close()
        try:
            self.cleaner.wait(REMOVE_SECONDS + 5)
        except subprocess.TimeoutExpired:
            self.cleaner.kill()
            self.cleaner.wait()
        if os.path.exists(self.path):
            raise Failure(f"{self.path} could not be removed: {os.listdir(self.path)}")


@contextlib.contextmanager
def cgroups(lab):
    """Cgroups for processes of the lab. These are stopped before the groups are removed."""
    groups = Cgroups()
    try:
        yield groups
    finally:
        for process in reversed(lab.processes):
            process.stop()
        groups.close()


__all__ = ["Cgroup", "Cgroups", "cgroups"]
