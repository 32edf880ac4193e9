# SPDX-License-Identifier: GPL-2.0-or-later
"""Migrations without any failure."""

from harness.case import case
from harness.engine import Engine
from harness.lab import Move
from harness.process import LONG, expect, wait_for
from harness.vm import GuestSpec, Qemu


def move_and_verify(lab, **kind):
    move = Move(lab, **kind)
    move.start()
    move.wait_completed()
    move.expect_path_taken("setup", "active", "device", "postcopy-active", "completed")
    move.expect_guest_sound()
    return move


@case("move-over-ofi")
def move_over_ofi(lab):
    move_and_verify(lab, scheme="ofi")


@case("move-over-tcp")
def move_over_tcp(lab):
    move_and_verify(lab, scheme="tcp")


@case("move-of-two-ram-backends")
def move_two_backends(lab):
    move_and_verify(lab, scheme="ofi", spec=GuestSpec(nodes=2, work_threads=2, fresh=True))


@case("move-back-again-with-the-roles-swapped")
def move_twice(lab):
    """The destination of the first move is the source of the second."""
    move = move_and_verify(lab, scheme="ofi")
    middle_vm = move.destination_vm
    move.destination.process.stop()
    last_vm = Qemu(lab, lab.network.source, middle_vm.spec, incoming=True, name="qemu-last")
    middle = Engine(lab, lab.network.destination, middle_vm.guest_option(), name="postroad-middle")
    last = Engine(
        lab, lab.network.source, last_vm.guest_option(), "ofi:0.0.0.0:4445", name="postroad-last"
    )
    middle.hmp(f"migrate -d ofi:{lab.network.source.address(1)}:4445")
    middle.wait_status("completed")
    last.wait_status("completed")
    middle_vm.quit()
    last_vm.console.wait_verified(last_vm.spec)
    last_vm.console.expect_sound()


@case("paused-guest-stays-paused")
def paused_stays_paused(lab):
    move = Move(lab)
    move.source_vm.qmp.command("stop")
    move.start()
    move.wait_completed()
    state = move.destination_vm.status()
    expect(state == "paused", f"the guest was paused at the source, at the destination it is {state}")
    expect(
        not move.destination_vm.console.progress(),
        "the guest was paused, but has printed something at the destination",
    )
    move.destination_vm.qmp.command("cont")
    move.expect_guest_sound()


@case("statistics-agree-on-both-sides")
def statistics_agree(lab):
    move = Move(lab)
    move.start()
    move.wait_completed()
    source, destination = (engine.query() for engine in move.engines)
    for info in (source, destination):
        ram = info["ram"]
        expect(
            ram["total"] == move.source_vm.spec.ram_mb << 20,
            f"total is {ram['total']}, the guest has {move.source_vm.spec.ram_mb} MiB",
        )
        pages = ram["normal"] + ram["duplicate"]
        expect(
            pages * ram["page-size"] == ram["total"],
            f"{ram['normal']} travelled and {ram['duplicate']} zero pages are not all of {ram['total']} bytes",
        )
        expect(
            ram["transferred"] == ram["normal"] * ram["page-size"],
            f"{ram['transferred']} bytes travelled in {ram['normal']} pages",
        )
        expect(ram["normal"] >= move.source_vm.spec.work_mb << 8, "fewer pages travelled than the guest uses")
    for field in ("normal", "duplicate", "transferred", "postcopy-requests"):
        a, b = source["ram"][field], destination["ram"][field]
        expect(a == b, f"{field} is {a} at the source and {b} at the destination")
    expect(0 < source["downtime"] <= source["total-time"], f"downtime {source['downtime']} ms")


@case("each-vcpu-tells-how-long-it-waited")
def vcpus_waited(lab):
    """The figures have the names of QEMU's own, and are for the threads that QEMU calls its
    vCPUs."""
    move = Move(lab, spec=GuestSpec(work_threads=2, fresh=True))
    move.slow_down()
    move.start()
    move.wait_midway()
    midway = move.destination.query()
    move.full_speed()
    move.wait_completed()
    info = move.destination.query()
    cpus = [cpu["thread-id"] for cpu in move.destination_vm.qmp.command("query-cpus-fast")]
    threads = info["postroad"]["vcpus"]
    expect(
        [thread["thread-id"] for thread in threads] == cpus and len(cpus) == 2,
        f"QEMU's vCPUs are {cpus}, the engine lists {threads}",
    )
    all_blocked, each = info["postcopy-blocktime"], info["postcopy-vcpu-blocktime"]
    latency = info["postcopy-vcpu-latency"]
    print(f"     all vCPUs blocked {all_blocked} ms, each {each} ms, mean latency {latency} ns")
    for i in range(2):
        thread = threads[i]
        expect(thread["blocked-us"] > 0 and thread["faults"] > 0, f"vCPU {i} never waited: {thread}")
        expect(each[i] == thread["blocked-us"] // 1000, f"{each[i]} ms are not {thread}")
        expect(all_blocked <= each[i], f"all were blocked for {all_blocked} ms, vCPU {i} for {each[i]} ms")
        expect(latency[i] > 0, f"vCPU {i} has latency {latency[i]} ns")
        before = midway["postcopy-vcpu-blocktime"][i]
        expect(before <= each[i], f"vCPU {i} was blocked for {before} ms, at the end for {each[i]} ms")
    counted = sum(thread["faults"] for thread in threads) + info["postroad"]["other-faults"]
    expect(counted == info["postroad"]["faults"], f"{counted} faults of threads, {info['postroad']['faults']} in all")
    text = move.destination.hmp("info migrate")
    expect(f"vcpu 1 (thread {cpus[1]}): blocked" in text, f"info migrate does not show vCPU 1: {text}")


def private_bytes(pid):
    """Returns the anonymous memory of a process. The guest's RAM is not part of it."""
    with open(f"/proc/{pid}/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return int(fields["RssAnon"].split()[0]) * 1024


@case("engines-need-little-memory-beside-the-guests")
def engines_stay_small(lab):
    """The limit is 64 MiB and 1/8192 of the guest's RAM, in the middle of postcopy and at its
    end."""
    move = Move(lab)
    limit = (64 << 20) + (move.source_vm.spec.ram_mb << 20) // 8192
    move.slow_down()
    move.start()
    move.wait_midway()
    used = [private_bytes(engine.process.pid) for engine in move.engines]
    move.full_speed()
    move.wait_completed()
    used += [private_bytes(engine.process.pid) for engine in move.engines]
    print(f"     private memory, source and destination, mid-way and at the end: {used}")
    expect(0 < max(used) <= limit, f"private memory of the engines is {used} bytes, the limit {limit}")


@case("guest-runs-at-the-destination-before-its-pages-are-there")
def guest_runs_early(lab):
    """It prints while pages are still missing."""
    move = Move(lab)
    move.slow_down()
    move.start()
    move.wait_midway()
    wait_for(
        "the guest prints from the destination while its pages travel",
        LONG,
        move.destination_vm.console.last,
    )
    move.expect_midway()
    move.full_speed()
    move.wait_completed()
    move.expect_guest_sound()
