# SPDX-License-Identifier: GPL-2.0-or-later
"""The QEMUs of several Debian suites, which tests/qemu-versions provides."""

import json
import os
import subprocess
from dataclasses import dataclass

from .process import Failure

SCRIPT = os.path.join(os.path.dirname(__file__), "..", "..", "qemu-versions")


@dataclass
class Version:
    suite: str
    version: str
    program: str

    def number(self):
        """Returns (major, minor), to compare versions."""
        return tuple(map(int, self.version.split(".")[:2]))

    def machine(self, kind):
        """Returns its newest machine type of a kind, which is pc-q35 or pc-i440fx."""
        major, minor = self.number()
        return f"{kind}-{major}.{minor}"


def qemu_versions():
    """Returns the versions from old to new: that of Debian 12, that of Debian 13, and the
    newest."""
    done = subprocess.run([SCRIPT, "--json"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failure(f"some versions of QEMU are missing: {done.stderr.strip()}")
    return [Version(**entry) for entry in json.loads(done.stdout)]
