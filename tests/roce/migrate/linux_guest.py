# SPDX-License-Identifier: GPL-2.0-or-later
"""The Linux test guest (tests/guest/linux) under KVM on a host of the lab, with a vhost-net network
card. Its QEMU runs as another user than its engine."""

import os
import re
import subprocess
from dataclasses import dataclass

from move import Failure, expect, wait_for
from guests import HostQemu
from harness.vm import Console, GuestSpec
from unprivileged import UID, USER

HERE = os.path.dirname(os.path.abspath(__file__))
KVM_LINE = re.compile(r"^guest: kvm: clock=(\S+) steal=(\d+) told=(\d+)\s*$", re.M)
FLOOD_LINE = re.compile(r"^flood: echoed=(\d+) bad=(\d+)$", re.M)
SPEC = GuestSpec(ram_mb=128, work_mb=24, work_rate=2000, vcpus=2)
HOST_ADDRESS, GUEST_ADDRESS, ECHO = "10.99.0.1", "10.99.0.2", 7
BOOT_SECONDS = 300

# Both hosts have the same address, since the guest resolves its neighbour once.
TAP = f"""
modprobe -a tun vhost_net || exit 1
! [ -e /sys/class/net/tap0 ] || ip link del tap0
ip tuntap add tap0 mode tap && ip address add {HOST_ADDRESS}/24 dev tap0 &&
    ip link set tap0 address 52:54:00:99:00:01 up
"""


def build_linux(build):
    """Builds the guest if it is missing or out of date."""
    builder = os.path.join(HERE, "..", "..", "guest", "linux", "build-initramfs")
    output = os.path.join(build, "linux-guest")
    done = subprocess.run([builder, output], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failure(f"{builder}: {done.stderr}")


@dataclass
class KvmLine:
    """The guest's view of KVM: the clock, the ticks that the host stole from all its CPUs, and the
    number of pages whose arrival KVM has announced."""

    clock: str
    steal: int
    told: int


class HostConsole(Console):  # pylint: disable=super-init-not-called
    """The guest's output on one host."""

    def __init__(self, process):
        self.path = process.name
        self.process = process

    def text(self):
        return self.process.output("out")

    def kvm_lines(self):
        return [KvmLine(clock, int(steal), int(told)) for clock, steal, told in KVM_LINE.findall(self.text())]

    def kvm(self):
        """Returns the last KvmLine, or None."""
        lines = self.kvm_lines()
        return lines[-1] if lines else None


class LinuxGuest(HostQemu):
    """A Linux guest with two vCPUs under KVM."""

    def __init__(self, host, build, directory, incoming=False):
        host.run("sh", "-c", TAP, check=True)
        self.name = f"linux guest on host {host.name}"
        files = os.path.join(build, "linux-guest")
        line = f"{SPEC.kernel_line()} devices=echo,kvm address={GUEST_ADDRESS}/24"
        argv = ["-smp", str(SPEC.vcpus), *SPEC.memory(), "-runas", USER]
        argv += ["-kernel", f"{files}/vmlinuz", "-initrd", f"{files}/initrd.gz", "-append", line]
        argv += ["-netdev", "tap,id=net0,ifname=tap0,script=no,downscript=no,vhost=on"]
        argv += ["-device", "virtio-net-pci,netdev=net0,romfile="]
        super().__init__(host, build, directory, argv, incoming=incoming, kvm=True)
        self.console = HostConsole(self.process)

    def wait_ready(self):
        super().wait_ready()
        status = self.host.run("cat", f"/proc/{self.process.pid}/status", check=True).stdout
        user = re.search(r"^Uid:\s+(\d+)", status, re.M)[1]
        expect(user == UID, f"QEMU on host {self.host.name} runs as user {user}")

    def wait_running(self):
        wait_for(f"the {self.name} has booted and filled its memory", BOOT_SECONDS, self._booted, interval=0.2)

    def _booted(self):
        self.expect_alive()
        return self.console.last() and self.console.kvm()

    def wait_verifies(self, seconds=120):
        self.console.wait_verified(SPEC, seconds)
        self.expect_sound()

    def expect_sound(self):
        self.console.expect_sound()
        text = self.console.text()
        expect("fatal" not in text and "BUG" not in text, f"the {self.name} has failed: {text[-1000:]}")


class Flood:
    """Traffic between a host and its guest, through vhost-net."""

    def __init__(self, move, guest):
        self.guest = guest
        self.host = guest.host
        self.process = self.host.popen("python3", "-ISB", os.path.join(HERE, "flood.py"), GUEST_ADDRESS, ECHO)
        move.started.append((self, self.process))
        self.name = "flood"

    def echoed(self):
        lines = FLOOD_LINE.findall(self.process.output("out"))
        echoed, bad = map(int, lines[-1]) if lines else (0, 0)
        expect(not bad, f"{bad} of {echoed} datagrams that came back on host {self.host.name} were wrong")
        return echoed

    def wait_more(self, datagrams=100, seconds=60):
        before = self.echoed()
        wait_for(
            f"the guest on host {self.host.name} sends {datagrams} more datagrams back",
            seconds,
            lambda: self.echoed() >= before + datagrams,
        )


__all__ = ["Flood", "LinuxGuest", "build_linux"]
