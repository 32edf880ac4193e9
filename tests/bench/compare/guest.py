# SPDX-License-Identifier: GPL-2.0-or-later
"""The benchmark's guest (tests/guest/linux/latency.c), and the figures that it keeps in its RAM."""

import os
import re
import struct
from dataclasses import dataclass

from harness.process import Failure, expect, wait_for
from harness.vm import GuestSpec

PAGE = 4096
MAGIC = 0x3179636E6574616C
HEAD = struct.Struct("<6Q")
SLOT_NS = 10_000_000
SLOT_BYTES = 512
N_SLOTS = 4096
N_BUCKETS = 120
SLOT = struct.Struct(f"<4Q{N_BUCKETS}I")
REGION_PAGES = 1 + N_SLOTS * SLOT_BYTES // PAGE

# An access counts as a stall if it takes this long. An access to a page in memory takes a few
# percent of it, and an engine takes longer to fetch a page. The value is the start of a bucket, so
# that the buckets separate stalls from other accesses.
STALL_NS = 20480

KINDS = ("random-write", "sequential", "read-mostly", "idle")

# User space reads the TSC without a system call or a device: a read costs 0.1 us and takes no lock
# of QEMU. The kernel must not move the pages with the figures, hence no transparent huge pages.
KERNEL = (
    "console=ttyS0 quiet loglevel=3 panic=-1 nokaslr nowatchdog mitigations=off"
    " rcupdate.rcu_cpu_stall_suppress=1 tsc=reliable clocksource=tsc transparent_hugepage=never"
)


@dataclass
class LatencySpec(GuestSpec):
    """A guest with a worker on each vCPU."""

    kind: str = "random-write"
    cpus: int = 1

    def memory(self, machine_options=""):
        # QEMU uses the last -smp.
        return super().memory(machine_options) + ["-smp", str(self.cpus)]

    def kernel_line(self):
        return (
            f"{KERNEL} program=latency lat_mb={self.work_mb} lat_kind={self.kind}"
            f" lat_threads={self.cpus} lat_stall_ns={STALL_NS}"
        )


def bucket_start(bucket):
    """Returns the shortest latency that a bucket counts, in ns."""
    if bucket == 0:
        return 0
    octave, quarter = divmod(bucket - 1, 4)
    return (4 + quarter) << (octave + 4)


FIRST_STALL = next(bucket for bucket in range(N_BUCKETS) if bucket_start(bucket) >= STALL_NS)
assert bucket_start(FIRST_STALL) == STALL_NS


class Slot:
    """The accesses that ended within SLOT_NS of the guest's clock, of one worker or of all."""

    def __init__(self, number):
        self.number = number
        self.sum_ns = self.max_ns = self.stall_ns = 0
        self.buckets = [0] * N_BUCKETS

    @property
    def accesses(self):
        return sum(self.buckets)

    def add(self, sum_ns, max_ns, stall_ns, buckets):
        self.sum_ns += sum_ns
        self.max_ns = max(self.max_ns, max_ns)
        self.stall_ns += stall_ns
        self.buckets = [a + b for a, b in zip(self.buckets, buckets)]


class GuestRam:
    """Reads the figures of a running guest from the memfd of its RAM, without an effect on the
    guest. At a destination the figures are complete only when all pages have arrived."""

    def __init__(self, vm, frames, cpus):
        self.frames = frames
        self.cpus = cpus
        self.fd = open_ram(vm.process.pid)

    def close(self):
        os.close(self.fd)

    def _page(self, worker, number):
        return os.pread(self.fd, PAGE, self.frames[worker * REGION_PAGES + number] * PAGE)

    def heads(self):
        """Returns (now, accesses, corrupt) of each worker."""
        found = []
        for worker in range(self.cpus):
            magic, number, now, accesses, corrupt, _ = HEAD.unpack_from(self._page(worker, 0))
            expect(
                magic == MAGIC and number == worker,
                f"the figures of worker {worker} are not at their place in the guest's RAM:"
                f" magic {magic:#x}",
            )
            found.append((now, accesses, corrupt))
        return found

    def now(self):
        """Returns the guest's time at the end of its last access, in ns."""
        return max(now for now, _, _ in self.heads())

    def slots(self, first, last):
        """Returns the sums of all workers' slots from `first` to `last`, by number. A slot is empty
        if no access ended in it."""
        slots = {number: Slot(number) for number in range(first, last + 1)}
        per_page = PAGE // SLOT_BYTES
        for worker in range(self.cpus):
            pages = {}
            for number in slots:
                index = number % N_SLOTS
                at = 1 + index // per_page
                if at not in pages:
                    pages[at] = self._page(worker, at)
                found, *sums = SLOT.unpack_from(pages[at], index % per_page * SLOT_BYTES)
                if found == number:
                    slots[number].add(*sums[:3], sums[3:])
        return slots


def open_ram(pid):
    """Opens the memfd of QEMU's RAM backend."""
    folder = f"/proc/{pid}/fd"
    for name in os.listdir(folder):
        if os.readlink(f"{folder}/{name}").startswith("/memfd:memory-backend-memfd"):
            return os.open(f"{folder}/{name}", os.O_RDONLY)
    raise Failure(f"process {pid} has no memory-backend-memfd")


def wait_ready(vm, spec, seconds=90):
    """Waits until the workers run. Returns the page frames of their figures, and the guest's
    clock."""

    def ready():
        text = vm.console.text()
        if "latency: fatal" in text or not vm.process.alive():
            raise Failure(f"{vm.name}: the guest did not start: {text[-500:]}{vm.process.output()[-500:]}")
        return text if re.search(r"^latency: ready\s*$", text, re.M) else None

    text = wait_for(f"the guest of {vm.name} has booted and filled its memory", seconds, ready)
    frames = []
    for first, count in re.findall(r"^latency: at (\d+)\+(\d+)\s*$", text, re.M):
        frames += range(int(first), int(first) + int(count))
    expect(
        len(frames) == spec.cpus * REGION_PAGES,
        f"the guest names {len(frames)} pages with figures, not {spec.cpus * REGION_PAGES}",
    )
    return frames, clock_of(text)


def clock_of(text):
    found = re.search(r"^latency: pages=\d+ clock=(\S+) clock_ns=(\d+)", text, re.M)
    expect(found, "the guest does not name its clock")
    return found.group(1), int(found.group(2))
