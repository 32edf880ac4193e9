# SPDX-License-Identifier: GPL-2.0-or-later
"""The checks during and after each migration: answer times, leaks, statistics and logs."""

import os
import re
import time
from dataclasses import dataclass

from harness.process import Failure, expect, wait_for

HERE = os.path.dirname(os.path.abspath(__file__))
LONGEST_ANSWER = 0.5  # s; allows for a machine that itself gets no CPU for a moment


class Poller:
    """Polls one engine's monitor every 50 ms, from a process of its own."""

    bound = LONGEST_ANSWER

    def __init__(self, lab, engine):
        self.name = engine.name
        self.engine = engine
        self.excused = []  # (from, to): the engine could not run then
        argv = [os.path.join(HERE, "poll-monitor"), engine.qmp_path, str(engine.process.pid)]
        self.process = lab.start(f"poll-{engine.name}-{engine.process.pid}", argv, gently=False)

    def answers(self):
        """(start, duration, time without a CPU) of each answer, in seconds."""
        rows = [line.split() for line in self.process.output().splitlines() if line.count(" ") == 2]
        return [tuple(map(float, row)) for row in rows]

    def _is_excused(self, began, took):
        return any(began < to and began + took > since for since, to in self.excused)

    def slowest(self):
        """(start, duration, time without a CPU) of the slowest answer that counts."""
        free = [answer for answer in self.answers() if not self._is_excused(*answer[:2])]
        return max(free, key=lambda answer: answer[1] - answer[2])

    def longest(self):
        """The longest of all durations, of those that count, and of the latter less the time
        without a CPU."""
        answers = self.answers()
        expect(
            answers,
            f"the monitor of {self.name} never answered its poller: {self.process.output()[-500:]}",
        )
        free = [answer for answer in answers if not self._is_excused(*answer[:2])] or [(0, 0, 0)]
        return (
            max(took for _, took, _ in answers),
            max(took for _, took, _ in free),
            max(took - waited for _, took, waited in free),
        )


class SlowestAnswers:
    """The longest answer times of all monitors so far, in seconds."""

    def __init__(self):
        self.any = self.free = self.own = 0.0
        self.answers = 0

    def add(self, poller, migration):
        longest, free, own = poller.longest()
        self.any, self.free, self.own = (
            max(self.any, longest),
            max(self.free, free),
            max(self.own, own),
        )
        self.answers += len(poller.answers())
        if own > poller.bound:
            asked, took, waited = poller.slowest()
            raise Failure(
                f"the monitor of {poller.name} took {took * 1000:.0f} ms to answer,"
                f" {waited * 1000:.0f} ms of that without a CPU, when it was asked at {asked:.3f}; {migration.step_at(asked)}"
            )

    def __str__(self):
        if not self.answers:
            return "not measured"
        return (
            f"{self.own * 1000:.0f} ms ({self.free * 1000:.0f} ms with the time without a CPU,"
            f" {self.any * 1000:.0f} ms while stopped or starved; {self.answers} answers)"
        )


@dataclass
class Resources:
    descriptors: int
    threads: int
    private_kb: int

    @classmethod
    def of(cls, pid):
        with open(f"/proc/{pid}/status") as status:
            text = status.read()
        return cls(
            len(os.listdir(f"/proc/{pid}/fd")),
            len(os.listdir(f"/proc/{pid}/task")),
            int(re.search(r"^RssAnon:\s+(\d+)", text, re.M).group(1)),
        )

    def __str__(self):
        return (
            f"{self.descriptors} descriptors, {self.threads} threads,"
            f" {self.private_kb} KB of private memory"
        )


def settled(pid):
    """The resources of a process if they do not change for 1.2 s; else None. What a migration frees
    late, it frees within a second."""
    before = Resources.of(pid)
    time.sleep(1.2)
    now = Resources.of(pid)
    return now if (now.descriptors, now.threads) == (before.descriptors, before.threads) else None


class LeakCheck:
    """Compares an engine's resources after a migration with those after one without
    disturbances."""

    PRIVATE_KB = 8 * 1024  # growth that is no leak: heap fragmentation, the records of paths

    def __init__(self, memory):
        """memory: check memory, too. Not in sanitizer builds, which keep freed memory and find
        leaks themselves."""
        self.memory = memory
        self.reference = {}  # role -> Resources

    def is_known(self, role):
        return role in self.reference

    def learn(self, role, pid):
        self.reference[role] = wait_for(
            "the resources do not change any more", 30, lambda: settled(pid), interval=0
        )
        return self.reference[role]

    def check(self, role, pid, what):
        allowed = self.reference[role]

        def is_back():
            now = Resources.of(pid)
            return now.descriptors <= allowed.descriptors and now.threads <= allowed.threads

        try:
            wait_for("the resources are released", 60, is_back)
        except Failure:
            raise Failure(
                f"{what} holds {Resources.of(pid)}, after an undisturbed migration {allowed}"
            ) from None
        now = Resources.of(pid)
        expect(
            not self.memory or now.private_kb <= allowed.private_kb + self.PRIVATE_KB,
            f"{what} holds {now}, after an undisturbed migration {allowed}",
        )
        return now


def check_statistics(source, destination):
    """Checks that every page was placed exactly once, and that both sides report the same
    counts."""
    here, there = destination.query(), source.query()
    for name, info in (("source", there), ("destination", here)):
        ram = info["ram"]
        placed = ram["transferred"] + ram["duplicate"] * ram["page-size"]
        expect(
            placed == ram["total"],
            f"{name}: {placed} bytes were placed, there are {ram['total']}: {ram}",
        )
        expect(ram["remaining"] == 0, f"{name}: {ram['remaining']} bytes remain")
    for key in ("transferred", "duplicate"):
        expect(
            here["ram"][key] == there["ram"][key], f"{key} differs: {there['ram']}, {here['ram']}"
        )
    return here


def check_log(engine, from_byte=0):
    output = engine.process.output()[from_byte:]
    for mark in (
        "CRITICAL",
        "placed twice",
        "assertion",
        "ERROR: ",
        "runtime error:",
        "WARNING: ThreadSanitizer",
    ):
        expect(mark not in output, f"{engine.name} logged: {line_with(mark, output)}")


def line_with(mark, text):
    return next((line for line in text.splitlines() if mark in line), "")
