# SPDX-License-Identifier: GPL-2.0-or-later
"""What is done to a migration, and in which order: a function of the seed and of nothing else.

A round is one migration, a sequence of steps. Each step is one disturbance, or two at a time, which are held for a while or
until the migration has recovered, then undone; then the migration has to be well again. Which path is meant by "the one in use"
is only known when it is done, and when a round is over before its last step the rest is left out: so a seed that is
repeated does the same things in the same order, at not quite the same moments."""

import random
from dataclasses import dataclass, field

SIDES = ("source", "destination")

# How often each is chosen, of the sum. Name -> weight, by what a recovery is expected after it.
BREAKING = {"cut": 6, "black-hole": 4, "one-way": 5, "pause": 3, "outage": 1, "kill": 3}
SHAKING = {"stall": 4, "cancel": 1, "stranger": 2, "flood": 2, "starve": 1}
BESIDE = ("stall", "cancel", "stranger", "flood")  # also beside another one

STRANGERS = ("silent", "noise", "http", "half-a-header", "huge-hello", "foreign-hello", "foreign-resume", "foreign-lane")


@dataclass
class Action:
    name: str
    side: str = ""  # "source", "destination"
    path: str = ""  # "used": the one in use, "other"
    kind: str = ""  # of a stranger

    def __str__(self):
        return " ".join(word for word in (self.name, self.side, self.path, self.kind) if word)


@dataclass
class Step:
    actions: list
    hold_ms: int
    until_recovered: bool  # hold it until then, not for so long
    burst: bool  # pages come fast when it begins
    rest_ms: int  # before the next

    def __str__(self):
        what = " and ".join(map(str, self.actions))
        hold = "until recovered" if self.until_recovered else f"for {self.hold_ms} ms"
        return f"{what} {hold}{', in a burst' if self.burst else ''}"


@dataclass
class Round:
    number: int
    scheme: str  # "ofi", "tcp", "both"
    auto: bool  # recovers by itself
    standbys: bool
    verify: bool
    read_size: int  # bulk-read-size, bytes
    cancelled: list  # migrations that are cancelled at their beginning, each after so many ms
    steps: list = field(default_factory=list)


def pick(rng, weights):
    return rng.choices(list(weights), weights=list(weights.values()))[0]


def make_action(rng, name):
    action = Action(name)
    if name in ("stall", "pause", "cancel", "flood", "one-way", "kill"):
        action.side = rng.choice(SIDES)
    if name in ("cut", "black-hole", "one-way"):
        action.path = "used" if rng.random() < 0.85 else "other"
    if name == "stranger":
        action.kind = rng.choice(STRANGERS)
    return action


def leave_out(weights, without):
    return {name: weight for name, weight in weights.items() if name not in without}


def make_step(rng, without):
    breaking, shaking = leave_out(BREAKING, without), leave_out(SHAKING, without)
    first = make_action(rng, pick(rng, breaking if rng.random() < 0.75 else shaking))
    actions = [first]
    if rng.random() < 0.3:
        second = make_action(rng, rng.choice([name for name in BESIDE if name not in without]))
        if second.name != first.name:
            actions.append(second)
    names = {action.name for action in actions}
    breaks = first.name in ("cut", "black-hole", "one-way") and first.path == "used"
    hold = rng.randrange(20, 600)
    if "starve" in names:
        hold = rng.randrange(300, 1000)
    return Step(
        actions,
        hold_ms=hold,
        until_recovered=breaks and "stall" not in names and rng.random() < 0.7,
        burst=rng.random() < 0.4,
        rest_ms=rng.choice((0, 0, 10, 50, 100)),
    )


def make_round(seed, number, n_steps, scheme=None, without=(), verify=None):
    """without: names of actions."""
    rng = random.Random(f"{seed}/{number}")
    round_ = Round(
        number,
        scheme=rng.choice(("ofi", "ofi", "tcp", "both")),
        auto=rng.random() < 0.8,
        standbys=rng.random() < 0.8,
        verify=rng.random() < 0.4,
        read_size=rng.choice((4096, 16384, 131072)),
        cancelled=[rng.randrange(0, 60) for _ in range(rng.choice((0, 0, 1, 2)))],
    )
    round_.steps = [make_step(rng, without) for _ in range(n_steps)]
    if scheme:
        round_.scheme = scheme
    if verify is not None:
        round_.verify = verify
    return round_


def make_calm(number, scheme):
    """Nothing happens in it: what is left of it is what may be left of any."""
    return Round(number, scheme or "both", auto=True, standbys=True, verify=False, read_size=131072, cancelled=[])


def chain_of(seed, number):
    """(rounds, whether TLS is used) of a chain: engines that stay, each first a destination and then a source."""
    rng = random.Random(f"{seed}/chain/{number}")
    return rng.randrange(2, 4), number % 2 == 1
