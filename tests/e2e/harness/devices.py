# SPDX-License-Identifier: GPL-2.0-or-later
"""The devices that a guest can have, by the names that tests call them, and QEMU's arguments for each."""

import os
import shutil

from .process import expect

DISK_MB = 8

OVMF_CODE = "/usr/share/OVMF/OVMF_CODE_4M.fd"
OVMF_VARS = "/usr/share/OVMF/OVMF_VARS_4M.fd"

DEVICES = {
    "vga": ["-device", "VGA"],
    "vga-32m": ["-device", "VGA,vgamem_mb=32"],
    "virtio-vga": ["-device", "virtio-vga"],
    "virtio-gpu": ["-device", "virtio-gpu-pci"],
    "net": ["-netdev", "user,id=net0,restrict=on", "-device", "virtio-net-pci,netdev=net0"],
    "net-hub": ["-netdev", "hubport,id=net1,hubid=0", "-device", "virtio-net-pci,netdev=net1"],
    "e1000": ["-netdev", "user,id=net2,restrict=on", "-device", "e1000,netdev=net2"],
    "rng": ["-object", "rng-random,id=rng0,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng0"],
    # The same device in the same place, with other registers: QEMU finds out when it loads.
    "rng-modern": [
        *("-object", "rng-random,id=rng0,filename=/dev/urandom"),
        *("-device", "virtio-rng-pci,rng=rng0,disable-legacy=on"),
    ],
    "balloon": ["-device", "virtio-balloon-pci"],
    "usb": ["-device", "qemu-xhci,id=usb0", "-device", "usb-tablet,bus=usb0.0"],
    "blk": [
        *("-blockdev", "file,node-name=disk0,filename={disk},locking=on"),
        *("-device", "virtio-blk-pci,drive=disk0,serial=postroad"),
    ],
}

# What the guest does with them: tests/guest/linux/devices.c. Any word has it load the drivers.
USES = {"vga": "vram", "vga-32m": "vram", "virtio-vga": "vram", "blk": "disk", "rng": "rng"}


def uses(names):
    return ",".join(USES.get(name, "drivers") for name in names)


def disk_image(lab):
    """One for both sides, which QEMU locks for the side that runs."""
    path = lab.path("disk.img")
    if not os.path.exists(path):
        with open(path, "wb") as image:
            image.truncate(DISK_MB << 20)
    return path


def device_arguments(lab, names):
    disk = disk_image(lab) if "blk" in names else None
    return [word.format(disk=disk) for name in names for word in DEVICES[name]]


def pflash_arguments(lab, name):
    """OVMF, read-only, and its variables, a copy for each side: pflash is one of QEMU's private RAM blocks. Returns the
    arguments, and what -machine has to say."""
    expect(os.path.exists(OVMF_CODE), f"{OVMF_CODE} is not there; tests/deps.sh installs it")
    variables = lab.path(f"{name}.vars")
    shutil.copyfile(OVMF_VARS, variables)
    drives = [
        *("-blockdev", f"file,node-name=code,filename={OVMF_CODE},read-only=on"),
        *("-blockdev", f"file,node-name=vars,filename={variables}"),
    ]
    return drives, ",pflash0=code,pflash1=vars"
