# SPDX-License-Identifier: GPL-2.0-or-later
"""Linux guests that are booted once in a run, and saved. Tests start from the saved guest: under
TCG that takes a tenth of the CPU time of a boot.

An image is a folder with QEMU's migration stream, and a list of the holes in the files of the
guest's RAM. As QEMU loads the stream it allocates zero pages, too. A guest that has booted has
holes there, and an engine treats holes and zeros differently. So the holes are punched again after
the load."""

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import re
import subprocess

from .process import LIBC, expect, wait_for

STREAM, HOLES = "stream", "holes"
COPY_SECONDS = 120
# The files of QEMU's memory backends, as /proc/PID/fd shows them.
RAM_FILE = re.compile(r"memory-backend|qemu_back_mem|/dev/shm/")
KEEP_SIZE, PUNCH_HOLE = 1, 2  # of fallocate()


def ram_files(vm):
    """Returns paths of the files of a QEMU's RAM, in the order of their creation."""
    folder = f"/proc/{vm.process.pid}/fd"
    found = {}  # by inode: the preload agent has descriptors of its own
    for number in sorted(map(int, os.listdir(folder))):
        path = f"{folder}/{number}"
        if RAM_FILE.search(os.readlink(path)):
            found.setdefault(os.stat(path).st_ino, path)
    return list(found.values())


def holes(path):
    """Returns (start, end) of each hole of a file."""
    found, at = [], 0
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        while at < size:
            start = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            try:
                at = os.lseek(file.fileno(), start, os.SEEK_DATA)
            except OSError:  # no data follows
                at = size
            if start < at:
                found.append((start, at))
    return found


def punch(path, ranges):
    with open(path, "r+b") as file:
        for start, end in ranges:
            code = LIBC.fallocate(
                file.fileno(), KEEP_SIZE | PUNCH_HOLE, ctypes.c_int64(start), ctypes.c_int64(end - start)
            )
            expect(code == 0, f"{path}: fallocate: {os.strerror(ctypes.get_errno())}")


@contextlib.contextmanager
def descriptor(vm, argv, end, **files):
    """Gives QEMU one end of a pipe, as "image". A process (argv) copies between the other end and a
    file. QEMU itself may not be able to open the file, because of its sandbox or its user."""
    process = subprocess.Popen(argv, **{end: subprocess.PIPE}, **files)
    pipe = getattr(process, end)
    try:
        vm.qmp.pass_descriptor("image", pipe.fileno())
        pipe.close()
        yield
        code = process.wait(COPY_SECONDS)
        expect(code == 0, f"{vm.name}: {' '.join(argv)}, which copies the saved guest, ended with {code}")
    finally:
        process.kill()
        process.wait()


def save(vm, folder):
    """Saves a guest. It is stopped then."""
    vm.qmp.command("stop")
    with open(os.path.join(folder, HOLES), "w") as file:
        json.dump([holes(path) for path in ram_files(vm)], file)
    with open(os.path.join(folder, STREAM), "wb") as file, descriptor(vm, ["cat"], "stdin", stdout=file):
        vm.qmp.command("migrate", uri="fd:image")
        wait_for(
            f"{vm.name} is saved",
            COPY_SECONDS,
            lambda: vm.qmp.command("query-migrate")["status"] in ("completed", "failed"),
        )
    said = vm.qmp.command("query-migrate")
    expect(said["status"] == "completed", f"{vm.name} could not be saved: {said}")


def load(vm, folder, keep_holes=True):
    """Loads a saved guest into a QEMU that was started with -incoming defer, and lets it run."""
    with descriptor(vm, ["cat", os.path.join(folder, STREAM)], "stdout"):
        vm.qmp.command("migrate-incoming", uri="fd:image")
        wait_for(f"the guest of {vm.name} is loaded", COPY_SECONDS, lambda: vm.status() == "paused")
    if keep_holes:
        with open(os.path.join(folder, HOLES)) as file:
            for path, ranges in zip(ram_files(vm), json.load(file), strict=True):
                punch(path, ranges)
    vm.qmp.command("cont")


class Images:
    """The saved guests of one run, in a folder. The first test that asks for an image boots the
    guest. Others that ask for the same image wait meanwhile."""

    def __init__(self, folder):
        self.folder = folder

    def get(self, guest, boot):
        """Returns the folder of an image. guest: a text; guests with the same text have the same
        image. boot(): returns a QEMU whose guest has booted."""
        folder = os.path.join(self.folder, hashlib.sha256(guest.encode()).hexdigest()[:16])
        unfinished = f"{folder}.new"
        with open(f"{folder}.lock", "w") as lock:
            # Ended by the test that boots the guest: its end releases the lock, too.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not os.path.exists(folder):
                os.makedirs(unfinished, exist_ok=True)
                vm = boot()
                save(vm, unfinished)
                vm.quit()
                os.rename(unfinished, folder)
        return folder
