# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs stages side by side.

Each stage runs in a process of its own, which leads a process group. Its output goes to a file,
and the scheduler prints the file as a block when the stage has ended. A stage starts when all
stages that it needs have passed, and when the CPUs that the running stages use leave room for
it. Of the stages that can start, the one with the longest time to the end of the run comes first.
An exclusive stage starts when no other stage runs or can start, and then runs alone."""

import contextlib
import ctypes
import json
import os
import re
import signal
import sys
import time
import traceback
from dataclasses import dataclass

from .tally import Tally

POLL_SECONDS = 0.2
PROGRESS_SECONDS = 60  # between two lines of progress while no stage ends
TERM_SECONDS = 60  # a stage has this time to clean up after SIGTERM
PR_SET_PDEATHSIG = 1
TEST_LINE = re.compile(rb"^(?:ok  |FAIL|skip) ", re.M)


@dataclass
class Stage:
    """One entry of the table of stages."""

    name: str
    function: object  # (tally): runs the stage's tests
    needs: tuple = ()  # names of stages that must have passed
    cpus: float = 1  # the number of CPUs that it keeps busy on average
    seconds: int = 10  # duration on 2 CPUs; decides only the order
    exclusive: bool = False  # no other stage runs at the same time
    niceness: int = 0  # a stage that only computes yields to one whose tests measure time
    limit: int = 3000  # seconds; a stage that exceeds it is ended, and has failed
    inputs: tuple = ()  # folders and files that it depends on, for --changed
    implied: bool = False  # runs only if another stage needs it


@dataclass
class Outcome:
    """The results of a stage."""

    tally: Tally
    seconds: float = 0
    cpu_seconds: float = 0
    note: str = ""  # the reason if the stage did not run


def select(stages, names):
    """Returns these stages and all that they need, in the order of the table."""
    by_name = {stage.name: stage for stage in stages}
    wanted, left = set(), list(names)
    while left:
        name = left.pop()
        if name not in wanted:
            wanted.add(name)
            left += by_name[name].needs
    return [stage for stage in stages if stage.name in wanted]


def seconds_to_end(stages):
    """Returns for each stage the time until all stages that need it can have ended, itself
    included."""
    longest = {}
    for stage in reversed(stages):  # a stage comes after those that it needs
        after = [longest[other.name] for other in stages if stage.name in other.needs]
        longest[stage.name] = stage.seconds + max(after, default=0)
    return longest


def choose(ready, running, longest, budget):
    """Returns the stage to start now, or None."""
    if any(stage.exclusive for stage in running):
        return None
    room = budget - sum(stage.cpus for stage in running)
    for stage in sorted(ready, key=lambda stage: -longest[stage.name]):
        if not stage.exclusive and (not running or stage.cpus <= room):
            return stage
    exclusive = [stage for stage in ready if stage.exclusive]
    return exclusive[0] if exclusive and not running else None


class Running:
    """A stage's process."""

    def __init__(self, stage, directory):
        self.stage = stage
        self.log = os.path.join(directory, stage.name.replace(" ", "-") + ".log")
        self.began = time.monotonic()
        self.cut_short = ""
        self.result_fd, theirs = os.pipe()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.log)
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.result_fd)
            self._run_child(theirs)
        os.close(theirs)
        with contextlib.suppress(OSError):  # the child does the same: one of both is first
            os.setpgid(self.pid, self.pid)

    def _run_child(self, result_fd):
        """Runs the stage in its process, and ends the process."""
        code = 1
        try:
            os.setpgid(0, 0)
            signal.signal(signal.SIGTERM, end_group)
            for number in (signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            self._redirect()
            os.nice(self.stage.niceness)
            tally = Tally()
            try:
                self.stage.function(tally)
            except Exception:  # pylint: disable=broad-except
                tally.add("fail", self.stage.name, traceback.format_exc())
            with os.fdopen(result_fd, "w") as file:
                json.dump({"count": tally.count, "failures": tally.failures}, file)
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)

    def _redirect(self):
        null = os.open(os.devnull, os.O_RDONLY)
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for old, new in ((null, 0), (log, 1), (log, 2)):
            os.dup2(old, new)

    def seconds(self):
        return time.monotonic() - self.began

    def output(self):
        with contextlib.suppress(FileNotFoundError), open(self.log, "rb") as file:
            return file.read()
        return b""

    def __str__(self):
        tests = len(TEST_LINE.findall(self.output()))
        return f"{self.stage.name} ({self.seconds():.0f} s" + (f", {tests} tests)" if tests else ")")

    def has_ended(self):
        """Returns whether the process has ended. Sends signals to a process that exceeds its
        limit."""
        if self.seconds() > self.stage.limit and not self.cut_short:
            self.cut_short = f"did not end within {self.stage.limit} s"
            self.signal(signal.SIGTERM)
        if self.seconds() > self.stage.limit + TERM_SECONDS:
            self.signal(signal.SIGKILL)
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def signal(self, number):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def outcome(self):
        """Returns the outcome of a stage that has ended, and kills its remaining processes."""
        seconds = self.seconds()
        self.signal(signal.SIGKILL)  # the kernel does not reuse the group's id before the wait
        _, status, usage = os.wait4(self.pid, 0)
        with os.fdopen(self.result_fd) as file:
            text = file.read()
        tally = Tally()
        if text:
            result = json.loads(text)
            tally.count, tally.failures = result["count"], result["failures"]
        if self.cut_short or not text:
            ended = self.cut_short or f"ended early, exit code {os.waitstatus_to_exitcode(status)}"
            tally.count["fail"] += 1
            tally.note_failure(self.stage.name, ended)
        return Outcome(tally, seconds, usage.ru_utime + usage.ru_stime)


def end_group(_number, _frame):
    """Handles SIGTERM: ends the stage's whole process group, even if the scheduler was killed."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    raise SystemExit(1)


class Scheduler:
    """Runs all stages of one run of tests/run."""

    def __init__(self, stages, budget, directory):
        self.stages = stages
        self.budget = budget
        self.directory = directory
        self.longest = seconds_to_end(stages)
        self.waiting = list(stages)
        self.running = []
        self.outcomes = {}  # by name, in the order of their ends
        self.began = self.last_progress = time.monotonic()

    def run(self):
        """Runs all stages and returns their outcomes. An exception, for example from a signal
        handler, ends the running stages."""
        os.makedirs(self.directory, exist_ok=True)
        try:
            while self.waiting or self.running:
                self._drop_unrunnable()
                self._start()
                self._collect()
        finally:
            self._end_all()
        return self.outcomes

    def _passed(self, name):
        return name in self.outcomes and not self.outcomes[name].tally.count["fail"] and not self.outcomes[name].note

    def _drop_unrunnable(self):
        for stage in list(self.waiting):
            wrong = [name for name in stage.needs if name in self.outcomes and not self._passed(name)]
            if wrong:
                self.waiting.remove(stage)
                self.outcomes[stage.name] = Outcome(Tally(), note=f"not run: {wrong[0]} failed")

    def _start(self):
        while True:
            ready = [stage for stage in self.waiting if all(map(self._passed, stage.needs))]
            stage = choose(ready, [each.stage for each in self.running], self.longest, self.budget)
            if not stage:
                return
            self.waiting.remove(stage)
            self.running.append(Running(stage, self.directory))
            self._print_progress(f"{stage.name} begins")

    def _collect(self):
        time.sleep(POLL_SECONDS)
        for each in [each for each in self.running if each.has_ended()]:
            self.running.remove(each)
            outcome = self.outcomes[each.stage.name] = each.outcome()
            print(f"\n== {each.stage.name}", flush=True)
            sys.stdout.buffer.write(each.output())
            print(f"== {outcome.seconds:.0f} s: {each.stage.name}", flush=True)
            self._print_progress(f"{each.stage.name} has ended: {outcome.tally}")
        if time.monotonic() - self.last_progress > PROGRESS_SECONDS:
            self._print_progress("at work")

    def _print_progress(self, what):
        self.last_progress = time.monotonic()
        print(f"-- {self.last_progress - self.began:4.0f} s: {what}", end="")
        for word, entries in (("running", self.running), ("waiting", [stage.name for stage in self.waiting])):
            if entries:
                print(f"; {word}: {', '.join(map(str, entries))}", end="")
        print(flush=True)

    def _end_all(self):
        for each in self.running:
            each.signal(signal.SIGTERM)
        deadline = time.monotonic() + TERM_SECONDS
        while time.monotonic() < deadline and not all([each.has_ended() for each in self.running]):
            time.sleep(POLL_SECONDS)
        for each in self.running:
            each.signal(signal.SIGKILL)
            each.outcome()


def table(outcomes):
    """Returns the stages with their times and counts, as the lines of a table."""
    lines = [f"{'stage':<16}{'seconds':>8}{'CPU':>8}{'passed':>8}{'failed':>8}{'skipped':>8}"]
    for name, outcome in outcomes.items():
        count = outcome.tally.count
        line = f"{name:<16}{outcome.seconds:>8.0f}{outcome.cpu_seconds:>8.0f}"
        line += "".join(f"{count[result]:>8}" for result in ("pass", "fail", "skip"))
        lines.append(f"{name:<16}{outcome.note}" if outcome.note else line)
    return "\n".join(lines)
