# SPDX-License-Identifier: GPL-2.0-or-later
"""The disturbances of a migration and their order, which depend on the seed only.

A round is one migration with a sequence of steps. Each step is one disturbance, or two at a time.
They last for a while or until the migration has recovered. Then they are undone, and the migration
has to get well again. The path in use is looked up when an action starts, and a round whose
migration completes early skips its remaining steps. So a repeated seed has the same actions in the
same order, at slightly different times."""

import random
from dataclasses import dataclass, field

SIDES = ("source", "destination")

# Name -> weight in the random choice. A recovery is expected after a breaking action.
BREAKING = {"cut": 6, "black-hole": 4, "one-way": 5, "pause": 3, "outage": 1, "kill": 3}
HARMLESS = {"stall": 4, "cancel": 1, "stranger": 2, "flood": 2, "starve": 1}
COMBINABLE = ("stall", "cancel", "stranger", "flood")  # may also be the second action of a step

STRANGERS = (
    "silent",
    "noise",
    "http",
    "half-a-header",
    "huge-hello",
    "foreign-hello",
    "foreign-resume",
    "foreign-lane",
)


@dataclass
class Action:
    name: str
    side: str = ""  # "source", "destination"
    path: str = ""  # "used": the path in use; "other": the other one
    kind: str = ""  # of a stranger (STRANGERS)

    def __str__(self):
        return " ".join(word for word in (self.name, self.side, self.path, self.kind) if word)


@dataclass
class Step:
    actions: list
    hold_ms: int
    until_recovered: bool  # it lasts until the migration has recovered, instead of hold_ms
    burst: bool  # the bandwidth limit is raised when it begins
    rest_ms: int  # pause before the next step

    def __str__(self):
        what = " and ".join(map(str, self.actions))
        hold = "until recovered" if self.until_recovered else f"for {self.hold_ms} ms"
        return f"{what} {hold}{', in a burst' if self.burst else ''}"


@dataclass
class Round:
    number: int
    scheme: str  # "ofi", "tcp", "both"
    auto: bool  # capability auto-recover
    standbys: bool
    verify: bool
    read_size: int  # bulk-read-size, bytes
    cancelled: list  # ms after which earlier attempts are cancelled
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
    breaking, harmless = leave_out(BREAKING, without), leave_out(HARMLESS, without)
    first = make_action(rng, pick(rng, breaking if rng.random() < 0.75 else harmless))
    actions = [first]
    if rng.random() < 0.3:
        second = make_action(rng, rng.choice([name for name in COMBINABLE if name not in without]))
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
    """without: the names of actions that are not used."""
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


def make_undisturbed(number, scheme):
    """A round without disturbances. Its resources at the end are the limit for other rounds."""
    return Round(
        number,
        scheme or "both",
        auto=True,
        standbys=True,
        verify=False,
        read_size=131072,
        cancelled=[],
    )


def chain_of(seed, number):
    """(rounds, TLS) of a chain, in which each engine is a destination first and then a source."""
    rng = random.Random(f"{seed}/chain/{number}")
    return rng.randrange(2, 4), number % 2 == 1
