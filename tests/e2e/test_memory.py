# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests whose RAM is of other kinds than memfd with small pages."""

import os
import random
from dataclasses import replace

from harness.case import case
from harness.hugepages import available_pages, huge_pages
from harness.images import ram_files
from harness.lab import Move
from harness.process import LONG, expect, wait_for
from harness.versions import qemu_versions
from harness.vm import HUGETLBFS, GuestSpec

OLD, _, NEW = range(3)  # of qemu_versions()
NAMES = {OLD: "oldest", NEW: "newest"}
# A hugetlbfs that is mounted in a mount namespace of QEMU's own.
OWN_HUGETLBFS = (
    *("unshare", "--mount", "--propagation", "private", "sh", "-c"),
    *(f'mount -t hugetlbfs none {HUGETLBFS} && exec "$@"', "sh"),
)


def versioned(index, **kind):
    version = qemu_versions()[index]
    return GuestSpec(qemu=version.program, cpu="Nehalem-v1", **kind)


def cut_on_the_way(lab, scheme, spec, destination_spec=None, **vm):
    """Moves a guest, with a link that is cut in the middle and a recovery over the other link."""
    move = Move(
        lab, scheme=scheme, spec=spec, destination_spec=destination_spec, settings=("auto-recover=off",), vm=vm
    )
    move.start_midway(fraction=0.97)
    move.network.link_down(1)
    move.wait_paused()
    move.finish_over(link=2)
    return move


def register_huge(index, scheme):
    @case(f"huge-pages-are-cut-on-the-way-over-{scheme}-with-the-{NAMES[index]}-qemu", heavy=True)
    def huge(lab):
        spec = versioned(index, backend="huge")
        with huge_pages(2 * spec.ram_mb):
            cut_on_the_way(lab, scheme, spec)


for each in (OLD, NEW):
    for scheme in ("ofi", "tcp"):
        register_huge(each, scheme)


@case("huge-pages-of-a-file-system-that-only-qemu-sees", heavy=True)
def huge_file(lab):
    spec = GuestSpec(backend="huge-file", nodes=2, fresh=True)
    with huge_pages(2 * spec.ram_mb):
        cut_on_the_way(lab, "ofi", spec, wrapper=OWN_HUGETLBFS)


@case("shared-memory-of-a-memory-backend-shm")
def shm(lab):
    """QEMU has this backend since 9.1."""
    cut_on_the_way(lab, "tcp", versioned(NEW, backend="shm"))


def allocated(vm):
    """Returns how many bytes of a QEMU's RAM are allocated."""
    return sum(os.stat(path).st_blocks * 512 for path in ram_files(vm))


@case("memory-that-was-allocated-beforehand-stays-allocated")
def preallocated(lab):
    """Nothing is punched out of RAM with prealloc=on."""
    spec = GuestSpec(prealloc=True)
    move = cut_on_the_way(lab, "tcp", spec)
    expect(allocated(move.destination_vm) == spec.ram_mb << 20, "memory with prealloc=on was given back")


@case("huge-pages-stay-reserved", alone=True)  # others change what is available
def reserved(lab):
    """The pool has exactly the pages that both guests need. During the move none becomes available
    to others."""
    spec = GuestSpec(backend="huge")
    with huge_pages(2 * spec.ram_mb, alone=True):
        move = Move(lab, scheme="tcp", spec=spec, settings=("auto-recover=off",))
        before = available_pages()
        move.start_midway()
        during = available_pages()
        expect(during <= before, f"{during - before} huge pages were given back to the pool")
        move.full_speed()
        move.wait_completed()
        move.expect_guest_sound()


def write_pattern(path, size, seed):
    with open(path, "r+b", buffering=0) as file:
        file.write(random.Random(seed).randbytes(size))


def expect_pattern(path, size, seed, what):
    with open(path, "rb") as file:
        expect(file.read(size) == random.Random(seed).randbytes(size), f"{what} is not what it was at the source")


PLUGGED_MB = 128


def memory_object(name):
    return f"memory-backend-memfd,id={name},size={PLUGGED_MB}M,share=on"


@case("memory-that-was-plugged-before-moves-along", heavy=True)
def plugged(lab):
    """Two pc-dimms are plugged at the source. QEMU at the destination is started with them."""
    spec = GuestSpec(room_mb=2 * PLUGGED_MB, fresh=True)
    names = ("dimm0", "dimm1")
    there = [
        word
        for name in names
        for word in ("-object", memory_object(name), "-device", f"pc-dimm,id=d-{name},memdev={name}")
    ]
    move = Move(lab, spec=spec, destination_spec=replace(spec, extra=tuple(there)), settings=("auto-recover=off",))
    qmp = move.source_vm.qmp
    for name in names:
        qmp.command(
            "object-add", **{"qom-type": "memory-backend-memfd", "id": name, "size": PLUGGED_MB << 20, "share": True}
        )
        qmp.command("device_add", driver="pc-dimm", id=f"d-{name}", memdev=name)
    move_with_pattern(move, len(names))


@case("memory-of-a-virtio-mem-device-moves-along", heavy=True)
def virtio_mem(lab):
    """Its RAM block is named after the device and the backend. The guest has plugged all of it."""
    device = f"virtio-mem-pci,id=vm0,memdev=vmem0,requested-size={PLUGGED_MB}M"
    extra = ("-object", memory_object("vmem0"), "-device", device)
    spec = GuestSpec(room_mb=PLUGGED_MB, extra=extra, devices=("rng",), fresh=True)
    move = Move(lab, spec=spec, settings=("auto-recover=off",))
    wait_for(
        "the guest has plugged the memory of its virtio-mem device",
        LONG,
        lambda: move.source_vm.qmp.command("query-memory-devices")[0]["data"]["size"] == PLUGGED_MB << 20,
    )
    move_with_pattern(move, 1)


def move_with_pattern(move, n):
    """Fills the last n RAM files, which the guest does not use, with a pattern. Moves the guest,
    with a cut in the middle, and expects the pattern at the destination."""
    size = PLUGGED_MB << 20
    for seed, path in enumerate(ram_files(move.source_vm)[-n:]):
        write_pattern(path, size, seed)
    move.start_midway()
    move.network.link_down(1)
    move.wait_paused()
    move.finish_over(link=2)
    for seed, path in enumerate(ram_files(move.destination_vm)[-n:]):
        expect_pattern(path, size, seed, f"plugged memory {seed}")
