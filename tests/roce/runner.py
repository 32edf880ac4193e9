# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs groups of tests on one RoCE lab, booted once for all of them.

No test can hang: what takes longer than its bound is interrupted and fails, and if what it leaves behind cannot be
cleared away in time, the next test gets a lab that is booted anew."""

import argparse
import json
import os
import signal
import sys
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, field

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.join(HERE, "..", "..", "soft-roce"), os.path.join(HERE, "..", "e2e")]

from harness.process import Failure  # noqa: E402
from roce_lab import KERNELS, RAILS, Lab, LabError, start_time  # noqa: E402

CASE_SECONDS = 400
CLEANING_SECONDS = 60


class OutOfTime(Exception):
    """A test has taken longer than it may."""


@dataclass
class Group:
    """Tests of one kind."""

    name: str
    cases: list  # (name, function)
    perform: object  # (lab, build, function, notes): runs one; raises if it fails. notes: lines for the report
    seconds: int = CASE_SECONDS  # what a test may take
    hosts: dict = field(default_factory=dict)  # what the lab's hosts are like that it needs: roce_lab.Spec


@contextmanager
def bounded(seconds):
    """Raises OutOfTime in the main thread when the time is up, and again each time that it is over once more: what is
    done on the way out is bounded, too."""

    def stop(_number, _frame):
        raise OutOfTime(f"it was interrupted: it may take {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, CLEANING_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Bench:
    """The lab on which the tests are done, one after the other."""

    def __init__(self, options):
        self.options = options
        self.build = os.path.abspath(options.build)
        self.lab = None
        self.hosts = None  # what they are like, of a lab that runs
        self.refused = []  # (hosts, error) of labs that did not boot; no second try

    def __enter__(self):
        if self.options.lab:
            self.lab = Lab.attach(self.options.lab)
        return self

    def _start(self, hosts):
        began = time.monotonic()
        self.lab = Lab(build=self.build, **hosts)
        self.lab.start()
        self.hosts = hosts
        seconds = time.monotonic() - began
        print(f"the lab is up under {self.lab.accel}, Linux {self.lab.spec.kernel} ({seconds:.1f} s)", flush=True)

    def have_hosts(self, hosts):
        """Has a lab with hosts like these."""
        if hosts == self.hosts or self.options.lab:
            return
        for refused, error in self.refused:
            if refused == hosts:
                raise error
        self._stop()
        try:
            self._start(hosts)
        except LabError as error:
            self.refused.append((hosts, error))
            raise

    def _stop(self):
        self.hosts = None
        if self.lab:
            self.lab.stop()

    def __exit__(self, *_):
        if not self.options.lab:
            self._stop()

    def recover(self):
        """Has a lab for the next test, after one that failed."""
        try:
            with bounded(CLEANING_SECONDS):
                self.lab.renew(*RAILS)
        except (LabError, OutOfTime) as error:
            if self.options.lab:
                raise
            print(f"the lab is booted anew: {error}", flush=True)
            self._stop()

    def run(self, group, name, function):
        try:
            self.have_hosts(group.hosts)
        except LabError as error:
            entry = {"name": f"{group.name}: {name}", "result": "fail", "seconds": 0, "message": f"the lab: {error}"}
            report(entry)
            return {**entry, "notes": []}
        began = time.monotonic()
        result, message, notes = "pass", "", []
        try:
            with bounded(group.seconds):
                group.perform(self.lab, self.build, function, notes)
        except (Failure, LabError, OutOfTime) as error:
            result, message = "fail", str(error)
        except Exception:  # pylint: disable=broad-except
            result, message = "fail", traceback.format_exc()
        seconds = time.monotonic() - began
        entry = {"name": f"{group.name}: {name}", "result": result, "seconds": seconds, "message": message}
        report(entry)
        for line in notes:
            print(f"       {line}", flush=True)
        if result == "fail":
            self.recover()
        return {**entry, "notes": notes}


def report(entry):
    shown = {"pass": "ok  ", "fail": "FAIL"}[entry["result"]]
    message = f": {entry['message']}" if entry["message"] else ""
    print(f"{shown} {entry['name']} ({entry['seconds']:.1f} s){message}", flush=True)


def leaves_nothing(bench):
    """A last test: the lab's own end."""
    lab = bench.lab
    pids = [machine.pid for machine in lab.machines]
    began = time.monotonic()
    lab.stop()
    left = [pid for pid in pids if start_time(pid)]
    ok = pids and not left and not os.path.exists(lab.directory)
    entry = {
        "name": "lab: leaves-nothing-behind",
        "result": "pass" if ok else "fail",
        "seconds": time.monotonic() - began,
        "message": "" if ok else f"left behind: processes {left}, {lab.directory}",
    }
    report(entry)
    return entry


def run_groups(groups, options):
    wanted = [
        (group, name, function)
        for group in groups
        for name, function in group.cases
        if options.pattern in f"{group.name}: {name}"
    ]
    if options.list:
        print("\n".join(f"{group.name}: {name}" for group, name, _ in wanted))
        return []
    if options.lab:
        wanted = fit(wanted, Lab.attach(options.lab).spec)
    with Bench(options) as bench:
        results = [bench.run(*each) for each in wanted]
        return [*results, leaves_nothing(bench)] if bench.hosts is not None else results


def fit(wanted, spec):
    """Of these tests those that the hosts of a lab that runs are good for."""
    fitting = [each for each in wanted if each[0].hosts.get("kernel", KERNELS[0]) == spec.kernel]
    if len(fitting) < len(wanted):
        print(f"{len(wanted) - len(fitting)} tests are left out, for labs with another kernel than {spec.kernel}")
    return fitting


def exit_on_signals():
    """Has everything cleaned up when the program is told to end."""

    def stop(number, _frame):
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)


def main(groups, description):
    """The whole of a program that runs these groups; returns its exit code."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("pattern", nargs="?", default="", help="run only tests with this in their name")
    parser.add_argument("--build", default="build", help="build directory (default: build)")
    parser.add_argument("--lab", metavar="DIRECTORY", help="use the lab that runs there")
    parser.add_argument("--results", help="write the results to this file, as JSON")
    parser.add_argument("--list", action="store_true", help="only list the tests")
    options = parser.parse_args()
    exit_on_signals()
    try:
        results = run_groups(groups, options)
    except LabError as error:
        print(f"the lab: {error}", file=sys.stderr)
        results = [{"name": "lab: boots", "result": "fail", "seconds": 0, "message": str(error)}]
    if options.results:
        with open(options.results, "w") as out:
            json.dump(results, out)
    return 1 if any(entry["result"] == "fail" for entry in results) else 0
