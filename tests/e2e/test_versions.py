# SPDX-License-Identifier: GPL-2.0-or-later
"""Moves between versions of QEMU, both ways, with machine types, backends and devices of all
kinds, and destinations that are refused because they differ.

The versions are Debian 12's, Debian 13's and the newest that Debian has (tests/qemu-versions). A
move takes the newest machine type that both sides know."""

import os
from dataclasses import dataclass, replace

from harness.case import case
from harness.devices import OVMF_CODE, OVMF_VARS
from harness.lab import Move
from harness.process import expect
from harness.versions import qemu_versions
from harness.vm import GuestSpec

OLD, MIDDLE, NEW = range(3)  # of qemu_versions()
NAMES = {OLD: "debian12", MIDDLE: "debian13", NEW: "newest"}

Q35, PC = "pc-q35", "pc-i440fx"
FIRMWARE_END = 1 << 32  # pflash lies below it

ALL_SORTS = ("vga", "net", "rng", "balloon", "usb", "blk")


@dataclass
class Row:
    """One move. Together the rows have each pair of versions, and nearly each pair of the other
    columns."""

    source: int
    destination: int
    machine: str
    backend: str
    vcpus: int
    nodes: int
    devices: tuple
    pflash: bool = False
    scheme: str = "ofi"

    def name(self):
        kind = "q35" if self.machine == Q35 else "pc"
        what = [*self.devices, *(["pflash"] if self.pflash else [])]
        return (
            f"move-from-{NAMES[self.source]}-to-{NAMES[self.destination]}-{kind}-{self.backend}"
            f"-{self.vcpus}-vcpus-{self.nodes}-nodes-{'-'.join(what)}"
        )


# QEMU 10.0 saves a queue of a virtio device in a way that QEMU 11.1 refuses ("vring.num 1024
# exceeds allocated max"), also in QEMU's own migration. So no row has virtio from Debian 13 to the
# newest.
ROWS = (
    Row(OLD, OLD, Q35, "memfd", 2, 2, ("virtio-vga", "net-hub", "blk"), pflash=True, scheme="tcp"),
    Row(OLD, MIDDLE, Q35, "file", 4, 1, ALL_SORTS),
    Row(OLD, NEW, PC, "memfd", 1, 1, ("virtio-gpu", "net-hub", "rng", "blk"), scheme="tcp"),
    Row(OLD, NEW, Q35, "file", 4, 2, ALL_SORTS),
    Row(MIDDLE, OLD, PC, "file", 2, 2, ("vga", "net", "balloon")),
    Row(MIDDLE, MIDDLE, Q35, "memfd", 1, 1, ("virtio-gpu", "rng", "usb", "blk"), scheme="tcp"),
    Row(MIDDLE, NEW, Q35, "memfd", 4, 2, ("vga", "usb", "e1000")),
    Row(MIDDLE, NEW, PC, "file", 1, 1, ("vga", "usb", "e1000"), pflash=True, scheme="tcp"),
    Row(NEW, OLD, Q35, "memfd", 2, 1, ("virtio-vga", "rng"), pflash=True),
    Row(NEW, MIDDLE, PC, "file", 4, 2, ("virtio-gpu", "net", "blk"), scheme="tcp"),
    Row(NEW, MIDDLE, Q35, "memfd", 2, 1, ALL_SORTS),
    Row(NEW, NEW, Q35, "file", 1, 1, ("virtio-vga", "net-hub", "balloon", "usb"), pflash=True),
)


def specs(row):
    """Returns the guest of the source and that of the destination."""
    versions = qemu_versions()
    source, destination = versions[row.source], versions[row.destination]
    older = min(source, destination, key=lambda version: version.number())
    spec = GuestSpec(
        work_mb=32,
        qemu=source.program,
        machine=older.machine(row.machine),
        cpu="Nehalem-v1",
        vcpus=row.vcpus,
        nodes=row.nodes,
        backend=row.backend,
        devices=row.devices,
        pflash=row.pflash,
        fresh=True,
    )
    return spec, replace(spec, qemu=destination.program)


def expect_versions(move, row):
    """Expects that each side's QEMU is the one that the row names."""
    for vm, index in ((move.source_vm, row.source), (move.destination_vm, row.destination)):
        found = vm.qmp.command("query-version")["qemu"]
        wanted = qemu_versions()[index].number()
        expect((found["major"], found["minor"]) == wanted, f"{vm.name} is QEMU {found}, not {wanted}")


def firmware_variables(vm):
    """Returns the content of the pflash that the firmware writes to, as the guest sees it."""
    size = os.path.getsize(OVMF_VARS)
    path = f"{vm.qmp_path}.pflash"
    at = FIRMWARE_END - os.path.getsize(OVMF_CODE) - size
    vm.qmp.command("pmemsave", val=at, size=size, filename=path)
    with open(path, "rb") as file:
        return file.read()


def expect_pflash_moved(move):
    moved = firmware_variables(move.destination_vm)
    with open(OVMF_VARS, "rb") as file:
        expect(moved != file.read(), "the firmware has written nothing: the test proves nothing")
    expect(moved == firmware_variables(move.source_vm), "pflash differs at the destination")


def move_row(lab, row):
    spec, destination_spec = specs(row)
    move = Move(lab, scheme=row.scheme, spec=spec, destination_spec=destination_spec)
    expect_versions(move, row)
    move.start()
    move.wait_completed()
    move.expect_path_taken("setup", "active", "device", "postcopy-active", "completed")
    if row.pflash:
        expect_pflash_moved(move)
    move.expect_guest_sound()
    move.destination_vm.console.wait_devices()
    for vm in (move.source_vm, move.destination_vm):
        vm.console.expect_devices_sound()


def register(row):
    case(row.name(), heavy=True)(lambda lab: move_row(lab, row))


for each in ROWS:
    register(each)


def expect_refused(lab, source, destination, *words):
    """Expects that both sides refuse the move with these words, that the guest was not stopped,
    and that it runs on."""
    versions = qemu_versions()
    common = {"machine": versions[OLD].machine(Q35), "cpu": "Nehalem-v1"}
    move = Move(
        lab,
        spec=GuestSpec(**{**common, "qemu": versions[OLD].program, **source}, fresh="devices" in source),
        destination_spec=GuestSpec(**{**common, "qemu": versions[NEW].program, **destination}),
    )
    move.start()
    for engine in move.engines:
        said = engine.wait_status("failed").get("error-desc", "")
        for word in words:
            expect(word in said, f"{engine.name}: the error lacks {word!r}: {said}")
    stops = [event for event in move.source_vm.qmp.drain_events() if event["event"] == "STOP"]
    expect(not stops, "the guest was stopped for a move that had to be refused")
    move.expect_source_runs()


@case("another-machine-type-is-refused-and-named")
def another_machine(lab):
    pc = qemu_versions()[OLD].machine(PC)
    expect_refused(lab, {}, {"machine": pc}, "machine type", qemu_versions()[OLD].machine(Q35), pc)


@case("a-device-that-is-missing-is-refused-and-named")
def device_missing(lab):
    expect_refused(lab, {"devices": ("net-hub", "rng")}, {"devices": ("net-hub",)}, "missing", "virtio-rng-pci")


@case("a-device-too-many-is-refused-and-named")
def device_too_many(lab):
    expect_refused(lab, {"devices": ("usb",)}, {"devices": ("usb", "balloon")}, "virtio-balloon-pci")


@case("one-vcpu-more-is-refused-and-named")
def vcpu_more(lab):
    expect_refused(lab, {}, {"vcpus": 3}, "vCPUs", "2", "3")


@case("another-size-of-vga-memory-is-refused-and-named")
def vga_memory(lab):
    expect_refused(lab, {"devices": ("vga",)}, {"devices": ("vga-32m",)}, "vga.vram", "16384", "32768")


def refused_by_qemu(lab, version):
    """The engines cannot know this beforehand: the guest is stopped, QEMU refuses its state with a
    reason, and it runs on at the source."""
    versions = qemu_versions()
    common = {"machine": versions[OLD].machine(Q35), "cpu": "Nehalem-v1"}
    move = Move(
        lab,
        spec=GuestSpec(**common, qemu=versions[OLD].program, devices=("rng",)),
        destination_spec=GuestSpec(**common, qemu=versions[version].program, devices=("rng-modern",)),
    )
    move.start()
    for engine in move.engines:
        said = engine.wait_status("failed").get("error-desc", "")
        for word in ("virtio-rng", "load"):
            expect(word in said, f"{engine.name}: the error lacks {word!r}: {said}")
    move.expect_source_runs()


@case("qemu-that-refuses-the-state-is-quoted-on-both-sides-as-it-lives-on")
def refused_by_newest(lab):
    """Since 9.1 QEMU can be asked for the reason."""
    refused_by_qemu(lab, NEW)


@case("qemu-that-refuses-the-state-is-quoted-on-both-sides-as-it-ends")
def refused_by_old(lab):
    """Before 9.1 QEMU ends, and prints the reason on its standard error."""
    refused_by_qemu(lab, OLD)
