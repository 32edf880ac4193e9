# SPDX-License-Identifier: GPL-2.0-or-later
"""Engines that are started by root and then become another user (--user)."""

import re
from contextlib import contextmanager

from move import expect, wait_for
from roce_lab import on_each

USER, GROUP = "nobody", "rdma"
UID = "65534"
LIMIT = 65536  # bytes that a process may lock: much less than a guest's memory

# Prints user and effective capabilities of each thread of a process.
THREADS = """
cat /proc/$1/task/*/status 2>/dev/null | awk '/^Uid:/ {user = $2} /^CapEff:/ {print user, $2}'
"""


@contextmanager
def devices_of_group(*hosts):
    """Restricts RDMA devices to root and a group, as some sites do."""

    def give(owner, mode):
        devices = "/dev/infiniband/*"
        change = f"chown {owner} {devices} && chmod {mode} {devices}"
        on_each(hosts, lambda host: host.run("sh", "-c", change, check=True))

    give(f"root:{GROUP}", "660")
    try:
        yield
    finally:
        give("root:root", "666")


def as_user(*options):
    """Returns the options for an engine that becomes that user."""
    return "--user", USER, *options


def limited():
    """Returns a wrapper for an engine whose starter may lock very little memory."""
    return "prlimit", f"--memlock={LIMIT}:{LIMIT}"


def expect_unprivileged(engine):
    """Expects that each thread runs as that user without capabilities, and that the engine has
    pinned the guest's memory nevertheless. Returns the pinned KiB."""
    threads = engine.host.run("busybox", "sh", "-c", THREADS, "sh", engine.process.pid, check=True).stdout.splitlines()
    strange = [thread for thread in threads if thread.split() != [UID, "0" * 16]]
    expect(len(threads) > 2 and not strange, f"threads of the {engine.name} have user and capabilities {threads}")
    return wait_for(f"the {engine.name} has pinned more than it may lock", 20, lambda: pinned_kib(engine))


def pinned_kib(engine):
    """Returns the pinned KiB; None if they are within the limit, which proves nothing."""
    status = engine.host.run("cat", f"/proc/{engine.process.pid}/status", check=True).stdout
    pinned = int(re.search(r"VmPin:\s+(\d+)", status)[1])
    return pinned if pinned * 1024 > LIMIT else None
