# SPDX-License-Identifier: GPL-2.0-or-later
"""Engines that root starts and that then become another user (--user): what they may still do over rdma:, and what they
say where they may not."""

import re
from contextlib import contextmanager

from cast import expect, wait_for
from roce_lab import on_each

USER, GROUP = "nobody", "rdma"
UID = "65534"
LIMIT = 65536  # bytes that a process may lock by itself: much less than a guest has

# Prints for each thread of a process that has not just ended: user, effective capabilities.
THREADS = """
cat /proc/$1/task/*/status 2>/dev/null | awk '/^Uid:/ {user = $2} /^CapEff:/ {print user, $2}'
"""


@contextmanager
def devices_of_group(*hosts):
    """Only root and a group may use RDMA devices, as some sites have it."""

    def give(owner, mode):
        devices = "/dev/infiniband/*"
        on_each(hosts, lambda host: host.run("sh", "-c", f"chown {owner} {devices} && chmod {mode} {devices}", check=True))

    give(f"root:{GROUP}", "660")
    try:
        yield
    finally:
        give("root:root", "666")


def as_user(*options):
    """Options of an engine."""
    return "--user", USER, *options


def limited():
    """Started by somebody who may lock next to nothing."""
    return "prlimit", f"--memlock={LIMIT}:{LIMIT}"


def expect_unprivileged(engine):
    """Each thread is of that user and has no capability, and the guest's memory is pinned by it nevertheless. Returns how
    much, in KiB."""
    threads = engine.host.run("busybox", "sh", "-c", THREADS, "sh", engine.process.pid, check=True).stdout.splitlines()
    strange = [thread for thread in threads if thread.split() != [UID, "0" * 16]]
    expect(len(threads) > 2 and not strange, f"threads of the {engine.name} have user and capabilities {threads}")
    return wait_for(f"the {engine.name} has pinned more than it may lock", 20, lambda: pinned_kib(engine))


def pinned_kib(engine):
    """None: no more than the limit, which proves nothing."""
    status = engine.host.run("cat", f"/proc/{engine.process.pid}/status", check=True).stdout
    pinned = int(re.search(r"VmPin:\s+(\d+)", status)[1])
    return pinned if pinned * 1024 > LIMIT else None
