# SPDX-License-Identifier: GPL-2.0-or-later
"""The corpora of the fuzz targets: one file a target, tests/fuzz/corpus/TARGET.inputs.

Each line is the name of an input, a space and the input's bytes. All bytes but printable ASCII are
percent-encoded, and so are the space and the percent sign. So a changed input is one line of a
diff. The lines are sorted by name. replay.c reads the same files."""

import os
import string
from urllib.parse import quote_from_bytes, unquote_to_bytes

HERE = os.path.dirname(os.path.abspath(__file__))
HEADER = "# SPDX-License-Identifier: GPL-2.0-or-later\n"
LITERAL = string.punctuation.replace("%", "")


def file_of(target):
    return os.path.join(HERE, "corpus", target + ".inputs")


def read(target):
    """The inputs of a target by their names."""
    try:
        with open(file_of(target), encoding="ascii") as file:
            lines = (line.rstrip("\n").split(" ", 1) for line in file if not line.startswith("#"))
            return {name: unquote_to_bytes(data) for name, data in lines}
    except FileNotFoundError:
        return {}


def write(target, inputs):
    with open(file_of(target), "w", encoding="ascii") as file:
        file.write(HEADER)
        for name in sorted(inputs):
            file.write(f"{name} {quote_from_bytes(inputs[name], safe=LITERAL)}\n")


def unpack(target, folder):
    """Makes a folder that holds just the inputs of a target, a file each, for libFuzzer."""
    os.makedirs(folder, exist_ok=True)
    for name in os.listdir(folder):
        os.unlink(os.path.join(folder, name))
    for name, data in read(target).items():
        with open(os.path.join(folder, name), "wb") as file:
            file.write(data)


def pack(target, folder):
    """Makes the files of a folder the inputs of a target."""
    inputs = {}
    for name in os.listdir(folder):
        with open(os.path.join(folder, name), "rb") as file:
            inputs[name] = file.read()
    write(target, inputs)
