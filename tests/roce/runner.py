# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs groups of tests on RoCE labs. Two labs run at a time, since tests often wait. Each lab
belongs to its own process (a worker), which runs one test after another.

No test can hang: a test that exceeds its bound is interrupted and fails. If its remains cannot be
removed in time, the next test gets a newly booted lab. All processes that the program has started
end with it, however it ends (supervisor.py)."""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, field

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "..", "..", "soft-roce"), os.path.join(HERE, "..", "e2e")]

from harness.process import Failure  # noqa: E402
from roce_lab import KERNELS, RAILS, Lab, LabError, start_time  # noqa: E402
from supervisor import supervise  # noqa: E402

WORKERS = 2
ENOUGH = 8  # tests; only for more tests a second lab saves more time than its boot takes
CASE_SECONDS = 400
CLEANING_SECONDS = 60
FORK = multiprocessing.get_context("fork")


class OutOfTime(Exception):
    """A test has exceeded its bound."""


@dataclass
class Group:
    """Tests of one kind."""

    name: str
    cases: list  # (name, test)
    perform: object  # (subject, test, notes): runs a test, raises if it fails; notes: report lines
    subject: object  # (lab, build): creates the object that the tests on a lab share; has an end()
    seconds: int = CASE_SECONDS  # bound of a test
    hosts: dict = field(default_factory=dict)  # needs of the lab's hosts: fields of roce_lab.Spec


@contextmanager
def bounded(seconds):
    """Raises OutOfTime in the main thread after that time. Raises it again each CLEANING_SECONDS,
    so that cleaning up is bounded, too."""

    def stop(_number, _frame):
        raise OutOfTime(f"it was interrupted after its bound of {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, CLEANING_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class LabUser:
    """Provides a lab for tests, which need different kinds of hosts one after another."""

    def __init__(self, options):
        self.options = options
        self.build = os.path.abspath(options.build)
        self.lab = Lab.attach(options.lab) if options.lab else None
        self.hosts = None  # the kind of hosts that the lab has; None: it does not run
        self.subjects = {}  # of groups, on this lab
        self.refused = []  # (hosts, error) of labs that did not boot; no second try
        self.left = []  # processes and files that labs left behind

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def have_hosts(self, hosts):
        """Boots a lab with hosts of this kind, unless such a lab runs."""
        if hosts == self.hosts or self.options.lab:
            return
        for refused, error in self.refused:
            if refused == hosts:
                raise error
        self.stop()
        try:
            self._start(hosts)
        except LabError as error:
            self.refused.append((hosts, error))
            raise

    def _start(self, hosts):
        began = time.monotonic()
        self.lab = Lab(build=self.build, **hosts)
        self.lab.start()
        self.hosts = hosts
        seconds, used = time.monotonic() - began, self.lab.cpu_seconds()
        say(
            f"the lab is up under {self.lab.accel}, Linux {self.lab.spec.kernel}"
            f" ({seconds:.1f} s, {used:.1f} s of CPU)"
        )

    def subject(self, group):
        if group.name not in self.subjects:
            self.subjects[group.name] = group.subject(self.lab, self.build)
        return self.subjects[group.name]

    def end_subject(self, group):
        """Ends the object that the group's tests shared. Raises if it ends with an error."""
        subject = self.subjects.pop(group.name, None)
        if hasattr(subject, "end"):
            subject.end()

    def stop(self):
        """Ends the lab, unless it was started outside of this program (--lab)."""
        if self.options.lab or self.hosts is None:
            return
        self.hosts = None
        self.subjects.clear()
        machines, directory = [machine.pid for machine in self.lab.machines], self.lab.directory
        self.lab.stop()
        self.left += [f"process {pid}" for pid in machines if start_time(pid)]
        self.left += [directory] if os.path.exists(directory) else []

    def recover(self):
        """Provides a lab for the next test after a test that failed."""
        try:
            with bounded(CLEANING_SECONDS):
                self.lab.renew(*RAILS)
        except (LabError, OutOfTime) as error:
            if self.options.lab:
                raise
            say(f"the lab is booted again: {error}")
            self.stop()

    def run(self, group, name, test):
        """Runs one test; returns its entry of the results."""
        name = f"{group.name}: {name}"
        try:
            self.have_hosts(group.hosts)
        except LabError as error:
            return report({"name": name, "result": "fail", "seconds": 0, "message": f"the lab: {error}"})
        began, used, notes = time.monotonic(), self.lab.cpu_seconds(), []
        message = why_failed(group.seconds, lambda: group.perform(self.subject(group), test, notes))
        entry = {
            "name": name,
            "result": "fail" if message else "pass",
            "seconds": time.monotonic() - began,
            "cpu_seconds": self.lab.cpu_seconds() - used,  # of both hosts
            "message": message,
            "notes": notes,
        }
        report(entry)
        if message:
            self.recover()
        return entry


def why_failed(seconds, action):
    """Runs an action within a bound. Returns an empty text, or the reason of its failure."""
    try:
        with bounded(seconds):
            action()
    except (Failure, LabError, OutOfTime) as error:
        return str(error) or type(error).__name__
    except Exception:  # pylint: disable=broad-except
        return traceback.format_exc()
    return ""


def say(text):
    """Prints a text with one write, since workers share the output."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def report(entry):
    shown = {"pass": "ok  ", "fail": "FAIL"}[entry["result"]]
    message = f": {entry['message']}" if entry["message"] else ""
    used = f", {entry['cpu_seconds']:.1f} s of CPU" if "cpu_seconds" in entry else ""
    lines = [f"{shown} {entry['name']} ({entry['seconds']:.1f} s{used}){message}"]
    say("\n       ".join(lines + entry.get("notes", [])))
    return entry


# Workers


class Plan:
    """All tests, in their order, and which of them workers have taken. Workers share the plan."""

    FREE, TAKEN = 0, 1

    def __init__(self, wanted, workers):
        self.wanted = wanted
        self.kinds = []  # of hosts
        for group, _, _ in wanted:
            if group.hosts not in self.kinds:
                self.kinds.append(group.hosts)
        self.taken = FORK.Array("b", len(wanted))
        self.users = FORK.Array("i", len(self.kinds))  # workers with such hosts; under taken's lock

    def take(self, current):
        """Returns the index of a test for a worker whose lab has this kind of hosts, or None. A
        worker changes to another kind when no test for its lab remains, preferably to one that no
        worker has."""
        with self.taken.get_lock():
            free = [at for at, taken in enumerate(self.taken) if not taken]
            if not free:
                return None
            kind_of = {at: self.kinds.index(self.wanted[at][0].hosts) for at in free}
            here = self.kinds.index(current) if current in self.kinds else None
            best = min(free, key=lambda at: (kind_of[at] != here, self.users[kind_of[at]] > 0, at))
            if kind_of[best] != here:
                self.users[kind_of[best]] += 1
                if here is not None:
                    self.users[here] -= 1
            self.taken[best] = self.TAKEN
            return best


def work(plan, options, results):
    """Runs a worker, which takes tests until none remains. results: a file that gets a line of JSON
    for each test."""
    with LabUser(options) as user, open(results, "a") as file:

        def note(entry):
            file.write(json.dumps(entry) + "\n")
            file.flush()

        kind, used_groups = None, []
        try:
            while (at := plan.take(kind)) is not None:
                group, name, test = plan.wanted[at]
                # What one group shares may disturb the next: a program that has a device open.
                if used_groups and group is not used_groups[-1]:
                    end_groups(user, used_groups, note)
                kind = group.hosts
                note(user.run(group, name, test))
                if group not in used_groups:
                    used_groups.append(group)
            end_groups(user, used_groups, note)
        finally:
            user.stop()
        note({"left": user.left})


def end_groups(user, groups, note):
    """Ends the objects that the tests of each group shared on a lab. A failure is a result of its
    own."""
    for group in groups:
        message = why_failed(CLEANING_SECONDS, lambda group=group: user.end_subject(group))
        if message:
            note(report({"name": f"{group.name}: end", "result": "fail", "seconds": 0, "message": message}))
    groups.clear()


def run_tests(wanted, options):
    """Returns the results of these tests, and one more on the end of the labs."""
    count = 1 if options.lab or len(wanted) <= ENOUGH else options.jobs
    plan = Plan(wanted, count)
    with tempfile.TemporaryDirectory(prefix="postroad-roce-") as directory:
        files = [os.path.join(directory, str(number)) for number in range(count)]
        supervise([lambda file=file: work(plan, options, file) for file in files])
        results, left = collect(files)
    done = {entry["name"] for entry in results}
    for group, name, _ in wanted:
        if f"{group.name}: {name}" not in done:
            lost = {"name": f"{group.name}: {name}", "result": "fail", "seconds": 0, "message": "its worker has died"}
            results.append(report(lost))
    if not options.lab:
        ended = len(left) == count
        left = sum(left, [])
        message = f"left behind: {', '.join(left)}" if left else "" if ended else "a worker has died"
        entry = {"name": "lab: leaves-nothing-behind", "seconds": 0, "message": message}
        results.append(report({**entry, "result": "fail" if message else "pass"}))
    return results


def collect(files):
    """Reads the files of the workers: the results, and for each worker that ended well the
    processes and files that its labs left behind."""
    results, left = [], []
    for name in filter(os.path.exists, files):
        with open(name) as file:
            for entry in map(json.loads, file):
                if "left" in entry:
                    left.append(entry["left"])
                else:
                    results.append(entry)
    return results, left


def fit(wanted, spec):
    """Returns the tests that can run on the hosts of a running lab."""
    fitting = [each for each in wanted if each[0].hosts.get("kernel", KERNELS[0]) == spec.kernel]
    if len(fitting) < len(wanted):
        say(f"{len(wanted) - len(fitting)} tests are left out, for labs with another kernel than {spec.kernel}")
    return fitting


def run_groups(groups, options):
    wanted = [
        (group, name, test)
        for group in groups
        for name, test in group.cases
        if options.pattern in f"{group.name}: {name}"
    ]
    if options.list:
        print("\n".join(f"{group.name}: {name}" for group, name, _ in wanted))
        return []
    if options.lab:
        wanted = fit(wanted, Lab.attach(options.lab).spec)
    return run_tests(wanted, options) if wanted else []


def exit_on_signals():
    """Lets signals that end the program raise SystemExit, so that it cleans up."""

    def stop(number, _frame):
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)


def main(groups, description):
    """The main function of a program that runs these groups. Returns its exit code."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("pattern", nargs="?", default="", help="run only tests whose name contains this")
    parser.add_argument("--build", default="build", help="build directory (default: build)")
    parser.add_argument("--lab", metavar="DIRECTORY", help="use the lab that runs there")
    parser.add_argument("--jobs", type=int, default=WORKERS, help=f"labs at a time ({WORKERS})")
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
