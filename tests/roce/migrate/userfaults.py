# SPDX-License-Identifier: GPL-2.0-or-later
"""Counts the faults that a host's kernel hands to userfaultfd, by kernel stack."""

import re
from contextlib import contextmanager

EVENT = "/sys/kernel/tracing/events/kprobes/postroad"
HISTOGRAM = "hist:keys=common_stacktrace:size=2048"
OFF = f"""
[ ! -d {EVENT} ] || echo '!{HISTOGRAM}' >{EVENT}/trigger
[ ! -e /sys/kernel/tracing/kprobe_events ] || echo >/sys/kernel/tracing/kprobe_events
"""
ON = f"""
[ -e /sys/kernel/tracing/kprobe_events ] || mount -t tracefs none /sys/kernel/tracing
set -e
{OFF}
echo p:postroad handle_userfault >/sys/kernel/tracing/kprobe_events
echo '{HISTOGRAM}' >{EVENT}/trigger
"""
STACK = re.compile(r"^\{([^}]*)\} hitcount: +(\d+)", re.M)


class Userfaults:
    def __init__(self, host):
        self.host = host

    def count(self):
        """Returns the number of faults that came through each kernel function. Only the innermost
        functions of a stack are known."""
        counts = {}
        for stack, hits in STACK.findall(self.host.run("cat", f"{EVENT}/hist", check=True).stdout):
            for function in set(re.findall(r"(\w+)(?:\.\S+)?\+0x", stack)):
                counts[function] = counts.get(function, 0) + int(hits)
        return counts


@contextmanager
def recorded(host):
    """Counts the faults within the context."""
    host.run("sh", "-c", ON, check=True)
    try:
        yield Userfaults(host)
    finally:
        host.run("sh", "-c", OFF, check=True)
