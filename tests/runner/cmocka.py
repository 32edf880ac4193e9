# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads what cmocka and the sanitizers print, as meson's log has it."""

import re

# What cmocka says of a test that fails, in the order of the tests; and why a program has ended
# early.
ASSERTION = re.compile(
    r"^(?:ERROR: (.*)\n)?\[ *ERROR *\] --- ((?:.*\n)*?.*?)\s*\[ *LINE *\] --- (.*?)(?:: error: Failure!)?$", re.M
)
LAST_WORDS = re.compile(r"^.*(?:ERROR|SUMMARY: \w+Sanitizer|runtime error:).*$", re.M)
# What LeakSanitizer says of a leak, with the stack that allocated it.
LEAK = re.compile(r"^(?:Direct|Indirect) leak of (\d+) byte.*\n((?: +#\d+ .*\n?)+)", re.M)
FRAME = re.compile(r"^ +#\d+ 0x\w+ (?:in )?(.*?)$", re.M)
LEAKS_TOLD, FRAMES_TOLD = 3, 6
RESULT = re.compile(r"^\[ *(OK|FAILED|SKIPPED) *\] (?!tests:|\d+ test)(\S.*?)\s*$", re.M)
SKIP_REASON = re.compile(r"^(?!\[).*skip.*$", re.M | re.I)


def split(entry):
    """The result of each test of one program, by name; with the name "" that of a program
    without cmocka."""
    text = entry.get("stdout", "") + entry.get("stderr", "")
    results = {}
    for word, name in RESULT.findall(text):
        result = {"OK": "pass", "SKIPPED": "skip"}.get(word, "fail")
        results[name] = result if results.get(name) != "fail" else "fail"
    if entry["result"] in ("OK", "SKIP"):
        if any(result == "fail" for result in results.values()):
            results["exit code 0 in spite of failures"] = "fail"
        return results or {"": "pass" if entry["result"] == "OK" else "skip"}
    if "fail" not in results.values():
        results[f"({entry['result'].lower()}, exit code {entry['returncode']})"] = "fail"
    return results


def leaks(text):
    """Where leaked memory was allocated. A rare leak has to be found from one report."""
    told = []
    for size, stack in LEAK.findall(text)[:LEAKS_TOLD]:
        told.append(f"{size} bytes from " + " < ".join(FRAME.findall(stack)[:FRAMES_TOLD]))
    return "".join(f"; {leak}" for leak in told)


def why_failed(entry, failed):
    """For each of these failed tests of one program the message that it printed."""
    text = entry.get("stdout", "") + entry.get("stderr", "")
    said = [f"{line}: {' '.join((message or what).split())}" for message, what, line in ASSERTION.findall(text)]
    if len(said) != len(failed):
        said = [(said or LAST_WORDS.findall(text) or [""])[-1] + leaks(text)] * len(failed)
    return dict(zip(failed, said))


def report(tally, kind, entry):
    """Counts the tests of one program; the whole output follows a failure."""
    executable = f"{kind}: {entry['name'].split(' / ')[-1]}"
    results = split(entry)
    output = entry.get("stdout", "") + entry.get("stderr", "")
    reasons = "; ".join(SKIP_REASON.findall(output)) or "gives no reason"
    said = why_failed(entry, [name for name, result in results.items() if result == "fail"])
    for name, result in results.items():
        tally.add(result, f"{executable} {name}".rstrip(), reasons if result == "skip" else said.get(name, ""))
    if "fail" in results.values():
        print(output[-6000:], flush=True)
