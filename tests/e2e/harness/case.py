# SPDX-License-Identifier: GPL-2.0-or-later
"""Test cases. A decorator registers them. Each runs in its own process and its own lab. They mostly
wait, so several run at a time: the machine has a number of shares, and each test takes some."""

import json
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import tempfile
import time
import traceback
from dataclasses import dataclass
from typing import Callable

from .images import Images
from .lab import Lab
from .network import require_namespaces
from .process import Failure, Skip, die_with_parent

# A busy machine may give an engine no CPU for seconds, in which it is silent.
PATIENT = ("heartbeat-timeout=5000", "connect-timeout=10000", "handshake-timeout=60000")

# The shares that a test takes. On 2 CPUs run 6 tests with QEMUs, or 9 light ones, or 3 heavy ones:
# each of these sets needs about as much CPU time as there is, and up to 5 GB of memory. More CPUs
# than 8 would take too much memory.
SHARES = 9 * min(os.cpu_count(), 8)
WITH_QEMU, LIGHT, HEAVY = 3, 2, 6


@dataclass
class Case:
    name: str
    function: Callable
    shares: int


CASES = {}  # by name


def case(name, light=False, heavy=False, alone=False):
    """Registers a test under the behaviour that it proves. light: it has no QEMU. heavy: it boots
    a guest of its own, has many processes, or takes much memory. alone: it runs while no other
    test runs, because they would disturb each other."""

    if name in CASES:
        raise ValueError(f"there are two tests called {name}")

    def register(function):
        shares = SHARES if alone else HEAVY if heavy else LIGHT if light else WITH_QEMU
        CASES[name] = Case(name, function, shares)
        return function

    return register


@dataclass
class Outcome:
    name: str
    result: str  # "pass", "fail" or "skip"
    seconds: float
    cpu_seconds: float  # of all processes of the test
    message: str = ""


def run_case(name, lab_options):
    began = time.monotonic()
    lab = Lab(settings=PATIENT, **lab_options)
    message = ""
    try:
        require_namespaces()
        with lab:
            try:
                CASES[name].function(lab)
                expect_engines_healthy(lab)
                result = "pass"
            except (Failure, OSError, ArithmeticError, LookupError, TypeError, ValueError) as error:
                result = "fail"
                kind = "" if isinstance(error, Failure) else traceback.format_exc()
                message = f"{error}\n{kind}{lab.logs()}"
    except Skip as skip:
        result, message = "skip", str(skip)
    except Failure as error:
        result, message = "fail", str(error)
    return Outcome(name, result, time.monotonic() - began, cpu_seconds(), message)


def cpu_seconds():
    """Returns the CPU time that this process and its children have used."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def expect_engines_healthy(lab):
    """Fails the test in which an engine crashed, or a sanitizer reported something."""
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


def run_in_child(name, lab_options, answer):
    """Runs in the process of a test. When the parent dies, however that happens, this process gets
    SIGTERM and removes its lab."""
    die_with_parent(signal.SIGTERM)
    signal.signal(signal.SIGINT, lambda *_: None)  # the parent gets it as well, and ends us
    if os.getppid() == multiprocessing.parent_process().pid:
        answer.send(run_case(name, lab_options))


def outcome_of(name, process, answer, began):
    """Returns the outcome that a test's process has sent. If it sent none, the test has failed."""
    try:
        return answer.recv()
    except EOFError:
        process.join()
        message = f"the test's process ended with {process.exitcode}"
        return Outcome(name, "fail", time.monotonic() - began, 0, message)


def run_side_by_side(names, lab_options):
    """Yields the outcomes as the tests end. Each test has its own process, because threads that
    start processes disturb each other: die_with_parent() is about the thread that starts a
    process."""
    context = multiprocessing.get_context("fork")
    waiting, running, free = list(names), {}, SHARES
    try:
        while waiting or running:
            while waiting and free >= CASES[waiting[0]].shares:
                name = waiting.pop(0)
                free -= CASES[name].shares
                answer, theirs = context.Pipe(duplex=False)
                process = context.Process(target=run_in_child, args=(name, lab_options, theirs))
                process.start()
                theirs.close()
                running[answer] = (name, process, time.monotonic())
            for answer in multiprocessing.connection.wait(running):
                name, process, began = running.pop(answer)
                outcome = outcome_of(name, process, answer, began)
                process.join()
                answer.close()
                free += CASES[name].shares
                yield outcome
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.join()


def print_outcome(outcome):
    shown = {"pass": "ok  ", "fail": "FAIL", "skip": "skip"}[outcome.result]
    times = f"{outcome.seconds:.1f} s, {outcome.cpu_seconds:.1f} s of CPU"
    print(f"{shown} {outcome.name} ({times})" + (f": {outcome.message}" if outcome.message else ""), flush=True)


def run_cases(patterns, lab_options, results_path=None, only_list=False):
    """Prints a line for each test; returns the number of failures."""
    names = [name for name in CASES if not patterns or any(pattern in name for pattern in patterns)]
    if only_list:
        print("\n".join(names))
        return 0
    # Tests that take long come first. Short ones then fill the gaps at the end.
    names.sort(key=lambda name: -CASES[name].shares)
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="postroad-images-") as folder:
        for outcome in run_side_by_side(names, {**lab_options, "images": Images(folder)}):
            print_outcome(outcome)
            outcomes.append(outcome)
    if results_path:
        with open(results_path, "w") as out:
            json.dump([vars(outcome) for outcome in outcomes], out)
    return sum(1 for outcome in outcomes if outcome.result == "fail")
