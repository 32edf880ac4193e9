# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory cgroups (version 2) on the lab's hosts: one for the engine, with a low limit, and one for
the guest."""

from contextlib import contextmanager

from move import MB, expect
from roce_lab import on_each

ROOT = "/sys/fs/cgroup"
LIMIT = 32 * MB

MAKE = f"""
echo +memory >{ROOT}/cgroup.subtree_control &&
mkdir {ROOT}/engine {ROOT}/guest &&
echo {LIMIT} >{ROOT}/engine/memory.max
"""

# The processes of the groups have been killed, and may not have ended yet.
REMOVE = f"""
for i in $(seq 100); do
    rmdir {ROOT}/engine {ROOT}/guest 2>/dev/null
    [ -d {ROOT}/engine ] || [ -d {ROOT}/guest ] || exit 0
    sleep 0.1
done
exit 1
"""

# A wrapper that runs an engine in its group.
WRAPPER = ("sh", "-c", f'echo $$ >{ROOT}/engine/cgroup.procs && exec "$@"', "sh")


@contextmanager
def groups(test):
    """Creates both groups. At the end kills the processes of the test and removes the groups."""
    hosts = test.lab.hosts
    on_each(hosts, lambda host: host.run("sh", "-c", MAKE, check=True))
    try:
        yield
    finally:
        for move in test.moves:
            move.close()
        on_each(hosts, lambda host: host.run("sh", "-c", REMOVE, check=True))


def put_guest(guest):
    guest.host.run("sh", "-c", f"echo {guest.process.pid} >{ROOT}/guest/cgroup.procs", check=True)


def usage(host, group):
    return int(host.run("cat", f"{ROOT}/{group}/memory.current", check=True).stdout)


def expect_charged_to_guest(move, before, megabytes):
    """Expects that the guest's group was charged for the pages, and that the engine's group was
    never full. memory.peak needs Linux 5.19."""
    host = move.destination.host
    peak = host.run("sh", "-c", f"cat {ROOT}/engine/memory.peak || cat {ROOT}/engine/memory.current", check=True)
    events = host.run("cat", f"{ROOT}/engine/memory.events", check=True).stdout.split()
    grown = usage(host, "guest") - before
    usages = f"engine: at most {int(peak.stdout) / MB:.1f} MiB; guest: {grown / MB:.0f} MiB more"
    move.notes.append(usages)
    expect(grown >= megabytes * MB, f"the guest's group was not charged for {megabytes} MiB that have arrived: {usages}")
    full = dict(zip(events[::2], events[1::2]))
    expect(full["max"] == full["oom"] == "0", f"the engine's group was full: {usages}; {full}")
