# SPDX-License-Identifier: GPL-2.0-or-later
"""The guests that are moved between the lab's hosts.

All kinds verify the contents of their pages all the time, and print the results. A guest has
  option                 argument of the engine's --guest
  wait_ready()           waits until an engine can connect
  wait_running()         waits until it runs on this host
  wait_verifies()        waits until it has verified more pages, all of them right
  expect_stopped()       expects that it does not run on this host (any more)
  end()                  ends it, and expects that it has found no wrong page"""

import os
import re
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "..", "e2e"))

from harness.lab import find_built  # noqa: E402
from harness.process import Failure, expect, wait_for  # noqa: E402
from harness.qmp import Qmp  # noqa: E402
from harness.versions import qemu_versions  # noqa: E402,F401
from harness.vm import QEMU, GuestSpec  # noqa: E402

MB = 1 << 20


class HostQmp(Qmp):
    """A monitor on a host."""

    def __init__(self, host, path):
        self.host = host
        super().__init__(path, seconds=30)

    def _connect(self):
        try:
            return self.host.connect(self.path)
        except OSError:
            return None


def wait_socket(host, path, process):
    """Waits until a process has opened its socket on a host. One command on the host does all
    polling."""
    host.run("busybox", "sh", "-c", f"until [ -S {path} ] || ! [ -d /proc/{process.pid} ]; do sleep 0.05; done")
    expect(process.alive(), f"{process.name} on host {host.name} has ended: {process.output()[-1000:]}")


class Workload:
    """The test guest of tests/guest/workload: a program with the agent library."""

    LINE = re.compile(r"^(running|paused) verified=(\d+) written=(\d+) corrupt=(\d+)$", re.M)

    def __init__(self, host, build, directory, incoming=False, size_mb=16, pace_us=500000, threads=2):
        """pace_us: the pause of each thread after 16 pages."""
        self.host = host
        self.agent = f"{directory}/agent"
        self.option = f"agent:{self.agent}"
        argv = [f"{build}/tests/guest/workload", "--socket", self.agent]
        argv += ["--size", f"{size_mb}M", "--threads", str(threads), "--pace", str(pace_us)]
        self.process = host.popen(*argv, *(["--incoming"] if incoming else []))

    def wait_ready(self):
        wait_socket(self.host, self.agent, self.process)

    def last(self):
        """Returns (state, pages verified, pages written, pages corrupt) of its last line, or
        None."""
        lines = self.LINE.findall(self.process.output("out"))
        return (lines[-1][0], *map(int, lines[-1][1:])) if lines else None

    def verified(self):
        return self.last()[1] if self.last() else 0

    def wait_running(self, seconds=60):
        wait_for(
            f"the guest runs on host {self.host.name}",
            seconds,
            lambda: (self.last() or ("",))[0] == "running" and self.verified() > 0,
        )

    def wait_verifies(self, pages=100, seconds=60):
        before = self.verified()
        wait_for(
            f"the guest on host {self.host.name} verifies {pages} more pages",
            seconds,
            lambda: self.verified() >= before + pages,
        )
        expect(self.last()[3] == 0, f"{self.last()[3]} corrupt pages: {self.process.output()[-1000:]}")

    def expect_stopped(self):
        expect(self.last()[0] == "paused", f"the guest also runs on host {self.host.name}")

    def end(self):
        """Ends the guest, which verifies every page before."""
        self.process.signal(15)
        code = self.process.wait(60)
        said = self.process.output()
        expect("final corrupt=0 now=0" in said, f"the last verification of all pages: {said[-1000:]}")
        expect(code == 0, f"the guest ended with {code}: {said[-1000:]}")


class HostQemu:
    """A stock QEMU on a host. Its guest prints to its standard output."""

    def __init__(self, host, build, directory, argv, incoming=False, preload=False, kvm=False, qemu=QEMU):
        """argv: options for the guest. preload: with the preload agent; without it the engine
        attaches to QEMU. kvm: under KVM instead of TCG. qemu: the program."""
        self.host = host
        self.kvm = kvm
        self.agent, self.qmp_path, self.our_qmp_path = (f"{directory}/{name}" for name in ("agent", "qmp", "qmp2"))
        self.option = f"qemu:qmp={self.qmp_path}" + (f",agent={self.agent}" if preload else "")
        self.qmp = None
        argv = [qemu, "-nodefaults", "-no-user-config", "-display", "none", "-vga", "none", "-serial", "stdio", *argv]
        argv += ["-accel", "kvm", "-cpu", "host"] if kvm else ["-accel", "tcg,tb-size=16"]
        for path in (self.qmp_path, self.our_qmp_path):
            argv += ["-qmp", f"unix:{path},server=on,wait=off"]
        argv += ["-incoming", "defer"] if incoming else []
        library = find_built(build, "libpostroad-agent.so")
        env = {"LD_PRELOAD": library, "POSTROAD_AGENT": self.agent} if preload else {}
        self.sockets = (self.agent, self.our_qmp_path) if preload else (self.our_qmp_path,)
        self.process = host.popen(*argv, env=env)

    def wait_ready(self):
        for path in self.sockets:
            wait_socket(self.host, path, self.process)
        self.qmp = HostQmp(self.host, self.our_qmp_path)
        enabled = self.qmp.command("query-kvm")["enabled"]
        expect(enabled == self.kvm, f"whether QEMU on host {self.host.name} uses KVM: {enabled}")

    def expect_alive(self):
        expect(self.process.alive(), f"QEMU on host {self.host.name} has ended: {self.process.output()[-1000:]}")

    def expect_stopped(self):
        status = self.qmp.command("query-status")["status"]
        expect(status in ("paused", "postmigrate"), f"QEMU on host {self.host.name} is {status}, too")

    def end(self):
        self.expect_sound()
        self.qmp.send("quit")
        code = self.process.wait(20)
        expect(code == 0, f"QEMU on host {self.host.name} ended with {code}: {self.process.output()[-1000:]}")

    def expect_sound(self):
        """Expects that the guest has found no wrong page on this host."""
        raise NotImplementedError


class BootGuest(HostQemu):
    """The boot-sector guest (tests/roce/bootguest), small enough for emulation within emulation. It
    prints a dot for each round in which all of its memory was correct."""

    RAM_MB = 32
    ROUNDS = 3

    def __init__(self, host, build, directory, image=None, backend="memfd", **kind):
        drive = f"file={image},format=raw,if=ide,snapshot=on"
        argv = [*GuestSpec(ram_mb=self.RAM_MB, backend=backend).memory(), "-drive", drive]
        super().__init__(host, build, directory, argv, **kind)

    def said(self):
        """Returns the guest's output on this host, and expects no report of a wrong page."""
        said = self.process.output("out")
        expect(
            "BAD" not in said,
            f"the guest on host {self.host.name} has found a wrong word in its memory: {said[-200:]}",
        )
        return said

    def rounds(self):
        return self.said().count(".")

    def wait_running(self, seconds=60):
        wait_for(
            f"the guest of QEMU completes a round through its memory on host {self.host.name}",
            seconds,
            lambda: self.rounds() > 0 or self.expect_alive(),
        )

    def wait_verifies(self, seconds=90):
        """Waits for the end of the current round and for more rounds, so that the guest compares
        each word at least twice."""
        before = self.rounds()
        wait_for(
            f"the guest of QEMU on host {self.host.name} completes {self.ROUNDS} more rounds"
            " through its memory",
            seconds,
            lambda: self.rounds() >= before + self.ROUNDS or self.expect_alive(),
        )

    def expect_sound(self):
        self.said()


def build_boot_sector(path, megabytes):
    """Builds a disk with the guest that works on this much of its memory. Returns its path."""
    builder = os.path.join(HERE, "..", "bootguest", "build")
    done = subprocess.run([builder, path, str(megabytes * MB)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failure(f"{builder}: {done.stderr}")
    return path
