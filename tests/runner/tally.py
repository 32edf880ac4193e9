# SPDX-License-Identifier: GPL-2.0-or-later
"""Counts test results and prints each."""

import json
import os

SHOWN = {"pass": "ok  ", "fail": "FAIL", "skip": "skip"}


class Tally:
    """The numbers of passed, failed and skipped tests, and the failures, of one stage or of all."""

    def __init__(self):
        self.count = dict.fromkeys(SHOWN, 0)
        self.failures = []

    def add(self, result, name, detail=""):
        """Counts one test, and prints it."""
        self.count[result] += 1
        print(f"{SHOWN[result]} {name}" + (f": {detail}" if detail else ""), flush=True)
        if result == "fail":
            self.note_failure(name, detail)

    def add_output(self, name, done):
        """Counts the run of a program as one test. The end of its output explains a failure."""
        wrong = "\n" + done.stdout[-3000:] if done.returncode else ""
        self.add("fail" if done.returncode else "pass", name, wrong)

    def add_file(self, stage, path, ended):
        """Counts the results in a file that a test program has written. The program has printed its
        tests itself. ended: how the program ended; printed if the file is missing."""
        if not os.path.exists(path):
            self.add("fail", f"{stage}: all of its tests", ended)
            return
        with open(path) as file:
            entries = json.load(file)
        if not entries:
            self.add("fail", f"{stage}: all of its tests", "the program ran no tests")
        for entry in entries:
            self.count[entry["result"]] += 1
            if entry["result"] == "fail":
                self.note_failure(f"{stage}: {entry['name']}", entry.get("message", ""))

    def note_failure(self, name, detail):
        """Adds a failure to the list at the end, with the first non-empty line of its detail."""
        lines = [line.strip() for line in detail.splitlines() if line.strip()]
        self.failures.append(f"{name}: {lines[0]}" if lines else name)

    def merge(self, other):
        for result, count in other.count.items():
            self.count[result] += count
        self.failures += other.failures

    def __str__(self):
        return "{pass} passed, {fail} failed, {skip} skipped".format(**self.count)
