# SPDX-License-Identifier: GPL-2.0-or-later
"""Stores a hash of the inputs with which each stage last passed, for tests/run --changed."""

import hashlib
import json
import os
import platform
import subprocess

# Every stage depends on these files.
COMMON = ("tests/run", "tests/runner", "tests/suite.py")
VARIABLES = ("CC", "CFLAGS", "LDFLAGS", "PATH", "QEMU")
VARIABLE_PREFIXES = ("POSTROAD_", "PAIR_", "TEST_")
PACKAGES = "/var/lib/dpkg/status"  # compilers, libraries, QEMU, Python


def read(path):
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b"(none)"


def source_files(root):
    listed = subprocess.run(
        ["git", "-C", root, "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, check=True
    )
    return sorted(listed.stdout.splitlines())


def environment():
    """Returns, as text, everything but the files of the check-out that stages depend on."""
    chosen = [f"{k}={v}" for k, v in os.environ.items() if k in VARIABLES or k.startswith(VARIABLE_PREFIXES)]
    packages = hashlib.sha256(read(PACKAGES)).hexdigest()
    return "\n".join([*sorted(chosen), platform.platform(), packages, str(os.geteuid()), str(os.cpu_count())])


class Memory:
    """The hash of each stage's inputs when it last passed, in a file."""

    def __init__(self, root, path, builds):
        """builds: the build directories, on whose options stages depend."""
        self.root = root
        self.path = path
        self.files = source_files(root)
        self.common = environment()
        for build in builds:
            options = read(os.path.join(root, build, "meson-info", "intro-buildoptions.json"))
            self.common += "\n" + hashlib.sha256(options).hexdigest()
        try:
            self.passed = json.loads(read(path))
        except ValueError:
            self.passed = {}

    def hash_of(self, stage):
        """Returns the hash of a stage's inputs. stage.inputs has names of files and folders; "." is
        the whole check-out."""
        inputs = COMMON + stage.inputs
        state = hashlib.sha256(self.common.encode())
        for name in self.files:
            if "." in inputs or any(name == each or name.startswith(each + "/") for each in inputs):
                state.update(f"{name}\0".encode() + hashlib.sha256(read(os.path.join(self.root, name))).digest())
        return state.hexdigest()

    def is_unchanged(self, stage):
        return self.passed.get(stage.name) == self.hash_of(stage)

    def begin(self, stages):
        """Computes the hashes before the stages run, because files may change while they run."""
        self.begun = {stage.name: self.hash_of(stage) for stage in stages}

    def remember(self, outcomes):
        """Stores the hashes of the stages that passed, and removes those of the others."""
        for name, outcome in outcomes.items():
            self.passed.pop(name, None)
            if outcome.tally.count["pass"] and not outcome.tally.count["fail"]:
                self.passed[name] = self.begun[name]
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        with open(self.path, "w") as file:
            json.dump(self.passed, file)
