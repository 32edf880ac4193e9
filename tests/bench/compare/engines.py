# SPDX-License-Identifier: GPL-2.0-or-later
"""The engines that are compared. Each moves a guest from the source to the destination."""

import time

from harness.engine import Engine
from harness.process import Failure, expect
from harness.vm import Qemu

PORT = 4444
OVER = ("failed", "cancelled")


def wait_status(qmp, name, status, seconds):
    """Waits for a MIGRATION event, and sends no commands meanwhile: they would use CPU time of the
    engine."""
    deadline = time.monotonic() + seconds
    while True:
        for event in qmp.drain_events():
            if event["event"] != "MIGRATION":
                continue
            if event["data"]["status"] == status:
                return event_time(event)
            if event["data"]["status"] in OVER:
                raise Failure(f"{name}: the migration is {event['data']['status']}: {qmp.command('query-migrate')}")
        if time.monotonic() > deadline:
            raise Failure(f"{name}: not {status} after {seconds} s: {qmp.command('query-migrate')}")


def event_time(event):
    """Returns the time of an event in seconds, by the clock of this machine."""
    at = event["timestamp"]
    return at["seconds"] + at["microseconds"] / 1e6


def first_event(qmp, name):
    for event in qmp.drain_events():
        if event["event"] == name:
            return event_time(event)
    raise Failure(f"monitor {qmp.path}: the event {name} is missing")


class Mover:
    """Both QEMUs and the engines that move the guest between them."""

    def __init__(self, lab, spec):
        self.lab = lab
        self.spec = spec
        self.source_host, self.destination_host = lab.network.hosts
        self.source_vm = Qemu(lab, self.source_host, spec)
        self.destination_vm = Qemu(lab, self.destination_host, spec, incoming=True)

    def address(self):
        return f"{self.destination_host.address(1)}:{PORT}"

    def prepare(self):
        """Does all that an operator can do before the migration starts."""

    def start(self):
        """Starts the migration."""

    def wait_completed(self, seconds):
        """Waits for the end on both sides, and returns the time of the later one."""

    def engines(self):
        """Returns the engines' own processes (source, destination), or () if QEMU is the engine."""
        return ()

    def statistics(self):
        """Returns the engine's own statistics of the migration: (source, destination)."""

    def resolved_settings(self):
        return {}


class QemuMover(Mover):
    """QEMU's own postcopy, started as early as QEMU permits."""

    preempt = False

    def prepare(self):
        capabilities = ["postcopy-ram", "postcopy-blocktime", "events"]
        capabilities += ["postcopy-preempt"] if self.preempt else []
        wanted = [{"capability": name, "state": True} for name in capabilities]
        for vm in (self.source_vm, self.destination_vm):
            vm.qmp.command("migrate-set-capabilities", capabilities=wanted)
        # No bandwidth limits: by default QEMU limits precopy to 128 MiB/s.
        self.source_vm.qmp.command("migrate-set-parameters", **{"max-bandwidth": 0, "max-postcopy-bandwidth": 0})
        self.destination_vm.qmp.command("migrate-incoming", uri=f"tcp:{self.address()}")
        enabled = {
            entry["capability"]
            for vm in (self.source_vm,)
            for entry in vm.qmp.command("query-migrate-capabilities")
            if entry["state"]
        }
        expect(enabled == set(capabilities), f"QEMU has enabled {enabled}, not {capabilities}")

    def start(self):
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

    def start(self):
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


# The runs alternate in this order. The ratios compare with REFERENCE.
ENGINES = {
    "qemu-postcopy": QemuMover,
    "qemu-preempt": QemuPreempt,
    "postroad-ofi": PostroadOfi,
    "postroad-tcp": PostroadTcp,
}
REFERENCE = "qemu-preempt"
