# SPDX-License-Identifier: GPL-2.0-or-later
"""Huge pages of 2 MiB while they are needed. A helper process enlarges the kernel's pool, and
shrinks it again when the process that asked for the pages ends, however it ends."""

import contextlib
import fcntl
import subprocess
import sys

from .process import expect

SIZE_MB = 2
POOL = "/sys/kernel/mm/hugepages/hugepages-2048kB"
LOCK = "/run/lock/postroad-huge-pages"  # other tests change the pool at the same time
# A process that uses the pool or changes its size holds this lock shared. A test that counts the
# free pages holds it exclusively (tests/rigs/huge-pool.h).
IN_USE = "/run/lock/postroad-huge-pages-in-use"
RETURN_SECONDS = 300  # the pool shrinks only after a test that counts its free pages has ended

# Prints by how many pages the pool has grown, and gives them back when its standard input ends.
KEEPER = """
import fcntl, os, signal, sys

pool, lock_path, in_use_path, wanted = *sys.argv[1:4], int(sys.argv[4])
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})


def change(by):
    with open(lock_path, "w") as lock, open(in_use_path, "w") as in_use:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fcntl.flock(in_use, fcntl.LOCK_SH)
        with open(pool + "/nr_hugepages") as file:
            before = int(file.read())
        with open(pool + "/nr_hugepages", "w") as file:
            file.write(str(max(0, before + by)))
        with open(pool + "/nr_hugepages") as file:
            return int(file.read()) - before


got = change(wanted)
print(got, flush=True)
sys.stdin.read()
change(-got)
"""


def available_pages():
    """Returns how many pages of the pool are neither in use nor reserved."""
    counts = []
    for name in ("free_hugepages", "resv_hugepages"):
        with open(f"{POOL}/{name}") as file:
            counts.append(int(file.read()))
    return counts[0] - counts[1]


@contextlib.contextmanager
def larger_pool(megabytes):
    """Adds this many MiB to the pool meanwhile, for others to use."""
    pages = -(-megabytes // SIZE_MB)
    keeper = subprocess.Popen(
        [sys.executable, "-c", KEEPER, POOL, LOCK, IN_USE, str(pages)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        got = int(keeper.stdout.readline() or 0)
        expect(got == pages, f"the kernel could allocate {got} of {pages} huge pages of {SIZE_MB} MiB")
        yield
    finally:
        keeper.stdin.close()
        keeper.wait(RETURN_SECONDS)
        keeper.stdout.close()


@contextlib.contextmanager
def huge_pages(megabytes, alone=False):
    """Adds this many MiB to the pool meanwhile, and uses the pool. alone: no other process uses the
    pool or changes its size meanwhile."""
    with larger_pool(megabytes), open(IN_USE, "w") as in_use:
        fcntl.flock(in_use, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield
