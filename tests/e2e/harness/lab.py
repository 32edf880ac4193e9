# SPDX-License-Identifier: GPL-2.0-or-later
"""Everything one test or one demo needs, made at the start and gone at the end."""

import contextlib
import os
import shutil
import signal
import tempfile

from .engine import Engine
from .network import LINKS, Network, run
from .process import Failure, Process, expect, wait_for
from .vm import GuestSpec, Qemu

# Slow enough that a guest's memory takes seconds, so that what a test cuts is in the middle of it.
SLOW = "1M"


class Lab:
    def __init__(self, build, accel, engine_build=None, keep=False, settings=()):
        """settings: of all engines, before those of a test."""
        self.build = build
        self.engine_build = engine_build or build
        self.accel = accel
        self.keep = keep
        self.settings = settings
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
        """A program or library of the plain build, wherever meson has put it."""
        return find_built(self.build, name)

    def engine_file(self, program="postroad"):
        return find_built(self.engine_build, program)

    def certificates(self):
        """Makes a CA and what each side needs of it; returns a directory for (source, destination)."""
        source, destination = self.path("tls-source"), self.path("tls-destination")
        make_certs = os.path.join(os.path.dirname(__file__), "..", "..", "rigs", "make-certs")
        addresses = [self.network.destination.address(link) for link in LINKS]
        run([make_certs, source, "ca"])
        shutil.copytree(source, destination)
        run([make_certs, source, "client", "source"])
        run([make_certs, destination, "server", *addresses])
        for directory in (source, destination):  # no business of either
            os.unlink(os.path.join(directory, "ca-key.pem"))
        return source, destination

    # Processes

    def start(self, name, argv, env=None, gently=True):
        process = Process(name, argv, self.path(f"{name}.log"), env, gently)
        self.processes.append(process)
        return process

    def kill_tree(self, process):
        """Kills a process that has forked, with its children."""
        children = children_of(process.pid)
        process.kill()
        for child in children:
            with contextlib.suppress(ProcessLookupError):  # ended with its parent
                os.kill(child, signal.SIGKILL)

    def logs(self, lines=25):
        """The ends of all logs, for a failure's report."""
        out = []
        for process in self.processes:
            tail = process.output().splitlines()[-lines:]
            out.append(f"--- {process.name} (exit {process.exit_code()})")
            out += tail
        return "\n".join(out)


def sanitizer_env():
    """For engines that are built with sanitizers; the others don't look."""
    suppressions = os.path.join(os.path.dirname(__file__), "..", "..", "lsan.supp")
    return {
        # LeakSanitizer crashes over the thread-local variables of the libraries that TLS loads later.
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
    """The usual cast: a running guest at the source, an empty QEMU at the destination, an engine beside
    each, and the steps of a migration as one call each."""

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
        """tls: certificates are made, and both engines use them; options: of both engines; vm: of both QEMUs."""
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
        """Bulk pages travel slowly from now on."""
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
        """Starts, slowly, and waits for the middle."""
        self.slow_down(bandwidth)
        self.start()
        self.wait_midway(fraction)

    def wait_midway(self, fraction=0.9):
        """Waits for a postcopy with at most that fraction of what it began with still to come; there has
        to be something left."""
        info = wait_for(
            "the destination is in postcopy with pages to come",
            30,
            lambda: self._postcopy_with_pages() or self._over(),
        )
        at_start = info["ram"]["remaining"]
        wait_for(
            "part of the pages is in place",
            60,
            lambda: self.destination.remaining() <= at_start * fraction,
        )
        self.expect_midway()

    def _postcopy_with_pages(self):
        info = self.destination.query()
        there = info.get("status") == "postcopy-active" and info.get("ram", {}).get("remaining")
        return info if there else None

    def _over(self):
        """A migration that has ended is not worth the whole wait."""
        for engine in self.engines:
            info = engine.query()
            if info.get("status") in ("failed", "cancelled", "completed"):
                raise Failure(f"{engine.name} is {info['status']}: {info.get('error-desc')}")

    def expect_midway(self):
        left = self.destination.remaining()
        expect(left > 0, "all pages had arrived before the path could be cut: the test proves nothing")
        return left

    def wait_paused(self, seconds=40):
        """Both sides in postcopy-paused, with pages still to come."""
        for engine in self.engines:
            engine.wait_status("postcopy-paused", seconds)
        self.expect_midway()

    def wait_recovered(self, seconds=60):
        """The source says that it has, for the first time."""
        wait_for("the source recovers", seconds, lambda: self.source.query()["postroad"]["recoveries"] >= 1)

    def wait_completed(self, seconds=60):
        for engine in self.engines:
            info = engine.wait_status("completed", seconds)
            left = info.get("ram", {}).get("remaining")
            expect(left == 0, f"{engine.name} is completed with {left} bytes remaining")

    def expect_guest_sound(self):
        """The guest works on at the destination, and everything that it verifies is right; the source
        QEMU is gone by then."""
        expect(
            self.source_vm.status() in ("paused", "postmigrate"),
            f"the source guest must stay stopped, it is {self.source_vm.status()}",
        )
        self.source_vm.quit()
        self.destination_vm.console.wait_verified(self.destination_vm.spec)
        self.destination_vm.console.expect_sound()

    def expect_source_runs(self):
        """The migration came to nothing: the guest lives on where it was."""
        expect(
            self.source_vm.status() == "running",
            f"the source guest must run, it is {self.source_vm.status()}",
        )
        self.source_vm.console.wait_running("source")
        self.source_vm.console.expect_sound()

    def finish(self):
        """Sees the migration through."""
        self.full_speed()
        self.wait_completed()
        self.expect_guest_sound()

    def finish_over(self, link):
        """Recovers over a link and sees the migration through."""
        self.resume(link=link)
        self.finish()

    def expect_path_taken(self, *wanted):
        """Both sides went through these states one after the other (others may lie between)."""
        for engine in self.engines:
            seen = engine.statuses()
            rest = iter(seen)
            missing = [status for status in wanted if status not in rest]
            expect(not missing, f"{engine.name} went through {seen}, expected {list(wanted)} in order")


__all__ = ["SLOW", "Lab", "Move", "find_built"]
