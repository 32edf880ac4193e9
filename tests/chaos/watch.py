# SPDX-License-Identifier: GPL-2.0-or-later
"""What is watched all the time, and what must be the same after each migration."""

import os
import re
import time
from dataclasses import dataclass

from harness.process import Failure, expect, wait_for

HERE = os.path.dirname(os.path.abspath(__file__))
LONGEST_ANSWER = 0.5  # s; what a machine that is itself not run loses is in it


class Poller:
    """Asks one engine's monitor every 50 ms, in a process of its own."""

    bound = LONGEST_ANSWER

    def __init__(self, lab, engine):
        self.name = engine.name
        self.engine = engine
        self.excused = []  # (from, to): the engine could not run then
        argv = [os.path.join(HERE, "poll-monitor"), engine.qmp_path, str(engine.process.pid)]
        self.process = lab.start(f"poll-{engine.name}-{engine.process.pid}", argv, gently=False)

    def answers(self):
        """(asked at, took, waited for a CPU) of each answer, and of the one that is still due."""
        rows = [line.split() for line in self.process.output().splitlines() if line.count(" ") == 2]
        return [tuple(map(float, row)) for row in rows]

    def _is_excused(self, began, took):
        return any(began < to and began + took > since for since, to in self.excused)

    def slowest(self):
        """(asked at, took, waited for a CPU) of the slowest answer that counts."""
        free = [answer for answer in self.answers() if not self._is_excused(*answer[:2])]
        return max(free, key=lambda answer: answer[1] - answer[2])

    def longest(self):
        """(longest of all, longest while the engine was to have a CPU, the same without the waits for a CPU)."""
        answers = self.answers()
        expect(answers, f"the monitor of {self.name} never answered its poller: {self.process.output()[-500:]}")
        free = [answer for answer in answers if not self._is_excused(*answer[:2])] or [(0, 0, 0)]
        return (
            max(took for _, took, _ in answers),
            max(took for _, took, _ in free),
            max(took - waited for _, took, waited in free),
        )


class Longest:
    """The longest answers of all monitors so far, in seconds."""

    def __init__(self):
        self.any = self.free = self.own = 0.0
        self.answers = 0

    def add(self, poller, story):
        longest, free, own = poller.longest()
        self.any, self.free, self.own = max(self.any, longest), max(self.free, free), max(self.own, own)
        self.answers += len(poller.answers())
        if own > poller.bound:
            asked, took, waited = poller.slowest()
            raise Failure(
                f"the monitor of {poller.name} took {took * 1000:.0f} ms to answer, {waited * 1000:.0f} ms of that without"
                f" a CPU, when it was asked at {asked:.3f}; {story.around(asked)}"
            )

    def __str__(self):
        if not self.answers:
            return "not measured"
        return (
            f"{self.own * 1000:.0f} ms ({self.free * 1000:.0f} ms with the waits for a CPU,"
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
        return f"{self.descriptors} descriptors, {self.threads} threads, {self.private_kb} KB of private memory"


def settled(pid):
    """What lingers after a migration ends by itself, within a second each: what is held, if it stays the same for so long."""
    before = Resources.of(pid)
    time.sleep(1.2)
    now = Resources.of(pid)
    return now if (now.descriptors, now.threads) == (before.descriptors, before.threads) else None


class Leaks:
    """Compares what an engine holds after a migration with what it held after one without disturbances."""

    PRIVATE_KB = 8 * 1024  # that may be more: pieces between what lives on, the traces of paths

    def __init__(self, memory):
        """memory: look at that, too: not in builds with a sanitizer, which keeps what is freed, and knows leaks itself."""
        self.memory = memory
        self.reference = {}  # role -> Resources

    def is_known(self, role):
        return role in self.reference

    def learn(self, role, pid):
        self.reference[role] = wait_for("nothing is given back any more", 30, lambda: settled(pid), interval=0)
        return self.reference[role]

    def check(self, role, pid, what):
        allowed = self.reference[role]

        def is_back():
            now = Resources.of(pid)
            return now.descriptors <= allowed.descriptors and now.threads <= allowed.threads

        try:
            wait_for("everything is given back", 60, is_back)
        except Failure:
            raise Failure(f"{what} holds {Resources.of(pid)}, after a calm migration {allowed}") from None
        now = Resources.of(pid)
        expect(
            not self.memory or now.private_kb <= allowed.private_kb + self.PRIVATE_KB,
            f"{what} holds {now}, after a calm migration {allowed}",
        )
        return now


def check_statistics(source, destination):
    """Every page was placed exactly once, and both sides say the same."""
    here, there = destination.query(), source.query()
    for name, info in (("source", there), ("destination", here)):
        ram = info["ram"]
        placed = ram["transferred"] + ram["duplicate"] * ram["page-size"]
        expect(placed == ram["total"], f"{name}: {placed} bytes were placed, there are {ram['total']}: {ram}")
        expect(ram["remaining"] == 0, f"{name}: {ram['remaining']} bytes remain")
    for key in ("transferred", "duplicate"):
        expect(here["ram"][key] == there["ram"][key], f"{key} differs: {there['ram']}, {here['ram']}")
    return here


def check_log(engine, from_byte=0):
    output = engine.process.output()[from_byte:]
    for mark in ("CRITICAL", "placed twice", "assertion", "ERROR: ", "runtime error:", "WARNING: ThreadSanitizer"):
        expect(mark not in output, f"{engine.name} said: {line_with(mark, output)}")


def line_with(mark, text):
    return next((line for line in text.splitlines() if mark in line), "")
