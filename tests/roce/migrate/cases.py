# SPDX-License-Identifier: GPL-2.0-or-later
"""The tests: each is a migration over rdma: to which something happens on the way.

After each of them the guest has to verify all of its memory at the destination."""

import time

from cast import RAILS, Move, expect, renew_rails

CASES = []
DEAD_SECONDS = 20
RACES = 8
ANSWER_SECONDS = 2.0  # an idle monitor needs a few ms; the rest is the emulated hosts'


def case(name):
    """Registers a test under the behaviour that it proves."""

    def register(function):
        CASES.append((name, function))
        return function

    return register


class Stage:
    """What one test has; gone at its end, with both rails whole again."""

    def __init__(self, lab, build):
        self.lab, self.build = lab, build
        self.moves = []
        self.rows = []

    def move(self, **kind):
        move = Move(self.lab, self.build, **kind)
        move.rows = self.rows
        self.moves.append(move)
        return move

    def logs(self):
        return "\n".join(move.logs() for move in self.moves)

    def close(self):
        for move in self.moves:
            move.close()
        renew_rails(self.lab)


def both_rails(move):
    return move.uri(1), move.uri(2)


@case("migration-over-rdma-completes")
def completes(stage):
    move = stage.move()
    move.start(move.uri(1))
    move.finish()


@case("failover-to-rail-2-and-back-to-rail-1-each-cut-in-mid-postcopy")
def there_and_back(stage):
    move = stage.move()
    move.start_slowly(*both_rails(move))
    for lost, left in ((1, 2), (2, 1)):
        cut = move.cut(lambda rail=lost: stage.lab.cut(rail))
        cut.wait_active()
        cut.expect_path(move.uri(left))
        cut.report()
        stage.lab.mend(lost)
    move.finish()


def fails_over(stage, what):
    """Rail 1 is broken in some way, nobody asks for anything, and rail 2 is taken."""
    move = stage.move()
    move.start_slowly(*both_rails(move))
    cut = move.cut(what)
    cut.wait_active()
    cut.expect_path(move.uri(2))
    cut.report()
    move.finish()


def add_failover_case(fault, host=None):
    where = {None: "on-both-hosts", "a": "at-the-source", "b": "at-the-destination"}[host]
    name = f"failover-after-{fault}-{where}"
    CASES.append((name, lambda stage: fails_over(stage, lambda: stage.lab.inject(fault, 1, host))))


for each in ("link-down", "address-del", "rdma-del", "blackhole"):
    for side in ("a", "b"):
        add_failover_case(each, side)
add_failover_case("blackhole")


@case("failover-after-cable-pulled-at-one-end")
def one_end(stage):
    fails_over(stage, lambda: stage.lab.cut(1, "b"))


@case("both-rails-dead-for-20-s-keep-both-sides-paused-until-one-is-back")
def both_dead(stage):
    move = stage.move()
    move.start_slowly(*both_rails(move))

    def cut_both():
        for rail in RAILS:
            stage.lab.cut(rail)

    cut = move.cut(cut_both)
    cut.wait_paused()
    slowest = 0.0
    while time.time() - cut.at < DEAD_SECONDS:
        for engine in move.engines:
            began = time.monotonic()
            engine.query()
            slowest = max(slowest, time.monotonic() - began)
        cut.expect_only_paused()
    expect(slowest < ANSWER_SECONDS, f"a monitor took {slowest:.1f} s to answer while both rails were dead")
    stage.rows.append(f"both rails dead for {DEAD_SECONDS} s, slowest monitor answer {slowest * 1000:.0f} ms")
    left = move.expect_midway()
    cut.expect_only_paused()
    stage.lab.mend(2)
    cut.wait_active(120)
    expect(left > 0, "nothing was left to be moved")
    cut.report()
    move.finish()


@case("recover-by-hand-over-rail-2-with-auto-recover-off")
def by_hand(stage):
    move = stage.move(settings=("auto-recover=off",))
    move.start_slowly(*both_rails(move))
    cut = move.cut(lambda: stage.lab.cut(1))
    cut.wait_paused()
    move.source.hmp(f"migrate -d -r {move.uri(2)}")
    cut.wait_active()
    cut.expect_path(move.uri(2))
    cut.report()
    move.finish()


@case("all-rdma-dead-falls-back-to-tcp")
def falls_back(stage):
    move = stage.move()
    move.start_slowly(*both_rails(move), move.uri(1, "tcp"))

    def remove_devices():
        for rail in RAILS:
            stage.lab.inject("rdma-del", rail)

    cut = move.cut(remove_devices)
    cut.wait_active(120)
    cut.expect_path(move.uri(1, "tcp"))
    cut.report()
    move.finish()


def cut_rail_2_in_recovery(move):
    """Whether the rail was cut before the recovery had got through: that is a race, on purpose."""
    again = move.cut(lambda: move.source.hmp(f"migrate -d -r {move.uri(2)}"))
    again.wait_seen("postcopy-recover-setup", 30, [move.source])
    move.lab.cut(2)
    again.wait_seen("postcopy-paused", 60, [move.source])
    move.wait_all("postcopy-paused")
    move.lab.mend(2)
    return all("postcopy-active" not in again.statuses(engine) for engine in move.engines)


@case("cut-during-recovery-twice-leads-back-to-the-pause")
def cut_during_recovery(stage):
    """The rail that the recovery has just begun to take is lost, too."""
    move = stage.move(settings=("auto-recover=off",))
    move.start_slowly(*both_rails(move))
    first = move.cut(lambda: stage.lab.cut(1))
    first.wait_paused()
    hits = 0
    for _ in range(RACES):
        hits += cut_rail_2_in_recovery(move)
        if hits == 2:
            break
    expect(hits == 2, f"{RACES} recoveries, and only {hits} were cut before they had got through")
    stage.rows.append(f"{hits} recoveries cut")
    last = move.cut(lambda: move.source.hmp(f"migrate -d -r {move.uri(2)}"))
    last.wait_seen("postcopy-active", 60)
    last.expect_path(move.uri(2))
    move.finish()


@case("cut-between-the-messages-of-a-recovery-leads-back-to-the-pause")
def cut_between_messages(stage):
    move = stage.move(settings=("auto-recover=off",))
    move.start_slowly(*both_rails(move))
    first = move.cut(lambda: stage.lab.cut(1))
    first.wait_paused()
    for messages in range(1, 4):
        uri = f"faulty+{move.uri(2)}?cut-after-messages={messages}"
        again = move.cut(lambda to=uri: move.source.hmp(f"migrate -d -r {to}"))
        again.wait_seen("postcopy-paused", 60, [move.source])
        move.wait_all("postcopy-paused")
        again.expect_only_paused()
    move.source.hmp(f"migrate -d -r {move.uri(2)}")
    first.wait_active()
    first.expect_path(move.uri(2))
    first.report()
    move.finish()
