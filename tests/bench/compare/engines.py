# SPDX-License-Identifier: GPL-2.0-or-later
"""The engines that are compared: each takes a guest from the source to the destination."""

import time

from harness.engine import Engine
from harness.process import Failure, expect
from harness.vm import Qemu

PORT = 4444
OVER = ("failed", "cancelled")


def wait_status(qmp, name, status, seconds):
    """Waits for a MIGRATION event, and only listens meanwhile: questions would keep the engine busy."""
    deadline = time.monotonic() + seconds
    while True:
        for event in qmp.drain_events():
            if event["event"] != "MIGRATION":
                continue
            if event["data"]["status"] == status:
                return stamp(event)
            if event["data"]["status"] in OVER:
                raise Failure(f"{name}: the migration is {event['data']['status']}: {qmp.command('query-migrate')}")
        if time.monotonic() > deadline:
            raise Failure(f"{name}: not {status} after {seconds} s: {qmp.command('query-migrate')}")


def stamp(event):
    """When an event happened, by the clock of this machine, seconds."""
    at = event["timestamp"]
    return at["seconds"] + at["microseconds"] / 1e6


def first_event(qmp, name):
    for event in qmp.drain_events():
        if event["event"] == name:
            return stamp(event)
    raise Failure(f"monitor {qmp.path}: no event {name}")


class Mover:
    """Both QEMUs and whatever moves the guest between them."""

    def __init__(self, lab, spec):
        self.lab = lab
        self.spec = spec
        self.source_host, self.destination_host = lab.network.hosts
        self.source_vm = Qemu(lab, self.source_host, spec)
        self.destination_vm = Qemu(lab, self.destination_host, spec, incoming=True)

    def address(self):
        return f"{self.destination_host.address(1)}:{PORT}"

    def prepare(self):
        """All that an operator can do before the word to go."""

    def go(self):
        """The word to go."""

    def wait_completed(self, seconds):
        """Returns when the last side said that it is done."""

    def engines(self):
        """The processes beside the QEMUs: (source, destination), or nothing."""
        return ()

    def statistics(self):
        """What the engine says about its migration: (source, destination)."""

    def resolved_settings(self):
        return {}


class QemuMover(Mover):
    """QEMU's own postcopy, entered as soon as it lets us."""

    preempt = False

    def prepare(self):
        capabilities = ["postcopy-ram", "postcopy-blocktime", "events"]
        capabilities += ["postcopy-preempt"] if self.preempt else []
        wanted = [{"capability": name, "state": True} for name in capabilities]
        for vm in (self.source_vm, self.destination_vm):
            vm.qmp.command("migrate-set-capabilities", capabilities=wanted)
        # Nothing is held back: by default the part before postcopy has 128 MiB/s.
        self.source_vm.qmp.command("migrate-set-parameters", **{"max-bandwidth": 0, "max-postcopy-bandwidth": 0})
        self.destination_vm.qmp.command("migrate-incoming", uri=f"tcp:{self.address()}")
        enabled = {
            entry["capability"]
            for vm in (self.source_vm,)
            for entry in vm.qmp.command("query-migrate-capabilities")
            if entry["state"]
        }
        expect(enabled == set(capabilities), f"QEMU has enabled {enabled}, not {capabilities}")

    def go(self):
        self.source_vm.qmp.command("migrate", uri=f"tcp:{self.address()}")
        self.source_vm.qmp.command("migrate-start-postcopy")

    def wait_completed(self, seconds):
        return max(
            wait_status(vm.qmp, vm.name, "completed", seconds)
            for vm in (self.destination_vm, self.source_vm)
        )

    def statistics(self):
        return tuple(vm.qmp.command("query-migrate") for vm in (self.source_vm, self.destination_vm))

    def resolved_settings(self):
        return self.source_vm.qmp.command("query-migrate-parameters")


class QemuPreempt(QemuMover):
    preempt = True


class Postroad(Mover):
    scheme = None

    def prepare(self):
        uri = f"{self.scheme}:0.0.0.0:{PORT}"
        self.source = Engine(self.lab, self.source_host, self.source_vm.guest_option())
        self.destination = Engine(self.lab, self.destination_host, self.destination_vm.guest_option(), uri)

    def go(self):
        self.source.qmp.command("migrate", uri=f"{self.scheme}:{self.address()}")

    def wait_completed(self, seconds):
        return max(
            wait_status(engine.qmp, engine.name, "completed", seconds)
            for engine in (self.destination, self.source)
        )

    def engines(self):
        return self.source.process, self.destination.process

    def statistics(self):
        return self.source.query(), self.destination.query()

    def resolved_settings(self):
        return self.destination.qmp.command("query-migrate-parameters")


class PostroadOfi(Postroad):
    scheme = "ofi"


class PostroadTcp(Postroad):
    scheme = "tcp"


# In the order in which their runs alternate; the ratios are to the second.
ENGINES = {
    "qemu-postcopy": QemuMover,
    "qemu-preempt": QemuPreempt,
    "postroad-ofi": PostroadOfi,
    "postroad-tcp": PostroadTcp,
}
REFERENCE = "qemu-preempt"
