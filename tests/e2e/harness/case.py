# SPDX-License-Identifier: GPL-2.0-or-later
"""Test cases: registered by a decorator, run one after the other, each in a lab of its own."""

import json
import time
import traceback

from .lab import Lab
from .network import require_namespaces
from .process import Failure, Skip

CASES = []


def case(name):
    """Registers a test under the behaviour that it proves."""

    def register(function):
        CASES.append((name, function))
        return function

    return register


def run_case(name, function, lab_options):
    """Returns (result, seconds, message)."""
    began = time.monotonic()
    lab = Lab(**lab_options)
    message = ""
    try:
        require_namespaces()
        with lab:
            try:
                function(lab)
                expect_engines_healthy(lab)
                result = "pass"
            except (Failure, OSError, ArithmeticError, LookupError, TypeError) as error:
                result = "fail"
                kind = "" if isinstance(error, Failure) else traceback.format_exc()
                message = f"{error}\n{kind}{lab.logs()}"
    except Skip as skip:
        result, message = "skip", str(skip)
    except Failure as error:
        result, message = "fail", str(error)
    return result, time.monotonic() - began, message


def expect_engines_healthy(lab):
    """A sanitizer's report or a crash fails the test that it happened in."""
    for process in lab.processes:
        if not process.name.startswith("postroad-"):
            continue
        process.stop()
        output = process.output()
        for mark in ("ERROR: AddressSanitizer", "ERROR: LeakSanitizer", "runtime error:", "CRITICAL", "assertion"):
            if mark in output:
                raise Failure(f"{process.name}: {mark}")
        if process.exit_code() not in (0, -15):
            raise Failure(f"{process.name} ended with {process.exit_code()}")


def run_cases(pattern, lab_options, results_path=None, only_list=False):
    """Prints a line for each test; returns the number of failures."""
    results = []
    for name, function in CASES:
        if pattern and pattern not in name:
            continue
        if only_list:
            print(name)
            continue
        result, seconds, message = run_case(name, function, lab_options)
        shown = {"pass": "ok  ", "fail": "FAIL", "skip": "skip"}[result]
        print(f"{shown} {name} ({seconds:.1f} s)" + (f": {message}" if message else ""), flush=True)
        results.append({"name": name, "result": result, "seconds": seconds, "message": message})
    if results_path:
        with open(results_path, "w") as out:
            json.dump(results, out)
    return sum(1 for entry in results if entry["result"] == "fail")
