# SPDX-License-Identifier: GPL-2.0-or-later
"""The QEMUs of several Debian suites, as tests/qemu-versions has them."""

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
        """Major and minor, to compare."""
        return tuple(map(int, self.version.split(".")[:2]))

    def machine(self, kind):
        """Its newest machine type of a kind, pc-q35 or pc-i440fx."""
        major, minor = self.number()
        return f"{kind}-{major}.{minor}"


def qemu_versions():
    """From old to new: that of Debian 12, that of Debian 13, and the newest."""
    done = subprocess.run([SCRIPT, "--json"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failure(f"not all versions of QEMU are there: {done.stderr.strip()}")
    return [Version(**entry) for entry in json.loads(done.stdout)]
