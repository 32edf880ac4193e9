# SPDX-License-Identifier: GPL-2.0-or-later
"""The devices that a guest can have, by the names that tests use, with QEMU's arguments for
each."""

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
    # The same device at the same address, with other registers. QEMU notices this only as it loads
    # the state.
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

# The word that tells the guest to use a device (tests/guest/linux/devices.c). Any other word only
# makes it load the drivers.
USES = {"vga": "vram", "vga-32m": "vram", "virtio-vga": "vram", "blk": "disk", "rng": "rng"}


def uses(names):
    return ",".join(USES.get(name, "drivers") for name in names)


def disk_image(lab):
    """Returns the path of one image for both sides. The QEMU whose guest runs has it locked."""
    path = lab.path("disk.img")
    if not os.path.exists(path):
        with open(path, "wb") as image:
            image.truncate(DISK_MB << 20)
    return path


def device_arguments(lab, names):
    disk = disk_image(lab) if "blk" in names else None
    return [word.format(disk=disk) for name in names for word in DEVICES[name]]


def pflash_arguments(lab, name):
    """Returns QEMU's arguments for OVMF, and those for -machine. The code is read-only. Each side
    has its own copy of the variables. QEMU keeps pflash in private RAM blocks."""
    expect(os.path.exists(OVMF_CODE), f"{OVMF_CODE} is missing; tests/deps.sh installs it")
    variables = lab.path(f"{name}.vars")
    shutil.copyfile(OVMF_VARS, variables)
    drives = [
        *("-blockdev", f"file,node-name=code,filename={OVMF_CODE},read-only=on"),
        *("-blockdev", f"file,node-name=vars,filename={variables}"),
    ]
    return drives, ",pflash0=code,pflash1=vars"
