# SPDX-License-Identifier: GPL-2.0-or-later
"""Measures one run: one engine moves a new guest between new hosts."""

import os
import time

from harness.lab import Lab
from harness.process import Failure, expect, wait_for

from .engines import first_event
from .guest import FIRST_STALL, SLOT_NS, GuestRam, bucket_start, wait_ready

BEFORE_SECONDS = 1.0  # just before the migration: the guest's normal speed is measured
AFTER_SECONDS = 0.5  # after the migration the guest is measured at least for this time,
AFTER_SECONDS_MAX = 5.0  # and at most for this time, if it does not reach its normal speed
WINDOW = 10  # slots: speeds are means over 100 ms
RECOVERED = 0.9  # of its normal speed: the guest counts as recovered
LIMIT_SECONDS = 60
CLOCK_TOLERANCE = 0.1  # a worker that waits for a CPU shows an old time
TICK = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid):
    """Returns the CPU time of a process, including its ended threads."""
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def thread_cpu_seconds(pid, thread):
    with open(f"/proc/{pid}/task/{thread}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def wire_bytes(host, link="link1"):
    """Returns the bytes that a link of a host has sent and received since its creation."""
    with open(f"/proc/{host.holder.pid}/net/dev") as counters:
        for line in counters:
            name, _, fields = line.partition(":")
            if name.strip() == link:
                return int(fields.split()[0]) + int(fields.split()[8])
    raise Failure(f"{host.name} has no {link}")


class NotReady(Failure):
    """The guest did not work before the migration started, so the run says nothing about the
    engine."""


def ready(action, *args):
    try:
        return action(*args)
    except Failure as failure:
        raise NotReady(str(failure)) from None


class Meter:
    """Counters of both sides, and their increase since the Meter was created."""

    def __init__(self, mover):
        self.mover = mover
        self.vcpus = {}
        for vm in (mover.source_vm, mover.destination_vm):
            self.vcpus[vm] = [cpu["thread-id"] for cpu in vm.qmp.command("query-cpus-fast")]
        self.before = self._read()

    def _read(self):
        mover = self.mover
        values = {}
        engines = mover.engines() or (None, None)
        sides = (("source", mover.source_vm, engines[0]), ("destination", mover.destination_vm, engines[1]))
        for side, vm, engine in sides:
            pid = vm.process.pid
            vcpus = sum(thread_cpu_seconds(pid, thread) for thread in self.vcpus[vm])
            values[f"cpu_{side}_qemu"] = cpu_seconds(pid) - vcpus
            values[f"cpu_{side}_vcpus"] = vcpus
            values[f"cpu_{side}_engine"] = cpu_seconds(engine.pid) if engine else 0.0
        values["wire_bytes"] = wire_bytes(mover.source_host)
        return values

    def added(self):
        now = self._read()
        return {name: now[name] - before for name, before in self.before.items()}


def percentile(buckets, fraction):
    """Returns a percentile in us, interpolated within its bucket (19 % wide)."""
    total = sum(buckets)
    if not total:
        return None
    wanted = total * fraction
    seen = 0
    for bucket, count in enumerate(buckets):
        if count and seen + count >= wanted:
            start, end = bucket_start(bucket), bucket_start(bucket + 1)
            return (start + (end - start) * (wanted - seen) / count) / 1000
        seen += count
    return None


def expect_consistent(what, buckets, sum_ns):
    """Checks that the histogram and the sum, which the guest keeps separately, agree."""
    least = sum(count * bucket_start(bucket) for bucket, count in enumerate(buckets))
    most = sum(count * bucket_start(bucket + 1) for bucket, count in enumerate(buckets))
    expect(least <= sum_ns <= most, f"{what}: {sum_ns} ns in all, but {least} to {most} ns by their histogram")


def summary(slots, cpus):
    """Returns the figures of a range of slots. The stalled time is the mean of the vCPUs."""
    buckets = [sum(column) for column in zip(*(slot.buckets for slot in slots))]
    stalls = [0] * FIRST_STALL + buckets[FIRST_STALL:]
    n = sum(buckets)
    n_stalls = sum(stalls)
    sum_ns = sum(slot.sum_ns for slot in slots)
    stall_ns = sum(slot.stall_ns for slot in slots)
    expect_consistent("accesses", buckets, sum_ns)
    expect_consistent("stalls", stalls, stall_ns)
    return {
        "accesses": n,
        "mean_us": sum_ns / n / 1000 if n else None,
        "p50_us": percentile(buckets, 0.5),
        "p99_us": percentile(buckets, 0.99),
        "p999_us": percentile(buckets, 0.999),
        "max_us": max((slot.max_ns for slot in slots), default=0) / 1000,
        "stalls": n_stalls,
        "stall_ms": stall_ns / 1e6 / cpus,
        "stall_mean_us": stall_ns / n_stalls / 1000 if n_stalls else None,
        "stall_p50_us": percentile(stalls, 0.5),
        "stall_p99_us": percentile(stalls, 0.99),
        "buckets": buckets,
    }


def time_until_back(slots, first, last, speed):
    """Returns the seconds of the guest's clock from slot `first` to the end of the first WINDOW
    with the normal speed; None: there was none."""
    window = [slots[number].accesses for number in range(first, last + 1)]
    for end in range(WINDOW, len(window) + 1):
        if sum(window[end - WINDOW : end]) >= RECOVERED * speed * WINDOW:
            return end * SLOT_NS / 1e9
    return None


def lost_work(slots, first, last, speed):
    """Returns the time in ms that the guest would need at its normal speed for the work that it
    missed from slot `first` to `last`. It counts slow and stopped phases alike."""
    done = sum(slots[number].accesses for number in range(first, last + 1))
    return (last + 1 - first - done / speed) * SLOT_NS / 1e6


class Run:
    """The migration of one guest."""

    def __init__(self, build, accel, engine, spec):
        self.lab = Lab(build, accel)
        self.engine = engine
        self.spec = spec

    def measure(self):
        with self.lab:
            try:
                return self._measure()
            except Failure as failure:
                raise type(failure)(f"{failure}\n{self.lab.logs()}") from None

    def _measure(self):
        self.mover = mover = self.engine(self.lab, self.spec)
        self.frames, clock = ready(wait_ready, mover.source_vm, self.spec)
        expect(clock[0].startswith("tsc"), f"the guest's clock is {clock[0]}, not the TSC")
        mover.prepare()
        ready(self._wait_for_work, mover.source_vm, BEFORE_SECONDS + 0.3)
        moved = self._move()
        watched = 0.0
        seen = {"back_ms": None}
        while seen["back_ms"] is None and watched < AFTER_SECONDS_MAX:
            self._wait_for_work(mover.destination_vm, AFTER_SECONDS)
            watched += AFTER_SECONDS
            seen = self._guest_figures(moved)
        figures = {**moved, **seen, "clock_ns": clock[1]}
        figures["statistics"] = [strip(side) for side in mover.statistics()]
        figures["settings"] = mover.resolved_settings()
        return figures

    def _ram(self, vm):
        return GuestRam(vm, self.frames, self.spec.cpus)

    def _wait_for_work(self, vm, seconds):
        """Waits until each worker has worked for this time by the guest's clock. The clock must run
        as fast as the host's, or the guest's figures would mean nothing."""
        ram = self._ram(vm)
        wait_for(f"every worker in {vm.name} works", 30, lambda: all(now for now, _, _ in ram.heads()))
        begin = [now for now, _, _ in ram.heads()]
        clock = time.monotonic()
        wait_for(
            f"every worker in {vm.name} has worked for {seconds} s",
            30,
            lambda: all(now - then >= seconds * 1e9 for (now, _, _), then in zip(ram.heads(), begin)),
            interval=0.1,
        )
        passed = (ram.now() - max(begin)) / 1e9
        ram.close()
        ratio = passed / (time.monotonic() - clock)
        expect(
            abs(ratio - 1) < CLOCK_TOLERANCE,
            f"the clock of the guest in {vm.name} runs at {ratio:.2f} times the host's",
        )

    def _move(self):
        mover = self.mover
        source_ram = self._ram(mover.source_vm)
        meter = Meter(mover)
        guest_start = source_ram.now()
        start = time.time()
        mover.start()
        completed = mover.wait_completed(LIMIT_SECONDS)
        added = meter.added()
        stop = first_event(mover.source_vm.qmp, "STOP")
        resume = first_event(mover.destination_vm.qmp, "RESUME")
        expect(start < stop < resume < completed, f"start {start}, stop {stop}, resume {resume}, completed {completed}")
        self.guest_start = guest_start
        self.guest_stop = source_ram.now()  # the source's RAM has not changed since
        self.source_heads = source_ram.heads()
        source_ram.close()
        return {
            "precopy_ms": (stop - start) * 1e3,
            "downtime_ms": (resume - stop) * 1e3,
            "postcopy_ms": (completed - resume) * 1e3,
            "total_ms": (completed - start) * 1e3,
            **added,
        }

    def _guest_figures(self, moved):
        ram = self._ram(self.mover.destination_vm)
        self._expect_sound(ram)
        before = (self.guest_start - int(BEFORE_SECONDS * 1e9)) // SLOT_NS + 1
        start = self.guest_start // SLOT_NS
        stop = self.guest_stop // SLOT_NS
        end = stop + int(moved["postcopy_ms"] * 1e6) // SLOT_NS + 1
        last = min(now for now, _, _ in ram.heads()) // SLOT_NS - 1
        slots = ram.slots(before, last)
        ram.close()
        phase = [slots[number] for number in range(stop, min(end, last) + 1)]
        speed = sum(slots[number].accesses for number in range(before, start)) / (start - before)
        back = time_until_back(slots, stop, last, speed)
        return {
            "before": summary([slots[number] for number in range(before, start)], self.spec.cpus),
            "phase": summary(phase, self.spec.cpus),
            "speed": speed * 1e9 / SLOT_NS,
            "back_ms": None if back is None else back * 1e3 + moved["downtime_ms"],
            "lost_ms": lost_work(slots, stop, min(end, last), speed) + moved["downtime_ms"],
            "timeline": self._timeline(slots, start, stop, moved["downtime_ms"], speed),
        }

    def _expect_sound(self, ram):
        heads = ram.heads()
        expect(not any(corrupt for _, _, corrupt in heads), f"the guest found wrong pages: {heads}")
        for (now, done, _), (then, had_done, _) in zip(heads, self.source_heads):
            expect(
                now > then and done > had_done,
                f"a worker does not continue: {had_done} accesses at the source,"
                f" {done} at the destination",
            )

    def _timeline(self, slots, start, stop, downtime_ms, speed):
        """Returns [(ms since the start, part of the normal speed)]; zero while the guest is
        stopped."""
        slot_ms = SLOT_NS / 1e6
        points = []
        for number, slot in slots.items():
            at = (number - start) * slot_ms + (downtime_ms if number > stop else 0)
            points.append((round(at, 1), round(slot.accesses / speed, 4)))
            if number == stop:
                standing = range(1, int(downtime_ms / slot_ms) + 1)
                points += [(round(at + gone * slot_ms, 1), 0.0) for gone in standing]
        return points


def strip(info):
    """Returns those of an engine's own statistics that the reports use."""
    keep = (
        *("status", "downtime", "total-time", "setup-time", "postcopy-blocktime", "postcopy-vcpu-blocktime"),
        *("postcopy-latency", "postcopy-latency-dist", "postroad", "ram"),
    )
    return {name: info[name] for name in keep if name in info}
