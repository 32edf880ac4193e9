# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernel settings that the tests need while they run."""

import contextlib
import os
import subprocess

from harness.hugepages import larger_pool

# LeakSanitizer of GCC 12 looks up each live thread by its thread ID. When a joined thread of the
# same process had that ID, LeakSanitizer finds the joined one, skips the live one, and reports the
# live thread's own data as leaked (for a GLib thread: 2048 bytes in 2 allocations from g_malloc0).
# With 32768 IDs, the kernel's default, IDs are used again within minutes.
PID_MAX = "/proc/sys/kernel/pid_max"
THREAD_IDS = 4194304  # the kernel's maximum; systemd sets the same value

HUGE_MB = 1280  # MiB of huge pages, for the tests of one build that run at the same time


@contextlib.contextmanager
def many_thread_ids():
    """If run by root, raises kernel.pid_max where it is low. A second process restores the value,
    even if this one is killed."""
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
    """If run by root, reserves huge pages for the tests, and releases them at the end. Several
    stages can do so at the same time."""
    return larger_pool(HUGE_MB) if os.geteuid() == 0 else contextlib.nullcontext()
