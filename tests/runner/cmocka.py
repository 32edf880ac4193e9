# SPDX-License-Identifier: GPL-2.0-or-later
"""Parses the output of cmocka and the sanitizers in meson's log."""

import re

# cmocka's message about a failed test; the messages come in the order of the tests.
ASSERTION = re.compile(
    r"^(?:ERROR: (.*)\n)?\[ *ERROR *\] --- ((?:.*\n)*?.*?)\s*\[ *LINE *\] --- (.*?)(?:: error: Failure!)?$", re.M
)
# Other messages that explain why a program ended early.
OTHER_ERROR = re.compile(r"^.*(?:ERROR|SUMMARY: \w+Sanitizer|runtime error:).*$", re.M)
# LeakSanitizer's report of a leak, with the stack of the allocation.
LEAK = re.compile(r"^(?:Direct|Indirect) leak of (\d+) byte.*\n((?: +#\d+ .*\n?)+)", re.M)
FRAME = re.compile(r"^ +#\d+ 0x\w+ (?:in )?(.*?)$", re.M)
LEAKS_MAX, FRAMES_MAX = 3, 6  # in the message of a failed test
RESULT = re.compile(r"^\[ *(OK|FAILED|SKIPPED) *\] (?!tests:|\d+ test)(\S.*?)\s*$", re.M)
SKIP_REASON = re.compile(r"^(?!\[).*skip.*$", re.M | re.I)


def split(entry):
    """Returns the result of each test of one program, by name. A program without cmocka has one
    result, whose name is empty."""
    text = entry.get("stdout", "") + entry.get("stderr", "")
    results = {}
    for word, name in RESULT.findall(text):
        result = {"OK": "pass", "SKIPPED": "skip"}.get(word, "fail")
        results[name] = result if results.get(name) != "fail" else "fail"
    if entry["result"] in ("OK", "SKIP"):
        if any(result == "fail" for result in results.values()):
            results["exit code 0 despite failures"] = "fail"
        return results or {"": "pass" if entry["result"] == "OK" else "skip"}
    if "fail" not in results.values():
        results[f"({entry['result'].lower()}, exit code {entry['returncode']})"] = "fail"
    return results


def leaks(text):
    """Returns the stacks that allocated leaked memory: a rare leak must be found from one
    report."""
    found = []
    for size, stack in LEAK.findall(text)[:LEAKS_MAX]:
        found.append(f"{size} bytes from " + " < ".join(FRAME.findall(stack)[:FRAMES_MAX]))
    return "".join(f"; {leak}" for leak in found)


def why_failed(entry, failed):
    """Returns the message of each failed test of one program, by name. failed: the names."""
    text = entry.get("stdout", "") + entry.get("stderr", "")
    said = [f"{line}: {' '.join((message or what).split())}" for message, what, line in ASSERTION.findall(text)]
    if len(said) != len(failed):
        said = [(said or OTHER_ERROR.findall(text) or [""])[-1] + leaks(text)] * len(failed)
    return dict(zip(failed, said))


def report(tally, kind, entry):
    """Counts the tests of one program. After a failure it prints the program's output."""
    executable = f"{kind}: {entry['name'].split(' / ')[-1]}"
    results = split(entry)
    output = entry.get("stdout", "") + entry.get("stderr", "")
    reasons = "; ".join(SKIP_REASON.findall(output)) or "the test gives no reason"
    said = why_failed(entry, [name for name, result in results.items() if result == "fail"])
    for name, result in results.items():
        tally.add(result, f"{executable} {name}".rstrip(), reasons if result == "skip" else said.get(name, ""))
    if "fail" in results.values():
        print(output[-6000:], flush=True)
