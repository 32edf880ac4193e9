#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Checks format, licence lines, layers, sizes and line widths, so that a reviewer need not.

The script prints one line for each check, and below it each fault that the check found."""

import ast
import io
import os
import re
import subprocess
import sys
import tokenize

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MAX_LINES = 800
MAX_COLUMNS = 100
TAB = 8

# The rooms of the source tree, and the rooms that each may include besides itself.
# A file belongs to the room with the longest name that matches. HACKING.md has the picture.
UTIL = ("util", "postroad")
GROUND = ("guest", "transport", *UTIL)
SESSION = ("migration/postcopy", "migration/memory", "migration/core", *GROUND)
ROOMS = {
    "include": ("postroad",),
    "util": (),
    "guest": ("guest/agent", "guest/attach", *UTIL),
    "transport": ("transport", *UTIL),
    "migration/core": GROUND,
    "migration/memory": ("migration/core", *GROUND),
    "migration/postcopy": ("migration/memory", "migration/core", *GROUND),
    "migration/session": SESSION,
    "migration/source": ("migration/session", *SESSION),
    "migration/destination": ("migration/session", *SESSION),
    "migration": ("migration", *GROUND),
    "monitor": ("migration", *GROUND),
}
CIRCLE_MAX = 3  # the most files of one room that may include or call each other in a circle
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.M)
NO_LICENCE_LINE = (".md", ".gitignore", ".editorconfig", ".clang-format", ".txt")
NO_LICENCE_FOLDERS = ("LICENSES/",)


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
    return [f"{name}: not formatted by clang-format; run 'make format'" for name in found]


def check_licence(names):
    return [
        f"{name}: no SPDX-License-Identifier in its first lines"
        for name in names
        if not name.endswith(NO_LICENCE_LINE) and not name.startswith(NO_LICENCE_FOLDERS)
        if "SPDX-License-Identifier:" not in "\n".join(read(name).splitlines()[:3])
    ]


def room_of(name):
    """Returns the longest of the rooms that this file is in, or its top folder."""
    inside = [room for room in ROOMS if name.startswith(room + "/")]
    return max(inside, key=len) if inside else name.split("/")[0]


def check_rooms(names):
    wrong = []
    for name in names:
        room = room_of(name)
        if room not in ROOMS or not name.endswith((".c", ".h")):
            continue
        for included in INCLUDE.findall(read(name)):
            if not included.startswith(tuple(other + "/" for other in (room, *ROOMS[room]))):
                wrong.append(f"{name}: includes {included}; allowed: {', '.join((room, *ROOMS[room]))}")
    return wrong


# The definition of a function that is not static, as clang-format writes it; and a possible call.
DEFINITION = re.compile(r"^(?!static\b|typedef\b|extern\b)[A-Za-z_][^;{}=#]*?\b(\w+)\([^;{}]*\)\n\{", re.M)
WORD = re.compile(r"\b(?:pr|agent|attach)_\w+\b")
COMMENT = re.compile(r'/\*.*?\*/|//[^\n]*|"(?:[^"\\\n]|\\.)*"', re.S)


def dependencies(names):
    """Returns for each module (a source with its header) the modules that it includes or calls."""
    sources = [name for name in names if name.endswith((".c", ".h")) and room_of(name) in ROOMS]
    texts = {name: COMMENT.sub("", read(name)) for name in sources}
    homes = {}
    for name in sources:
        for function in DEFINITION.findall(texts[name]):
            homes.setdefault(function, set()).add(name[:-2])
    needs = {}
    for name in sources:
        module = needs.setdefault(name[:-2], set())
        module.update(included[:-2] for included in INCLUDE.findall(read(name)))
        if name.endswith(".c"):
            for word in set(WORD.findall(texts[name])):
                # If several files define a function, each program links one of them.
                if len(homes.get(word, ())) == 1:
                    module.update(homes[word])
    return {
        module: {other for other in others if other in needs and other != module}
        for module, others in needs.items()
    }


def circles(needs):
    """Returns the sets of modules that need each other: Tarjan's strongly connected components."""
    order, low, stack, found = {}, {}, [], []

    def visit(module):
        order[module] = low[module] = len(order)
        stack.append(module)
        for other in sorted(needs[module]):
            if other not in order:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], order[other])
        if low[module] == order[module]:
            at = stack.index(module)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for module in sorted(needs):
        if module not in order:
            visit(module)
    return found


def check_circles(names):
    wrong = []
    for circle in circles(dependencies(names)):
        rooms = {os.path.dirname(module) for module in circle}
        if len(rooms) > 1 or len(circle) > CIRCLE_MAX:
            wrong.append(f"{len(circle)} files of {len(rooms)} rooms need each other: {', '.join(circle)}")
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


def comment_lines(name, text):
    """Returns the numbers of the lines with a comment, a docstring or prose; in C of all lines."""
    lines = text.splitlines()
    interpreter = lines[0] if lines and lines[0].startswith("#!") else ""
    if name.endswith((".c", ".h")):
        return range(1, len(lines) + 1)
    if name.endswith(".md"):
        return prose_lines(lines)
    if name.endswith(".py") or "python" in interpreter:
        return python_comment_lines(text)
    if name.endswith((".sh", "meson.build")) or re.search(r"\b(ba)?sh\b", interpreter):
        return [number for number, line in enumerate(lines, 1) if line.lstrip().startswith("#")]
    return []


def prose_lines(lines):
    """Returns the numbers of a Markdown file's lines outside of tables and code blocks."""
    found, in_code = [], False
    for number, line in enumerate(lines, 1):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        elif not in_code and not line.startswith(("|", "    ", "\t")):
            found.append(number)
    return found


def python_comment_lines(text):
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    found = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found.update(range(node.lineno, node.end_lineno + 1))
    return sorted(found)


def check_columns(names):
    wrong = []
    for name in names:
        text = read(name)
        lines = text.splitlines()
        for number in comment_lines(name, text):
            line = lines[number - 1].expandtabs(TAB)
            if len(line) > MAX_COLUMNS and not re.search(r"https?://", line):
                wrong.append(f"{name}:{number}: {len(line)} columns, more than {MAX_COLUMNS}")
    return wrong


# A wait without a time limit; and the comment that names the event that ends it.
ENDLESS = re.compile(r"\b(g_cond_wait|pthread_cond_wait)\(|\bp?poll\(.*, -1\)")
ENDED = re.compile(r"[Ee]nded (by|as)\b")
LINES_ABOVE = 6
WAITING_FOLDERS = ("guest/", "migration/", "monitor/", "transport/")


def check_waits(names):
    """doc/waits.md describes the waits with a time limit."""
    wrong = []
    for name in names:
        if not name.startswith(WAITING_FOLDERS) or not name.endswith(".c"):
            continue
        lines = read(name).splitlines()
        for number, line in enumerate(lines, 1):
            above = "\n".join(lines[max(0, number - 1 - LINES_ABOVE) : number])
            if ENDLESS.search(line) and not ENDED.search(above):
                wrong.append(f"{name}:{number}: no comment names what ends this wait: {line.strip()}")
    return wrong


CHECKS = {
    "sources are formatted": check_format,
    "files name their licence": check_licence,
    "rooms include only those below them": check_rooms,
    "no circle of files of several rooms, or of many files": check_circles,
    "includes are spelled from the root": check_includes_from_root,
    "files stay small": check_sizes,
    "comments and prose keep within 100 columns": check_columns,
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
