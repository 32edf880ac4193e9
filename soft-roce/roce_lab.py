# SPDX-License-Identifier: GPL-2.0-or-later
"""The two-host RoCE lab, for tests and for the program `lab`.

    with Lab(build="build") as lab:
        print(lab.a.run("ibv_devinfo").stdout)
        server = lab.b.popen("ib_read_lat", "-d", "rxe1", "-R")
        lab.a.run("ib_read_lat", "-d", "rxe1", "-R", "10.88.1.2", check=True)
        lab.cut(1)

Two virtual machines, a and b, mount this machine's root file system read-only. They write to tmpfs,
and to lab.share, a directory that both share with this machine. Rail 1 joins the eth1 of both
hosts, rail 2 their eth2. The soft-RoCE devices rxe1 and rxe2 use these interfaces.

    a  10.88.1.1 eth1, rxe1 ────── rxe1, eth1 10.88.1.2  b
       10.88.2.1 eth2, rxe2 ────── rxe2, eth2 10.88.2.2

The lab belongs to the thread that started it. The machines end with that thread, even if it is
killed."""

import ctypes
import fcntl
import itertools
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import channel
from channel import Connection, HostGone, LabError, Port, Process

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
QEMU = "qemu-system-x86_64"
HOSTS = ("a", "b")
RAILS = (1, 2)
KERNELS = ("6.1", "6.12")
BOOT_SECONDS = {"kvm": 20, "tcg": 400}  # of a busy machine
LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG = 1

# The faults that a host injects into a rail, and what undoes them: actions of vm/rail.
FAULTS = {
    "link-down": "link-up",
    "address-del": "address-add",
    "rdma-del": "rdma-add",
    "blackhole": "unblackhole",
    "blackhole-rdma": "unblackhole-rdma",
    "blackhole-tcp": "unblackhole-tcp",
}

# no_timer_check: an emulated host that gets no CPU for a moment would panic with
# "IO-APIC + timer doesn't work!".
KERNEL_ARGS = (
    "console=ttyS0 quiet loglevel=3 panic=-1 nokaslr mitigations=off"
    " rcupdate.rcu_cpu_stall_suppress=1 no_timer_check"
)

LOAD_KVM = """
case $(grep -m 1 ^flags /proc/cpuinfo) in
*' svm '*) modprobe kvm_amd ;;
*' vmx '*) modprobe kvm_intel ;;
*) echo "its CPU has neither SVM nor VMX" >&2 ;;
esac
[ -c /dev/kvm ]
"""


@dataclass
class Spec:
    """The configuration of the hosts."""

    build: str = "build"  # the build directory, which keeps the hosts' kernel and initramfs
    accel: str = "auto"  # kvm, tcg, auto
    memory_mb: int = 1024  # each
    cpus: int = 0  # each; 0: 2 under KVM, 1 under TCG
    visible: list = field(
        default_factory=list
    )  # directories that are visible even if they are in /tmp or another tmpfs
    kernel: str = KERNELS[0]


@dataclass
class Result:
    """The result of a command on a host."""

    returncode: int
    stdout: str
    stderr: str


class Host:
    """One of the two machines."""

    def __init__(self, directory, name):
        self.directory = directory
        self.name = name
        self.number = HOSTS.index(name) + 1

    def address(self, rail):
        return f"10.88.{rail}.{self.number}"

    def port(self, seconds=10):
        return Port(self.directory, self.name, seconds)

    # Commands

    def popen(self, *argv, env=None, cwd="/", tty=None, out=None, err=None):
        """Starts a command; see channel.Process."""
        return Process(self.port(), [str(word) for word in argv], env, cwd, tty, out, err)

    def run(self, *argv, timeout=60, check=False, input=b"", **kind):
        """Runs a command to its end. check: an exit code other than 0 raises LabError."""
        process = self.popen(*argv, **kind)
        try:
            if input:
                process.write(input)
            process.write(b"")
            code = process.wait(timeout)
        finally:
            process.close()
        result = Result(code, process.output("out"), process.output("err"))
        if check and code:
            what = " ".join(map(str, argv))
            raise LabError(
                f"{what} on host {self.name}: exit code {code}: {process.output().strip()}"
            )
        return result

    def connect(self, path):
        """Returns a socket that is connected to a unix socket on this host. Raises OSError."""
        return Connection(self.port(), path).socket

    # Time

    def clock_offset(self, rounds=10):
        """By how much this host's CLOCK_REALTIME is ahead of this machine's, and the error, in
        seconds."""
        port = self.port()
        try:
            best = None
            for _ in range(rounds):
                sent = time.time_ns()
                there = port.ask("time", 10)["time"]
                received = time.time_ns()
                error = (received - sent) / 2
                if best is None or error < best[1]:
                    best = (there - (sent + received) / 2, error)
            return best[0] / 1e9, best[1] / 1e9
        finally:
            port.close()

    def set_clock(self):
        """Sets this host's clock to this machine's, as exactly as the channel's latency allows."""
        offset, _ = self.clock_offset()
        port = self.port()
        try:
            port.ask("shift-time", 10, by=round(-offset * 1e9))
        finally:
            port.close()

    # Faults

    def rail(self, action, *rails):
        return self.run(os.path.join(HERE, "vm", "rail"), action, *rails, check=True).stdout

    def inject(self, fault, rail):
        """Injects one of FAULTS."""
        self.rail(fault, rail)

    def undo(self, fault, rail):
        self.rail(FAULTS[fault], rail)

    def set_carrier(self, rail, up):
        """Connects or disconnects this host's end of a rail, in its QEMU."""
        self.qmp("set_link", name=f"rail{rail}", up=up)

    # Guests under KVM

    def load_kvm(self):
        """Loads the KVM module. Raises LabError if the host then has no /dev/kvm."""
        done = self.run("sh", "-c", LOAD_KVM)
        if done.returncode:
            hint = "if this machine's KVM does not nest, boot the lab with POSTROAD_ACCEL=tcg"
            raise LabError(f"host {self.name} has no /dev/kvm ({hint}): {done.stderr.strip()}")

    # The machine

    def qmp(self, command, /, **arguments):
        """Sends one QMP command to the QEMU of this host, over a connection of its own."""
        with Monitor(os.path.join(self.directory, f"{self.name}.qmp"), self.name) as monitor:
            return monitor.command(command, **arguments)

    def console(self):
        """The output of the kernel and the init scripts."""
        try:
            with open(
                os.path.join(self.directory, f"{self.name}.console"), errors="replace"
            ) as console:
                return console.read()
        except FileNotFoundError:
            return ""


class Monitor:
    """A QMP connection for one command."""

    def __init__(self, path, host):
        self.host = host
        self.port = socket.socket(socket.AF_UNIX)
        self.port.settimeout(10)
        try:
            self.port.connect(path)
            self.lines = self.port.makefile("rb")
            self._answer("QMP")
            self.command("qmp_capabilities")
        except OSError as error:
            self.port.close()
            raise HostGone(
                f"host {host} cannot be reached ({error.strerror}): is the lab up?"
            ) from None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.lines.close()
        self.port.close()

    def _answer(self, *keys):
        for line in self.lines:
            message = json.loads(line)
            if any(key in message for key in keys):
                return message
        raise HostGone(f"host {self.host} has ended")

    def command(self, name, /, **arguments):
        self.port.sendall(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
        message = self._answer("return", "error")
        if "error" in message:
            raise LabError(f"QEMU of host {self.host}: {name}: {message['error'].get('desc')}")
        return message["return"]


class Machine:
    """The QEMU process of a host, identified by its process ID and start time."""

    def __init__(self, pid, start):
        self.pid = pid
        self.start = start
        self.popen = None  # set if it is a child of this process

    @classmethod
    def launch(cls, argv, log, ours, fds=()):
        """ours: it ends with this process; else it runs until it is killed. fds: inherited by
        it."""

        def die_with_parent():
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

        popen = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=die_with_parent if ours else None,
            start_new_session=True,
            pass_fds=fds,
        )
        machine = cls(popen.pid, start_time(popen.pid))
        machine.popen = popen
        return machine

    def alive(self):
        if self.popen:
            return self.popen.poll() is None
        return start_time(self.pid) == self.start

    def kill(self):
        if self.alive():
            os.kill(self.pid, signal.SIGKILL)
        if self.popen:
            self.popen.wait()
        else:
            wait_until(f"process {self.pid} ends", 10, lambda: not self.alive())


def stat_fields(pid):
    """The fields of /proc/PID/stat from the state on. None: there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
            return stat.read().rpartition(")")[2].split()
    except OSError:
        return None


def start_time(pid):
    """Returns the start time of a process in the kernel's ticks; None: it does not exist, or is a
    zombie."""
    fields = stat_fields(pid)
    return int(fields[19]) if fields and fields[0] != "Z" else None


def cpu_seconds(pid):
    """The CPU time that a process has used, in user mode and in the kernel."""
    fields = stat_fields(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def wait_until(what, seconds, probe, interval=0.02):
    """Returns probe()'s first true value."""
    deadline = time.monotonic() + seconds
    while not (value := probe()):
        if time.monotonic() > deadline:
            raise LabError(f"waited {seconds} s without success: {what}")
        time.sleep(interval)
    return value


def on_each(hosts, action):
    """Runs an action on these hosts at the same time. Returns the results in the hosts' order."""
    with ThreadPoolExecutor(len(hosts)) as pool:
        return list(pool.map(action, hosts))


def default_directory():
    """The default directory of the program `lab`, one for each user."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return os.path.join(runtime, "postroad-lab") if runtime else f"/tmp/postroad-lab-{os.getuid()}"


@dataclass
class Accel:
    """The accelerator to try first, and the one to use if the hosts do not boot with it."""

    first: str
    second: str = None


class AccelMemory:
    """A file that records, until this machine's next boot, that hosts only boot with the second
    accelerator."""

    def __init__(self, path):
        self.path = path
        with open("/proc/sys/kernel/random/boot_id") as boot_id:
            self.boot = boot_id.read().strip()

    def read(self):
        try:
            with open(self.path) as file:
                boot, accel = file.read().split()
        except (OSError, ValueError):
            return None
        return accel if boot == self.boot else None

    def write(self, accel):
        with open(self.path, "w") as file:
            file.write(f"{self.boot} {accel}\n")


def choose_accel(wanted, memory):
    """On some machines no guest boots in spite of /dev/kvm. So "auto" tries to boot with it."""
    wanted = os.environ.get("POSTROAD_ACCEL", "auto") if wanted == "auto" else wanted
    if wanted not in ("auto", "kvm", "tcg"):
        raise LabError(
            f"accelerator {wanted!r} is unknown; choose kvm, tcg or auto (--accel, POSTROAD_ACCEL)"
        )
    usable = os.access("/dev/kvm", os.R_OK | os.W_OK)
    if wanted == "kvm" and not usable:
        raise LabError(
            "accelerator kvm: /dev/kvm cannot be opened; use tcg (--accel, POSTROAD_ACCEL)"
        )
    if wanted == "auto":
        return Accel("kvm", "tcg") if usable and memory.read() != "tcg" else Accel("tcg")
    return Accel(wanted)


class DirectoryLock:
    """Prevents two labs from being started in the same directory at the same time."""

    def __init__(self, directory):
        self.fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(self.fd, fcntl.LOCK_EX)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.fd)


class Lab:
    """Both hosts. Either start() a lab, or attach() to a running one."""

    def __init__(self, directory=None, ours=True, **spec):
        """directory: for its sockets and logs; by default a new one in /tmp, which stop() removes.
        ours: the hosts end with this process. spec: the fields of Spec."""
        self.spec = Spec(**spec)
        self.ours = ours
        self.directory = os.path.abspath(directory or tempfile.mkdtemp(prefix="postroad-lab-"))
        self.share = os.path.join(self.directory, "share")
        self.a, self.b = self.hosts = tuple(Host(self.directory, name) for name in HOSTS)
        self.machines = []
        self.accel = None
        self.disturbed = set()  # rails that somebody has done something to since they were renewed

    @classmethod
    def attach(cls, directory):
        """Returns the running lab of that directory."""
        lab = cls(directory)
        try:
            with open(lab._file("lab.json")) as file:
                state = json.load(file)
        except FileNotFoundError:
            raise LabError(f"there is no lab in {directory}: start it with 'lab up'") from None
        lab.accel = state["accel"]
        lab.spec = Spec(**state["spec"])
        lab.machines = [Machine(*machine) for machine in state["machines"]]
        return lab

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def host(self, name):
        return self.hosts[HOSTS.index(name)]

    def cpu_seconds(self):
        """The CPU time that both hosts have used so far."""
        return sum(cpu_seconds(machine.pid) for machine in self.machines)

    def _file(self, name):
        return os.path.join(self.directory, name)

    # Start and stop

    def start(self):
        """Boots both hosts. Returns when they accept commands and both rails are up."""
        if len(self._file("a.99.lock")) > 100:
            raise LabError(
                f"{self.directory}: the path is too long for unix sockets; choose a shorter --dir"
            )
        os.makedirs(self.share, mode=0o700, exist_ok=True)
        with DirectoryLock(self.directory):
            if self._runs():
                raise LabError(f"a lab already runs in {self.directory}: end it with 'lab down'")
            try:
                self._start()
            except BaseException:
                self.stop()
                raise

    def _runs(self):
        """Whether machines of a lab with this directory still run."""
        try:
            return any(machine.alive() for machine in Lab.attach(self.directory).machines)
        except LabError:
            return False

    def _start(self):
        self._remove_files()
        self._build_image()
        self._configure_hosts()
        memory = AccelMemory(os.path.join(self.image, "accel"))
        accel = choose_accel(self.spec.accel, memory)
        try:
            self._boot(accel.first)
        except LabError:
            if not accel.second:
                raise
            self._end_machines()
            self._boot(accel.second)
            memory.write(accel.second)
        on_each(self.hosts, Host.set_clock)
        self._check_rails()

    def _boot(self, accel):
        self.accel = accel
        # Each QEMU is given one end of a socket pair. If it listened at a path instead, the
        # accepted socket would block the whole host as soon as the other one stops reading, its
        # link being down.
        cables = [socket.socketpair() for _ in RAILS]
        try:
            with open(self._file("qemu.log"), "ab") as log:
                for host, *ends in zip(self.hosts, *cables):
                    fds = [end.fileno() for end in ends]
                    self.machines.append(Machine.launch(self._argv(host, fds), log, self.ours, fds))
                    self._write_state()
        finally:
            for end in itertools.chain(*cables):
                end.close()
        for host in self.hosts:
            self._wait_booted(host)

    def _build_image(self):
        kernel = self.spec.kernel
        if kernel not in KERNELS:
            raise LabError(
                f"kernel {kernel!r} is unknown; choose one of {', '.join(KERNELS)} (--kernel)"
            )
        own = os.path.abspath(os.path.join(self.spec.build, "soft-roce"))
        self.image = own if kernel == KERNELS[0] else os.path.join(own, kernel)
        done = subprocess.run(
            [os.path.join(HERE, "build-image"), self.image, kernel],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise LabError(
                done.stderr.strip() or f"soft-roce/build-image: exit code {done.returncode}"
            )

    def _configure_hosts(self):
        visible = [ROOT, os.path.abspath(self.spec.build), *map(os.path.abspath, self.spec.visible)]
        values = {
            "tree": HERE,
            "share": self.share,
            "modules": os.path.join(self.image, "root"),
            "visible": "\n".join(visible),
        }
        for host in self.hosts:
            with open(os.path.join(self.share, f"{host.name}.conf"), "w") as conf:
                conf.writelines(f"{name}={shlex.quote(value)}\n" for name, value in values.items())

    def _argv(self, host, rail_fds):
        cpus = self.spec.cpus or (2 if self.accel == "kvm" else 1)
        argv = [
            QEMU,
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-vga",
            "none",
            "-no-reboot",
        ]
        argv += [
            "-name",
            f"postroad-lab-{host.name}",
            "-M",
            "pc",
            "-accel",
            self.accel,
            "-cpu",
            "max",
        ]
        argv += ["-smp", str(cpus), "-m", str(self.spec.memory_mb)]
        argv += ["-kernel", f"{self.image}/kernel", "-initrd", f"{self.image}/initrd.gz"]
        argv += ["-append", f"{KERNEL_ARGS} lab_host={host.name}"]
        argv += ["-serial", f"file:{self._file(host.name)}.console"]
        argv += ["-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"]
        argv += ["-device", "virtio-9p-pci,fsdev=root,mount_tag=root"]
        argv += ["-fsdev", f"local,id=share,path={comma_safe(self.share)},security_model=none"]
        argv += ["-device", "virtio-9p-pci,fsdev=share,mount_tag=lab"]
        argv += ["-object", "rng-builtin,id=rng", "-device", "virtio-rng-pci,rng=rng"]
        return argv + self._rails(host, rail_fds) + self._ports(host)

    def _rails(self, host, fds):
        argv = []
        for rail, fd in zip(RAILS, fds):
            argv += ["-netdev", f"stream,id=net{rail},server=off,addr.type=fd,addr.str={fd}"]
            mac = f"52:54:00:88:0{rail}:0{host.number}"
            argv += ["-device", f"virtio-net-pci,id=rail{rail},netdev=net{rail},mac={mac},romfile="]
        return argv

    def _ports(self, host):
        argv = ["-device", f"virtio-serial-pci,max_ports={channel.PORTS + 1}"]
        for number in range(1, channel.PORTS + 1):
            path = comma_safe(self._file(f"{host.name}.{number}"))
            argv += ["-chardev", f"socket,id=port{number},path={path},server=on,wait=off"]
            argv += ["-device", f"virtserialport,nr={number},chardev=port{number}"]
        path = comma_safe(self._file(f"{host.name}.qmp"))
        return argv + ["-qmp", f"unix:{path},server=on,wait=off"]

    def _write_state(self):
        state = {
            "accel": self.accel,
            "spec": asdict(self.spec),
            "machines": [(machine.pid, machine.start) for machine in self.machines],
        }
        with open(self._file("lab.json.new"), "w") as file:
            json.dump(state, file)
        os.rename(self._file("lab.json.new"), self._file("lab.json"))

    def _expect_alive(self):
        for host, machine in zip(self.hosts, self.machines):
            if not machine.alive():
                with open(self._file("qemu.log"), errors="replace") as log:
                    said = (log.read() + host.console()).strip()[-1500:]
                raise LabError(f"host {host.name} has ended: {said}")

    def _wait_booted(self, host):
        def ready():
            self._expect_alive()
            return "lab: ready" in host.console()

        try:
            wait_until(
                f"host {host.name} boots under {self.accel}", BOOT_SECONDS[self.accel], ready
            )
        except LabError as error:
            raise LabError(f"{error}; its console: {host.console()[-1500:]}") from None

    def _check_rails(self):
        for host in self.hosts:
            for rail in RAILS:
                state = host.rail("state", rail)
                if host.address(rail) not in state or "state ACTIVE" not in state:
                    raise LabError(
                        f"host {host.name}: rail {rail} is not up: {state}{host.console()[-1500:]}"
                    )

    def stop(self):
        """Ends the hosts and removes their files. May be repeated."""
        self._end_machines()
        shutil.rmtree(self.share, ignore_errors=True)
        try:
            os.rmdir(self.directory)
        except OSError:
            pass  # it does not exist, or has other files

    def _end_machines(self):
        for machine in self.machines:
            machine.kill()
        self.machines = []
        self._remove_files()

    def _remove_files(self):
        """Removes the lab's files only: the user may have chosen a directory with others."""
        names = ["lab.json", "lab.json.new", "qemu.log"]
        for host in HOSTS:
            names += [f"{host}.qmp", f"{host}.console"]
            for number in range(1, channel.PORTS + 1):
                names += [f"{host}.{number}", f"{host}.{number}.lock"]
        for name in names:
            try:
                os.unlink(self._file(name))
            except FileNotFoundError:
                pass

    # Rails

    def cut(self, rail, host=None):
        """Pulls the cable, at both ends or at one host's, in their QEMUs."""
        self.disturbed.add(rail)
        for each in self._ends(host):
            each.set_carrier(rail, False)

    def mend(self, rail, host=None):
        """Undoes cut()."""
        for each in self._ends(host):
            each.set_carrier(rail, True)

    def inject(self, fault, rail, host=None):
        """Injects one of FAULTS, on one host or on both at the same time."""
        self.disturbed.add(rail)
        on_each(self._ends(host), lambda each: each.inject(fault, rail))

    def undo(self, fault, rail, host=None):
        on_each(self._ends(host), lambda each: each.undo(fault, rail))

    def restore(self, *rails):
        """Undoes all faults of these rails."""
        for rail in rails:
            self.mend(rail)
        on_each(self.hosts, lambda host: host.rail("setup", *rails))

    def renew(self, *rails):
        """Like restore(), and with new RoCE devices. No program may have the old ones open."""
        for rail in rails:
            self.mend(rail)
        on_each(self.hosts, lambda host: host.rail("renew", *rails))
        self.disturbed.difference_update(rails)

    def renew_disturbed(self):
        """As renew(), for the rails that had a fault since they were renewed."""
        if self.disturbed:
            self.renew(*sorted(self.disturbed))

    def _ends(self, host):
        if host is None:
            return self.hosts
        return (self.host(host) if isinstance(host, str) else host,)


def comma_safe(path):
    """Escapes the commas of a path for QEMU's option parser."""
    return path.replace(",", ",,")
