# SPDX-License-Identifier: GPL-2.0-or-later
"""The hosts, processes and files of one test or demo. All of them are gone at its end."""

import contextlib
import os
import shutil
import signal
import tempfile

from .engine import Engine
from .network import LINKS, Network, run
from .process import LONG, Failure, Process, expect, wait_for
from .vm import GuestSpec, Qemu

# Bytes a second. A guest's memory takes many seconds, so that a test can cut a path in the middle.
SLOW = "1M"


class Lab:
    def __init__(self, build, accel, engine_build=None, keep=False, settings=(), images=None):
        """settings: for all engines; those of a test come after them. images: the saved guests of
        the run."""
        self.build = build
        self.engine_build = engine_build or build
        self.accel = accel
        self.keep = keep
        self.settings = settings
        self.images = images
        self.processes = []
        self.sanitizer_env = sanitizer_env()
        self.directory = tempfile.mkdtemp(prefix="postroad-")
        self.network = None

    def __enter__(self):
        try:
            self.network = Network()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for process in reversed(self.processes):
            process.stop()
        if self.network:
            self.network.close()
        if not self.keep:
            shutil.rmtree(self.directory, ignore_errors=True)

    # Files

    def path(self, name):
        return os.path.join(self.directory, name)

    def guest_file(self, name):
        return os.path.join(self.build, "linux-guest", name)

    def build_file(self, name):
        """Returns the path of a program or library of the plain build."""
        return find_built(self.build, name)

    def engine_file(self, program="postroad"):
        return find_built(self.engine_build, program)

    def certificates(self):
        """Makes a CA and a certificate for each side. Returns a directory for each."""
        source, destination = self.path("tls-source"), self.path("tls-destination")
        make_certs = os.path.join(os.path.dirname(__file__), "..", "..", "rigs", "make-certs")
        addresses = [self.network.destination.address(link) for link in LINKS]
        run([make_certs, source, "ca"])
        shutil.copytree(source, destination)
        run([make_certs, source, "client", "source"])
        run([make_certs, destination, "server", *addresses])
        for directory in (source, destination):  # neither side needs the CA's key
            os.unlink(os.path.join(directory, "ca-key.pem"))
        return source, destination

    # Processes

    def start(self, name, argv, env=None, gently=True):
        process = Process(name, argv, self.path(f"{name}.log"), env, gently)
        self.processes.append(process)
        return process

    def kill_tree(self, process):
        """Kills a process and its children."""
        children = children_of(process.pid)
        process.kill()
        for child in children:
            with contextlib.suppress(ProcessLookupError):  # ended with its parent
                os.kill(child, signal.SIGKILL)

    def logs(self, lines=25):
        """Returns the last lines of all logs, for the report of a failure."""
        out = []
        for process in self.processes:
            tail = process.output().splitlines()[-lines:]
            out.append(f"--- {process.name} (exit {process.exit_code()})")
            out += tail
        return "\n".join(out)


def sanitizer_env():
    """Returns options for engines that are built with sanitizers; others ignore them."""
    suppressions = os.path.join(os.path.dirname(__file__), "..", "..", "lsan.supp")
    return {
        # LeakSanitizer crashes on thread-local variables of libraries that TLS loads with dlopen().
        "ASAN_OPTIONS": "detect_leaks=1:intercept_tls_get_addr=0",
        "LSAN_OPTIONS": f"suppressions={os.path.abspath(suppressions)}:print_suppressions=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }


def children_of(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as children:
        return [int(child) for child in children.read().split()]


def find_built(build, name):
    for root, directories, files in os.walk(build):
        directories[:] = [d for d in directories if not d.endswith(".p") and not d.startswith("meson-")]
        if name in files:
            return os.path.abspath(os.path.join(root, name))
    raise Failure(f"{name} is not in {build}; build it first: meson compile -C {build}")


class Move:
    """A running guest at the source, a QEMU that waits for it at the destination, and an engine
    beside each. Each step of a migration is one call."""

    def __init__(
        self,
        lab,
        scheme="ofi",
        spec=None,
        destination_spec=None,
        incoming=None,
        settings=(),
        tls=False,
        options=(),
        program="postroad",
        vm=None,
    ):
        """tls: makes certificates, which both engines use. options: for both engines. vm: keyword
        arguments for both QEMUs."""
        self.lab = lab
        self.scheme = scheme
        self.network = lab.network
        spec = spec or GuestSpec()
        vm = vm or {}
        self.source_vm = Qemu(lab, self.network.source, spec, **vm)
        self.destination_vm = Qemu(lab, self.network.destination, destination_spec or spec, incoming=True, **vm)
        incoming = incoming or f"{scheme}:0.0.0.0:4444"
        certs = lab.certificates() if tls else (None, None)
        self.source = Engine(
            lab,
            self.network.source,
            self.source_vm.guest_option(),
            settings=settings,
            tls=certs[0],
            options=options,
            program=program,
        )
        self.destination = Engine(
            lab,
            self.network.destination,
            self.destination_vm.guest_option(),
            incoming,
            settings=settings,
            tls=certs[1],
            options=options,
            program=program,
        )
        self.engines = (self.source, self.destination)
        self.source_vm.wait_booted()

    def uri(self, link=1, prefix="", options="", port=4444):
        return f"{prefix}{self.scheme}:{self.network.destination.address(link)}:{port}{options}"

    # Steps

    def slow_down(self, bandwidth=SLOW):
        """Limits the bulk pull from now on. Faults are not limited."""
        for engine in self.engines:
            engine.hmp(f"migrate_set_parameter max-postcopy-bandwidth {bandwidth}")

    def full_speed(self):
        for engine in self.engines:
            engine.hmp("migrate_set_parameter max-postcopy-bandwidth 0")

    def start(self, **uri):
        self.source.hmp(f"migrate -d {self.uri(**uri)}")

    def resume(self, **uri):
        self.source.hmp(f"migrate -d -r {self.uri(**uri)}")

    def start_midway(self, bandwidth=SLOW, fraction=0.9):
        """Starts a slow migration, and waits until a part of the pages has arrived."""
        self.slow_down(bandwidth)
        self.start()
        self.wait_midway(fraction)

    def wait_midway(self, fraction=0.9):
        """Waits for postcopy, and then until at most this fraction of the pages that are missing at
        first is still missing. Fails if no page is missing then."""
        info = wait_for(
            "the destination is in postcopy with pages to come",
            LONG,
            lambda: self._postcopy_with_pages() or self._over(),
        )
        at_start = info["ram"]["remaining"]
        wait_for(
            "part of the pages is in place",
            LONG,
            lambda: self.destination.remaining() <= at_start * fraction,
        )
        self.expect_midway()

    def _postcopy_with_pages(self):
        info = self.destination.query()
        there = info.get("status") == "postcopy-active" and info.get("ram", {}).get("remaining")
        return info if there else None

    def _over(self):
        """Fails if the migration has ended: to wait on would be in vain."""
        for engine in self.engines:
            info = engine.query()
            if info.get("status") in ("failed", "cancelled", "completed"):
                raise Failure(f"{engine.name} is {info['status']}: {info.get('error-desc')}")

    def expect_midway(self):
        """Returns how many bytes are still missing at the destination; there must be some."""
        left = self.destination.remaining()
        expect(left > 0, "all pages have arrived too early: the test proves nothing")
        return left

    def wait_paused(self, seconds=LONG):
        """Waits until both sides are in postcopy-paused. There must be pages missing."""
        for engine in self.engines:
            engine.wait_status("postcopy-paused", seconds)
        self.expect_midway()

    def wait_recovered(self, seconds=LONG):
        """Waits until the source has recovered at least once."""
        wait_for("the source recovers", seconds, lambda: self.source.query()["postroad"]["recoveries"] >= 1)

    def wait_completed(self, seconds=LONG):
        for engine in self.engines:
            info = engine.wait_status("completed", seconds)
            left = info.get("ram", {}).get("remaining")
            expect(left == 0, f"{engine.name} is completed with {left} bytes remaining")

    def expect_guest_sound(self):
        """Ends the source's QEMU, and has the guest verify all its pages at the destination."""
        expect(
            self.source_vm.status() in ("paused", "postmigrate"),
            f"the source guest must stay stopped, it is {self.source_vm.status()}",
        )
        self.source_vm.quit()
        self.destination_vm.console.wait_verified(self.destination_vm.spec)
        self.destination_vm.console.expect_sound()

    def expect_source_runs(self):
        """Expects that the migration has failed and the guest runs on at the source."""
        expect(
            self.source_vm.status() == "running",
            f"the source guest must run, it is {self.source_vm.status()}",
        )
        self.source_vm.console.wait_running("source")
        self.source_vm.console.expect_sound()

    def finish(self):
        """Waits for the end of the migration, and verifies the guest."""
        self.full_speed()
        self.wait_completed()
        self.expect_guest_sound()

    def finish_over(self, link):
        """Recovers over a link, waits for the end of the migration, and verifies the guest."""
        self.resume(link=link)
        self.finish()

    def expect_path_taken(self, *wanted):
        """Expects that both sides were in these states in this order. Others may lie between."""
        for engine in self.engines:
            seen = engine.statuses()
            rest = iter(seen)
            missing = [status for status in wanted if status not in rest]
            expect(not missing, f"{engine.name} went through {seen}, expected {list(wanted)} in order")


__all__ = ["SLOW", "Lab", "Move", "find_built"]
