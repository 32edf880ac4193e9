# SPDX-License-Identifier: GPL-2.0-or-later
"""A stock QEMU with the Linux test guest, and what the guest prints on its console."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, replace

from . import images
from .devices import device_arguments, pflash_arguments, uses
from .process import LONG, Failure, expect, wait_for
from .qmp import Qmp

PROGRESS = re.compile(
    r"^guest: t=([\d.]+) rounds=(\d+) pages=(\d+) corrupt=(\d+) surveys=(\d+)\s*$", re.M
)
DEVICE_ROUNDS = re.compile(r"^guest: devices: rounds=(\d+) bad=(\d+)\s*$", re.M)
QEMU = os.environ.get("QEMU") or "qemu-system-x86_64"

HUGETLBFS = "/mnt"  # in a mount namespace of a QEMU
# Memory backends. In a directory QEMU creates a file and unlinks it.
BACKENDS = {
    "memfd": "memfd",
    "file": "file,mem-path=/dev/shm",
    "shm": "shm",
    "huge": "memfd,hugetlb=on,hugetlbsize=2M",
    "huge-file": f"file,mem-path={HUGETLBFS}",
}

# CPU 0, the reporter's, keeps the time (nohz=off) and serves the serial port (irqaffinity). So the
# console works on while the other CPU waits for a page that can't be fetched. On a busy machine the
# kernel's check of its timer fails under TCG now and then (no_timer_check).
KERNEL = (
    "console=ttyS0 quiet loglevel=3 panic=-1 nokaslr nohz=off nowatchdog mitigations=off no_timer_check"
    " rcupdate.rcu_cpu_stall_suppress=1 isolcpus=1 irqaffinity=0"
)


@dataclass
class Progress:
    """One line of the guest's reporter."""

    t: float
    rounds: int
    pages: int
    corrupt: int
    surveys: int


@dataclass
class GuestSpec:
    """The configuration of a guest, and of its QEMU. It is the same on both sides of a move."""

    ram_mb: int = 256
    work_mb: int = 48
    work_rate: int = 8000  # pages a second
    work_threads: int = 1
    tick_ms: int = 200
    survey: bool = False  # a thread reads all other pages of RAM, over and over
    per_survey: int = 0  # pages that the workers visit during one survey; 0: no limit
    nodes: int = 1  # NUMA nodes, each with its own RAM backend
    share: str = "on"  # of each node's backend: "on", "on,off", …
    image: str = ""  # path of a disk image that both sides open, with locking
    backend: str = "memfd"  # a kind of BACKENDS
    prealloc: bool = False
    room_mb: int = 0  # address space for memory that is plugged later
    extra: tuple = ()  # more arguments for QEMU
    qemu: str = QEMU
    machine: str = "pc"
    cpu: str = "max"
    vcpus: int = 2
    devices: tuple = ()  # names of DEVICES
    pflash: bool = False  # OVMF instead of SeaBIOS
    fresh: bool = False  # boots, and does not start from an image (images.py)

    def for_image(self):
        """Returns the guest that is booted for the image of this one. An image suits all kinds of
        backends."""
        return replace(self, backend="memfd", share="on", prealloc=False, fresh=True)

    def _backend(self, node, megabytes):
        shares = self.share.split(",")
        options = f"id=ram{node},size={megabytes}M,share={shares[node % len(shares)]}"
        prealloc = ",prealloc=on" if self.prealloc else ""
        return ["-object", f"memory-backend-{BACKENDS[self.backend]},{options}{prealloc}"]

    def memory(self, machine_options=""):
        each = self.ram_mb // self.nodes
        room = f",slots=4,maxmem={self.ram_mb + self.room_mb}M" if self.room_mb else ""
        args = ["-m", f"{self.ram_mb}{room}"]
        for node in range(self.nodes):
            args += self._backend(node, each)
        if self.nodes == 1:
            return args + ["-machine", f"{self.machine},memory-backend=ram0{machine_options}"]
        for node in range(self.nodes):
            args += ["-numa", f"node,memdev=ram{node}"]
        return args + ["-machine", f"{self.machine}{machine_options}"]

    def disk(self):
        if not self.image:
            return []
        file = f"driver=file,node-name=file0,filename={self.image},locking=on"
        return ["-blockdev", file, "-blockdev", "driver=raw,node-name=disk0,file=file0"] + [
            "-device",
            "virtio-blk-pci,drive=disk0",
        ]

    def went_round(self, first, last):
        """Whether the workers have visited all pages between two progress lines. One worker is done
        when it has visited as many pages as there are. Several workers are at different places of
        their rounds, so that it takes two more rounds of each."""
        if self.work_threads == 1:
            return last.pages >= first.pages + (self.work_mb << 8)
        return last.rounds >= first.rounds + 2

    def kernel_line(self):
        line = (
            f"{KERNEL} work_mb={self.work_mb} work_rate={self.work_rate}"
            f" work_threads={self.work_threads} work_tick={self.tick_ms} work_survey={int(self.survey)}"
            f" work_per_survey={self.per_survey}"
        )
        # Linux must not use the VGA card's memory as a framebuffer (efifb).
        return f"{line} devices={uses(self.devices)} video=efifb:off" if self.devices else line


class Console:
    """The output of one QEMU's serial port."""

    def __init__(self, path):
        self.path = path

    def text(self):
        try:
            with open(self.path, "r", errors="replace") as console:
                return console.read()
        except FileNotFoundError:
            return ""

    def progress(self):
        return [
            Progress(float(t), *map(int, counts))
            for t, *counts in PROGRESS.findall(self.text())
        ]

    def last(self):
        lines = self.progress()
        return lines[-1] if lines else None

    def wait_running(self, what, seconds=LONG):
        """Waits until the guest has printed two more lines: it runs."""
        seen = len(self.progress())
        wait_for(f"{what}: the guest prints on", seconds, lambda: len(self.progress()) >= seen + 2)

    def wait_verified(self, spec, seconds=LONG):
        """Waits until each of the workers' pages has been verified once more."""
        first = wait_for("the guest prints its progress", seconds, self.last)
        wait_for(
            "the guest verifies all its pages once more",
            seconds,
            lambda: spec.went_round(first, self.last()),
        )

    def wait_surveyed(self, seconds=LONG):
        """Waits until every page of RAM but the workers' has been read since the first line of this
        console. From then on the reporter needs no page that is missing."""
        first = wait_for("the guest prints its progress", seconds, self.progress)[0].surveys
        wait_for(
            "the guest has surveyed its memory",
            seconds,
            lambda: self.last().surveys >= first + 2,
        )

    def device_rounds(self):
        """Returns how often the guest has used all of its devices."""
        rounds = DEVICE_ROUNDS.findall(self.text())
        return int(rounds[-1][0]) if rounds else 0

    def wait_devices(self, seconds=LONG):
        """Waits until the guest has used and verified its devices once more."""
        first = self.device_rounds()
        wait_for("the guest uses its devices", seconds, lambda: self.device_rounds() >= first + 2)

    def expect_devices_sound(self):
        text = self.text()
        bad = [int(bad) for _, bad in DEVICE_ROUNDS.findall(text) if int(bad)]
        expect(not bad and "fatal" not in text, f"the guest found its devices wrong; its console: {text[-2000:]}")

    def expect_sound(self):
        lines = self.progress()
        expect(lines, f"the guest has printed nothing to {self.path}")
        bad = [line for line in lines if line.corrupt]
        expect(not bad, f"the guest found corrupt pages: {bad[:1]}; its console: {self.text()[-2000:]}")


class Qemu:
    """One QEMU, started on a host. agent: it is started with the preload agent; without, its engine
    attaches to it. options: more arguments for QEMU. wrapper: a command that execs it. Unless it is
    incoming, its guest starts from an image if the lab has images."""

    def __init__(self, lab, host, spec, incoming=False, agent=False, name=None, options=(), wrapper=()):
        self.name = name or f"qemu-{host.name}"
        self.spec = spec
        self.qmp_path = lab.path(f"{self.name}.qmp")
        self.second_qmp_path = lab.path(f"{self.name}.qmp2")
        self.agent_path = lab.path(f"{self.name}.agent")
        self.console = Console(lab.path(f"{self.name}.console"))
        argv = [spec.qemu, "-nodefaults", "-no-user-config", "-display", "none", "-vga", "none"]
        argv += ["-no-reboot", "-accel", lab.accel, "-cpu", spec.cpu, "-smp", str(spec.vcpus)]
        drives, machine_options = pflash_arguments(lab, self.name) if spec.pflash else ([], "")
        argv += [*spec.memory(machine_options), *drives, *device_arguments(lab, spec.devices), *spec.disk()]
        argv += ["-kernel", lab.guest_file("vmlinuz"), "-initrd", lab.guest_file("initrd.gz")]
        argv += ["-append", spec.kernel_line(), "-serial", f"file:{self.console.path}"]
        for path in (self.qmp_path, self.second_qmp_path):
            argv += ["-qmp", f"unix:{path},server=on,wait=off"]
        image = self._image(lab, host, spec) if not incoming and lab.images and not spec.fresh else None
        argv += ["-incoming", "defer"] if incoming or image else []
        argv += [*spec.extra, *options]
        self.agent = agent
        env = {}
        if agent:
            env = {"LD_PRELOAD": lab.build_file("libpostroad-agent.so"), "POSTROAD_AGENT": self.agent_path}
        self.process = lab.start(self.name, host.command([*wrapper, *argv]), env, gently=False)
        self.qmp = self._connect()
        if image:
            images.load(self, image, keep_holes=not spec.prealloc)

    def _image(self, lab, host, spec):
        booted_spec = spec.for_image()

        def boot():
            vm = Qemu(lab, host, booted_spec, name=f"{self.name}-image")
            vm.wait_booted()
            return vm

        # Each test has its own disk image, which the guest does not touch.
        disk = "disk" if spec.image else ""
        return lab.images.get(repr((lab.accel, replace(booted_spec, image=disk))), boot)

    def _connect(self):
        """Connects to the second monitor; the engine uses the first."""
        wait_for(
            f"{self.name} opens its monitor",
            LONG,
            lambda: os.path.exists(self.second_qmp_path) or not self.process.alive(),
        )
        if not self.process.alive():
            raise Failure(f"{self.name} ended: {self.process.output()[-1000:]}")
        return Qmp(self.second_qmp_path)

    def guest_option(self):
        return f"qemu:qmp={self.qmp_path}" + (f",agent={self.agent_path}" if self.agent else "")

    def wait_booted(self):
        wait_for(f"the guest of {self.name} has booted and filled its memory", LONG, self.console.last)
        if self.spec.devices:
            wait_for(f"the guest of {self.name} uses its devices", LONG, self.console.device_rounds)

    def status(self):
        return self.qmp.command("query-status")["status"]

    def quit(self):
        """Ends QEMU with its command `quit`."""
        self.qmp.send("quit")
        self.process.wait()


def qemu_version(program=QEMU):
    """Returns (version, path) of a QEMU."""
    path = shutil.which(program)
    expect(path, f"{program}: no such program (QEMU={program})")
    done = subprocess.run([path, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    found = re.search(r"version (\d+\.\d+\.\d+)", done.stdout)
    said = (done.stdout + done.stderr).strip().partition("\n")[0]
    expect(found, f"{path} --version prints no version of QEMU: {said}")
    return found.group(1), path


def probe_accel(guest_dir, wanted):
    """Returns the accelerator: the wanted one. If that is "auto": KVM where a guest really boots
    under it, else TCG."""
    if wanted != "auto":
        return wanted
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    argv = [QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-vga", "none", "-no-reboot"]
    argv += ["-accel", "kvm", "-cpu", "max", "-smp", "2", "-m", "128", "-serial", "stdio"]
    argv += ["-kernel", f"{guest_dir}/vmlinuz", "-initrd", f"{guest_dir}/initrd.gz"]
    argv += ["-append", KERNEL + " work_mb=1"]
    probe = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    os.set_blocking(probe.stdout.fileno(), False)
    seen = bytearray()

    def booted():
        seen.extend(probe.stdout.read() or b"")
        return b"guest: booted" in seen or probe.poll() is not None

    try:
        wait_for("a guest boots under KVM", 10, booted)
    except Failure:
        pass
    probe.kill()
    probe.wait()
    return "kvm" if b"guest: booted" in seen else "tcg"
