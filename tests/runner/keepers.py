# SPDX-License-Identifier: GPL-2.0-or-later
"""Settings of the kernel that the tests need for as long as they run."""

import contextlib
import os
import subprocess

from harness.hugepages import larger_pool

# LeakSanitizer of GCC 12 looks up each live thread by its thread ID. When a joined thread of the
# same process had that ID, LeakSanitizer finds the joined one, skips the live one, and reports the
# live thread's own data as leaked (for a GLib thread: 2048 bytes in 2 allocations from g_malloc0).
# With 32768 IDs, the kernel's default, IDs are used again within minutes.
PID_MAX = "/proc/sys/kernel/pid_max"
THREAD_IDS = 4194304  # the kernel's maximum; systemd sets it, too

HUGE_MB = 1280  # of memory in huge pages, for the tests of one build that run at a time


@contextlib.contextmanager
def many_thread_ids():
    """As root: raises kernel.pid_max, if it is low. A process that outlives this one restores
    it, however this one ends."""
    with open(PID_MAX) as file:
        enough = int(file.read()) >= THREAD_IDS
    if enough or os.geteuid() != 0:
        yield
        return
    script = 'trap "" INT TERM HUP; before=$(cat "$1"); echo "$2" >"$1"; echo; cat; echo "$before" >"$1"'
    keeper = subprocess.Popen(
        ["sh", "-c", script, "keeper", PID_MAX, str(THREAD_IDS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        keeper.stdout.readline()
        yield
    finally:
        keeper.stdin.close()
        keeper.wait(30)
        keeper.stdout.close()


def some_huge_pages():
    """For the tests that need some; they are given back at the end. Several stages may ask at
    the same time."""
    return larger_pool(HUGE_MB) if os.geteuid() == 0 else contextlib.nullcontext()
