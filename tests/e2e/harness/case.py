# SPDX-License-Identifier: GPL-2.0-or-later
"""Test cases: registered by a decorator, run one after the other, each in a lab of its own. Light ones, which have no
QEMU and mostly wait, run several at a time."""

import json
import multiprocessing
import time
import traceback
from concurrent.futures import ProcessPoolExecutor

from .lab import Lab
from .network import require_namespaces
from .process import Failure, Skip

CASES = []
LIGHT = set()  # names
LIGHT_AT_ONCE = 3


def case(name, light=False):
    """Registers a test under the behaviour that it proves."""

    def register(function):
        CASES.append((name, function))
        if light:
            LIGHT.add(name)
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


def run_named(name, lab_options):
    return run_case(name, dict(CASES)[name], lab_options)


def run_light(names, lab_options):
    """Yields each one's outcome. In processes: threads that start others' processes get in each other's way."""
    if not names:
        return
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(LIGHT_AT_ONCE, mp_context=fork) as pool:
        yield from zip(names, pool.map(run_named, names, [lab_options] * len(names)))


def run_heavy(names, lab_options):
    for name in names:
        yield name, run_named(name, lab_options)


def run_cases(pattern, lab_options, results_path=None, only_list=False):
    """Prints a line for each test; returns the number of failures."""
    results = []
    names = [name for name, _ in CASES if not pattern or pattern in name]
    if only_list:
        print("\n".join(names))
        return 0
    light, heavy = ([name for name in names if (name in LIGHT) is wanted] for wanted in (True, False))
    outcomes = (run_light(light, lab_options), run_heavy(heavy, lab_options))
    for name, (result, seconds, message) in (outcome for kind in outcomes for outcome in kind):
        shown = {"pass": "ok  ", "fail": "FAIL", "skip": "skip"}[result]
        print(f"{shown} {name} ({seconds:.1f} s)" + (f": {message}" if message else ""), flush=True)
        results.append({"name": name, "result": result, "seconds": seconds, "message": message})
    if results_path:
        with open(results_path, "w") as out:
            json.dump(results, out)
    return sum(1 for entry in results if entry["result"] == "fail")
