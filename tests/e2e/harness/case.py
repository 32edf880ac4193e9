# SPDX-License-Identifier: GPL-2.0-or-later
"""Test cases: registered by a decorator, each in a process and a lab of its own. They mostly wait, so several run at a
time: the machine has a number of shares, and each test takes some of them."""

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

# A busy machine may give a process no CPU for seconds, in which it is silent.
PATIENT = ("heartbeat-timeout=5000", "connect-timeout=10000", "handshake-timeout=60000")

# What a test takes of the machine. On 2 CPUs run 6 tests with two QEMUs each, or 9 with test guests, or 3 that boot a
# guest: all of these need about as much CPU time as there is.
SHARES = 9 * os.cpu_count()
WITH_QEMU, LIGHT, HEAVY = 3, 2, 6


@dataclass
class Case:
    name: str
    function: Callable
    shares: int


CASES = {}  # by name


def case(name, light=False, heavy=False, alone=False):
    """Registers a test under the behaviour that it proves. light: it has no QEMU. heavy: it boots guests, or starts many
    processes. alone: others would disturb its measurement, or it would disturb others."""

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
            except (Failure, OSError, ArithmeticError, LookupError, TypeError) as error:
                result = "fail"
                kind = "" if isinstance(error, Failure) else traceback.format_exc()
                message = f"{error}\n{kind}{lab.logs()}"
    except Skip as skip:
        result, message = "skip", str(skip)
    except Failure as error:
        result, message = "fail", str(error)
    return Outcome(name, result, time.monotonic() - began, cpu_seconds(), message)


def cpu_seconds():
    """What this process and its children have used."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


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


def run_in_child(name, lab_options, answer):
    """The whole life of a test's process. It ends when its parent does, whatever the parent has died of, and clears
    the lab away."""
    die_with_parent(signal.SIGTERM)
    signal.signal(signal.SIGINT, lambda *_: None)  # the parent gets it, too, and ends this process
    if os.getppid() == multiprocessing.parent_process().pid:
        answer.send(run_case(name, lab_options))


def outcome_of(name, process, answer, began):
    """What a test's process has sent, or how it has ended instead."""
    try:
        return answer.recv()
    except EOFError:
        process.join()
        message = f"the test's process ended with {process.exitcode}"
        return Outcome(name, "fail", time.monotonic() - began, 0, message)


def run_side_by_side(names, lab_options):
    """Yields the outcomes as the tests end. Each test has a process: threads that start processes would let these inherit
    each other's descriptors."""
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
    # The longest first, so that short ones fill the gaps at the end.
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
