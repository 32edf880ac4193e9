# SPDX-License-Identifier: GPL-2.0-or-later
"""Huge pages of 2 MiB on the lab's hosts."""

from contextlib import contextmanager

from move import expect
from roce_lab import on_each

POOL = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"


def set_pool(host, pages):
    host.run("sh", "-c", f"echo 3 >/proc/sys/vm/drop_caches; echo {pages} >{POOL}", check=True)
    got = int(host.run("cat", POOL, check=True).stdout)
    expect(got == pages, f"host {host.name} has {got} of {pages} huge pages")


@contextmanager
def huge_pages(test, pages):
    """Reserves huge pages on both hosts. At the end ends the processes of the test and releases the
    pages."""
    hosts = test.lab.hosts
    on_each(hosts, lambda host: set_pool(host, pages))
    try:
        yield
    finally:
        for move in test.moves:
            move.close()
        on_each(hosts, lambda host: set_pool(host, 0))
