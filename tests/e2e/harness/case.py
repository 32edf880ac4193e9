# SPDX-License-Identifier: GPL-2.0-or-later
"""Test cases: registered by a decorator, each in a process and a lab of its own. They mostly wait, so several run at a
time: three light ones, which have no QEMU, or two others, or one that has to be alone."""

import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import time
import traceback

from .lab import Lab
from .network import require_namespaces
from .process import Failure, Skip, die_with_parent

# A busy machine gives a process no CPU for seconds: that is no silence.
PATIENT = ("heartbeat-timeout=3000", "connect-timeout=5000", "handshake-timeout=20000")

CASES = []
ROOM = 6
TAKES = {}  # how much of it, by name


def case(name, light=False, alone=False):
    """Registers a test under the behaviour that it proves. Alone: it measures how soon something happens, or keeps the
    machine so busy that others would be disturbed."""

    def register(function):
        CASES.append((name, function))
        TAKES[name] = ROOM if alone else ROOM // 3 if light else ROOM // 2
        return function

    return register


def run_case(name, function, lab_options):
    """Returns (result, seconds, message)."""
    began = time.monotonic()
    lab = Lab(settings=PATIENT, **lab_options)
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


def run_in_child(name, lab_options, answer):
    """The whole life of one test's process. That it ends when its parent does is its way to be interrupted, too: the
    lab is cleared away, whatever the parent has died of."""
    die_with_parent(signal.SIGTERM)
    signal.signal(signal.SIGINT, lambda *_: None)  # the parent has it, too, and says what to do
    if os.getppid() == multiprocessing.parent_process().pid:
        answer.send(run_case(name, dict(CASES)[name], lab_options))


def outcome_of(process, answer, began):
    """What a test's process has sent, or how it has ended instead."""
    try:
        return answer.recv()
    except EOFError:
        process.join()
        return "fail", time.monotonic() - began, f"the test's process ended with {process.exitcode}"


def run_side_by_side(names, lab_options):
    """Yields (name, outcome) as they end. In processes: threads that start others' processes get in each other's way."""
    context = multiprocessing.get_context("fork")
    waiting, running, room = list(names), {}, ROOM
    try:
        while waiting or running:
            while waiting and room >= TAKES[waiting[0]]:
                name = waiting.pop(0)
                room -= TAKES[name]
                answer, theirs = context.Pipe(duplex=False)
                process = context.Process(target=run_in_child, args=(name, lab_options, theirs))
                process.start()
                theirs.close()
                running[answer] = (name, process, time.monotonic())
            for answer in multiprocessing.connection.wait(running):
                name, process, began = running.pop(answer)
                outcome = outcome_of(process, answer, began)
                process.join()
                answer.close()
                room += TAKES[name]
                yield name, outcome
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.join()


def run_cases(patterns, lab_options, results_path=None, only_list=False):
    """Prints a line for each test; returns the number of failures."""
    results = []
    names = [name for name, _ in CASES if not patterns or any(pattern in name for pattern in patterns)]
    if only_list:
        print("\n".join(names))
        return 0
    names.sort(key=TAKES.get)
    for name, (result, seconds, message) in run_side_by_side(names, lab_options):
        shown = {"pass": "ok  ", "fail": "FAIL", "skip": "skip"}[result]
        print(f"{shown} {name} ({seconds:.1f} s)" + (f": {message}" if message else ""), flush=True)
        results.append({"name": name, "result": result, "seconds": seconds, "message": message})
    if results_path:
        with open(results_path, "w") as out:
            json.dump(results, out)
    return sum(1 for entry in results if entry["result"] == "fail")
