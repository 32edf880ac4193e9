# SPDX-License-Identifier: GPL-2.0-or-later
"""One migration with everything that is done to it, and what has to be true of it in the end."""

import contextlib
import time

from harness.process import Failure, expect, wait_for
from harness.qmp import QmpError

from actions import POSTCOPY, Stage, perform
from watch import check_log, check_statistics

SETTLE_SECONDS = 60  # what a recovery may take, on a machine that does much else
BURST = 16 << 20  # bytes a second
RESUME_EVERY = 0.3  # s
PATIENT = {"heartbeat-timeout": 3000, "handshake-timeout": 20000}  # ms


STARTED = (*POSTCOPY, "completed", "failed", "cancelled")


class Tally:
    """What was survived, over all rounds."""

    def __init__(self):
        self.rounds = self.steps = self.recoveries = self.pauses = self.kills = 0
        self.bytes = self.verified = self.refused_cancels = self.cancelled = 0
        self.actions = {}

    def note(self, step):
        self.steps += 1
        for action in step.actions:
            self.actions[action.name] = self.actions.get(action.name, 0) + 1


class Story:
    """One round of a cast."""

    def __init__(self, cast, round_, options, tally, say):
        self.cast = cast
        self.round = round_
        self.options = options
        self.tally = tally
        self.say = say
        self.uris = cast.uris(round_.scheme)
        self.stage = Stage(cast, self.uris)
        self.where = "before its first step"
        self.times = []  # (when it began, what): each step
        self.recovered = self.paused = 0  # by engines that have been killed since
        self.stage.on_restart = self.restarted

    @property
    def engines(self):
        return (self.cast.source, self.cast.destination)

    # The beginning

    def prepare(self, engines):
        settings = {"auto-recover": self.round.auto, "standby-paths": self.round.standbys}
        if self.options.has_verify:
            settings["verify"] = self.round.verify
        capabilities = [{"capability": name, "state": on} for name, on in settings.items()]
        for engine in engines:
            engine.qmp.command("migrate-set-capabilities", capabilities=capabilities)
            engine.qmp.command("migrate-set-parameters", **{"bulk-read-size": self.round.read_size})
        self.set_speed(self.options.bandwidth)

    def restarted(self, engine):
        """It knows nothing of what its predecessor was told on the monitor."""
        self.prepare([engine])

    def set_speed(self, bandwidth):
        self.cast.destination.qmp.command("migrate-set-parameters", **{"max-postcopy-bandwidth": bandwidth})

    def migrate(self, resume=False):
        arguments = {"resume": True} if resume else {}
        self.cast.source.qmp.command("migrate", uri=",".join(self.uris), **arguments)

    def begin_and_cancel(self, after_ms):
        """TRUE: it came in time, the guest lives on at the source."""
        self.migrate()
        time.sleep(after_ms / 1000)
        try:
            self.cast.source.qmp.command("migrate_cancel")
        except QmpError:
            return False
        status = wait_for("the cancelled migration has ended", 30, self._ended_at_source)
        expect(status in ("cancelled", "failed"), f"the source is {status} after migrate_cancel")
        self._end_destination()
        self.cast.expect_source_runs()
        self.tally.cancelled += 1
        return True

    def _ended_at_source(self):
        status = self.cast.source.status()
        return status if status in ("cancelled", "failed", "completed") else None

    def _end_destination(self):
        """It may have been cancelled, too, or wait for a RUN that never comes: then an operator ends it."""

        def is_over():
            status = self.cast.destination.status()
            if status == "postcopy-paused":
                with contextlib.suppress(QmpError):
                    self.cast.destination.qmp.command("migrate_cancel")
            return status in ("none", "cancelled", "failed")

        wait_for("the cancelled migration has ended at the destination", 30, is_over)

    @contextlib.contextmanager
    def patience(self):
        """For connections that are made meanwhile. A migration whose guest is still at the source fails with its path."""
        before = [engine.qmp.command("query-migrate-parameters") for engine in self.engines]
        for engine in self.engines:
            engine.qmp.command("migrate-set-parameters", **PATIENT)
        yield
        for engine, usual in zip(self.engines, before):
            engine.qmp.command("migrate-set-parameters", **{name: usual[name] for name in PATIENT})

    def begin(self):
        with self.patience():
            self.reach_postcopy()

    def reach_postcopy(self):
        under_way = False
        for after_ms in self.round.cancelled:
            under_way = not self.begin_and_cancel(after_ms)
            if under_way:
                break
        if not under_way:
            self.migrate()
        # The destination says how the one before ended, until it hears of this one.
        wait_for("the source is in postcopy, too", 60, lambda: self.cast.source.status() in STARTED)
        wait_for("both sides are in postcopy", 60, self.is_well)

    # The middle

    def is_well(self):
        states = [engine.status() for engine in self.engines]
        expect(
            all(state not in ("failed", "cancelled") for state in states),
            f"the migration has ended: {states}, {[engine.query().get('error-desc') for engine in self.engines]}",
        )
        return all(state in ("postcopy-active", "completed") for state in states) and states[0] == states[1]

    def is_over(self):
        return self.cast.destination.status() == "completed"

    def recoveries(self):
        return self.cast.source.query()["postroad"]["recoveries"]

    def settle(self):
        """Waits until the migration is well again. Where nobody recovers by itself, an operator does."""
        asked = 0

        def well():
            nonlocal asked
            if self.is_well():
                return True
            by_hand = self.stage.held or not self.round.auto
            if by_hand and time.monotonic() - asked > RESUME_EVERY and self.cast.source.status() == "postcopy-paused":
                asked = time.monotonic()
                with contextlib.suppress(QmpError):
                    self.migrate(resume=True)
            return False

        wait_for("the migration is well again", SETTLE_SECONDS, well, interval=0.01)
        self.stage.held = False

    def hold(self, step, before):
        """A held disturbance is what the recovery has to get around; who recovers by hand waits with that."""
        if not (step.until_recovered and self.round.auto):
            time.sleep(step.hold_ms / 1000)
            return
        wait_for(
            "it recovers in spite of what is done to it",
            SETTLE_SECONDS,
            lambda: self.is_over() or self.recoveries() > before,
            interval=0.01,
        )

    @staticmethod
    def answers(step):
        """Whether the destination is not stopped, and alive, while the step is held."""
        return not any(action.name in ("stall", "kill") and action.side == "destination" for action in step.actions)

    def do_step(self, step):
        before = self.recoveries()
        self.note_counts(step)
        if step.burst:
            self.set_speed(BURST)
        with contextlib.ExitStack() as undo:
            for action in step.actions:
                undo.enter_context(perform(self.stage, action))
            if step.burst and self.answers(step):
                self.set_speed(self.options.bandwidth)
            self.hold(step, before)
        if step.burst and not self.answers(step):
            self.set_speed(self.options.bandwidth)
        self.settle()
        self.tally.note(step)
        time.sleep(step.rest_ms / 1000)

    def note_counts(self, step):
        """What a source that is about to be killed has counted is lost with it."""
        if any(action.name == "kill" and action.side == "source" for action in step.actions):
            there = self.cast.source.query()["postroad"]
            self.recovered += there["recoveries"]
            self.paused += there["pauses"]

    def go_through(self, wanted):
        """wanted: FALSE: it is enough."""
        for number, step in enumerate(self.round.steps):
            if self.is_over() or not wanted(self.recovered + self.recoveries()):
                return
            self.where = f"in step {number}: {step}"
            self.times.append((time.monotonic(), self.where))
            self.say(f"  step {number}: {step}")
            self.do_step(step)

    # The end

    def finish(self):
        self.where = "in the end"
        self.times.append((time.monotonic(), self.where))
        self.set_speed(0)
        self.settle()
        for engine in self.engines:
            engine.wait_status("completed", 60)
        self.stage.watch_strangers(all_of_them=True)
        info = check_statistics(*self.engines)
        self.cast.verify()
        for engine in self.engines:
            check_log(engine)
        there = self.cast.source.query()["postroad"]
        self.tally.rounds += 1
        self.tally.recoveries += self.recovered + there["recoveries"]
        self.tally.pauses += self.paused + there["pauses"]
        self.tally.kills += self.stage.kills
        self.tally.bytes += info["ram"]["total"]
        self.tally.verified += info["postroad"].get("verified-pages", 0) * info["ram"]["page-size"]
        self.tally.refused_cancels += self.stage.refused_cancels

    def around(self, moment):
        """What was being done then."""
        began, what = max((each for each in self.times if each[0] <= moment), default=(0, "before the first step"))
        return f"{what}, which began at {began:.3f}"

    def run(self, wanted):
        try:
            self.prepare(self.engines)
            self.begin()
            self.go_through(wanted)
            self.finish()
        except Failure as failure:
            states = {engine.name: describe(engine) for engine in self.engines}
            raise Failure(f"{self.where}: {failure}\n{states}") from None


def describe(engine):
    try:
        info = engine.query()
    except (Failure, OSError) as failure:
        return str(failure)
    return f"{info.get('status')} ({info['postroad'].get('reason')})"


__all__ = ["POSTCOPY", "Story", "Tally"]
