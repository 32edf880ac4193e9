#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Checks what a reviewer should not have to look at: format, licence lines, layers, sizes.

Prints a line for each check, and what is wrong."""

import os
import re
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MAX_LINES = 800

# Who may include whom, by folder: monitor -> migration -> {guest, transport}.
LAYERS = {
    "include": {"postroad"},
    "transport": {"transport"},
    "guest": {"guest", "postroad"},
    "migration": {"migration", "transport", "guest", "postroad"},
    "monitor": {"monitor", "migration", "transport", "guest", "postroad"},
}
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.M)
NO_LICENCE_LINE = (".md", ".gitignore", ".editorconfig", ".clang-format", ".txt")
NO_LICENCE_FOLDERS = ("LICENSES/", "tests/fuzz/corpus/")  # the inputs of a fuzz target have no room for a line


def files():
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        names = listed.stdout.split("\n")
    else:  # not a git checkout
        names = (
            os.path.relpath(os.path.join(folder, name), ROOT)
            for folder, _, inside in os.walk(ROOT)
            for name in inside
        )
    return sorted(
        name
        for name in names
        if os.path.isfile(os.path.join(ROOT, name)) and not name.startswith(("build", ".git/"))
    )


def read(name):
    with open(os.path.join(ROOT, name), errors="replace") as file:
        return file.read()


def check_format(names):
    sources = [name for name in names if name.endswith((".c", ".h"))]
    done = subprocess.run(
        ["clang-format", "--dry-run", "-Werror", "--style=file", *sources],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    found = sorted({line.split(":")[0] for line in done.stderr.splitlines() if ": error:" in line})
    if done.returncode and not found:
        return [done.stderr.strip()]
    return [f"{name}: not as clang-format would have it; run 'make format'" for name in found]


def check_licence(names):
    return [
        f"{name}: no SPDX-License-Identifier in its first lines"
        for name in names
        if not name.endswith(NO_LICENCE_LINE) and not name.startswith(NO_LICENCE_FOLDERS)
        if "SPDX-License-Identifier:" not in "\n".join(read(name).splitlines()[:3])
    ]


def check_layers(names):
    wrong = []
    for name in names:
        allowed = LAYERS.get(name.split("/")[0])
        if not allowed or not name.endswith((".c", ".h")):
            continue
        for included in INCLUDE.findall(read(name)):
            if included.split("/")[0] not in allowed:
                wrong.append(f"{name}: includes {included}; allowed from there: {', '.join(sorted(allowed))}")
    return wrong


def check_includes_from_root(names):
    wrong = []
    for name in names:
        if not name.endswith((".c", ".h")):
            continue
        for included in INCLUDE.findall(read(name)):
            places = (os.path.join(ROOT, included), os.path.join(ROOT, "include", included))
            if not any(os.path.isfile(place) for place in places):
                wrong.append(f"{name}: {included} is not spelled from the root")
    return wrong


def check_sizes(names):
    counted = ((name, read(name).count("\n")) for name in names if name.endswith((".c", ".h", ".py")))
    return [f"{name}: {lines} lines, more than {MAX_LINES}" for name, lines in counted if lines > MAX_LINES]


def check_left_overs(names):
    marks = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b")
    return [
        f"{name}:{number}: {line.strip()}"
        for name in names
        if name.endswith((".c", ".h", ".py", ".sh", "meson.build"))
        for number, line in enumerate(read(name).splitlines(), 1)
        if marks.search(line)
    ]


# Waits without a limit of time.
ENDLESS = re.compile(r"\b(g_cond_wait|pthread_cond_wait)\(|\bp?poll\(.*, -1\)")
ENDED = re.compile(r"[Ee]nded (by|as)\b")
LINES_ABOVE = 6
WAITING_FOLDERS = ("guest/", "migration/", "monitor/", "transport/")


def check_waits(names):
    """doc/waits.md has the others."""
    wrong = []
    for name in names:
        if not name.startswith(WAITING_FOLDERS) or not name.endswith(".c"):
            continue
        lines = read(name).splitlines()
        for number, line in enumerate(lines, 1):
            above = "\n".join(lines[max(0, number - 1 - LINES_ABOVE) : number])
            if ENDLESS.search(line) and not ENDED.search(above):
                wrong.append(f"{name}:{number}: no comment says by what this wait is ended: {line.strip()}")
    return wrong


CHECKS = {
    "sources are formatted": check_format,
    "files name their licence": check_licence,
    "includes only point downwards": check_layers,
    "includes are spelled from the root": check_includes_from_root,
    "files stay small": check_sizes,
    "nothing is left to do": check_left_overs,
    "waits without a bound say what ends them": check_waits,
}


def main():
    names = files()
    failed = 0
    for what, check in CHECKS.items():
        wrong = check(names)
        failed += bool(wrong)
        print(f"{'FAIL' if wrong else 'ok  '} {what}")
        for line in wrong:
            print(f"     {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
