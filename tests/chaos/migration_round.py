# SPDX-License-Identifier: GPL-2.0-or-later
"""One round: a migration, its disturbances, and the checks at its end."""

import contextlib
import time

from harness.process import Failure, expect, wait_for
from harness.qmp import QmpError

from actions import POSTCOPY, Target, run_action
from checks import check_log, check_statistics

SETTLE_SECONDS = 60  # limit for a recovery, on a busy machine
BURST = 16 << 20  # bytes a second
RESUME_EVERY = 0.3  # s
PATIENT = {"heartbeat-timeout": 3000, "handshake-timeout": 20000}  # ms


STARTED = (*POSTCOPY, "completed", "failed", "cancelled")


class Totals:
    """The counts of all rounds."""

    def __init__(self):
        self.rounds = self.steps = self.recoveries = self.pauses = self.kills = 0
        self.bytes = self.verified = self.refused_cancels = self.cancelled = 0
        self.actions = {}

    def note(self, step):
        self.steps += 1
        for action in step.actions:
            self.actions[action.name] = self.actions.get(action.name, 0) + 1


class MigrationRound:
    """One round of a setup."""

    def __init__(self, setup, round_, options, totals, say):
        self.setup = setup
        self.round = round_
        self.options = options
        self.totals = totals
        self.say = say
        self.uris = setup.uris(round_.scheme)
        self.target = Target(setup, self.uris)
        self.current = "before its first step"
        self.started = []  # (start time, description) of each step
        self.recovered = self.paused = 0  # counted by engines that were killed
        self.target.on_restart = self.restarted

    @property
    def engines(self):
        return (self.setup.source, self.setup.destination)

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
        """A new engine has none of the settings that its predecessor was given on the monitor."""
        self.prepare([engine])

    def set_speed(self, bandwidth):
        self.setup.destination.qmp.command(
            "migrate-set-parameters", **{"max-postcopy-bandwidth": bandwidth}
        )

    def migrate(self, resume=False):
        arguments = {"resume": True} if resume else {}
        self.setup.source.qmp.command("migrate", uri=",".join(self.uris), **arguments)

    def begin_and_cancel(self, after_ms):
        """Returns True if the cancel came in time: the guest then runs on at the source."""
        self.migrate()
        time.sleep(after_ms / 1000)
        try:
            self.setup.source.qmp.command("migrate_cancel")
        except QmpError:
            return False
        status = wait_for("the cancelled migration has ended", 30, self._ended_at_source)
        expect(status in ("cancelled", "failed"), f"the source is {status} after migrate_cancel")
        self._end_destination()
        self.setup.expect_source_runs()
        self.totals.cancelled += 1
        return True

    def _ended_at_source(self):
        status = self.setup.source.status()
        return status if status in ("cancelled", "failed", "completed") else None

    def _end_destination(self):
        """Waits for the destination's end. If it waits for a RUN that will not come, cancels it as
        an operator."""

        def is_over():
            status = self.setup.destination.status()
            if status == "postcopy-paused":
                with contextlib.suppress(QmpError):
                    self.setup.destination.qmp.command("migrate_cancel")
            return status in ("none", "cancelled", "failed")

        wait_for("the cancelled migration has ended at the destination", 30, is_over)

    @contextlib.contextmanager
    def patience(self):
        """Long timers until postcopy: a path that fails before that ends the whole migration."""
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
        # The destination shows the end of the previous migration until this one reaches it.
        wait_for("the source is in postcopy", 60, lambda: self.setup.source.status() in STARTED)
        wait_for("both sides are in postcopy", 60, self.is_well)

    # The middle

    def is_well(self):
        states = [engine.status() for engine in self.engines]
        expect(
            all(state not in ("failed", "cancelled") for state in states),
            f"the migration has ended: {states},"
            f" {[engine.query().get('error-desc') for engine in self.engines]}",
        )
        return (
            all(state in ("postcopy-active", "completed") for state in states)
            and states[0] == states[1]
        )

    def is_over(self):
        return self.setup.destination.status() == "completed"

    def recoveries(self):
        return self.setup.source.query()["postroad"]["recoveries"]

    def wait_until_well(self):
        """Waits until the migration is active or completed on both sides. Without auto-recover, or
        after a manual pause, it resumes the migration as an operator would."""
        asked = 0

        def well():
            nonlocal asked
            if self.is_well():
                return True
            by_hand = self.target.paused_by_operator or not self.round.auto
            if (
                by_hand
                and time.monotonic() - asked > RESUME_EVERY
                and self.setup.source.status() == "postcopy-paused"
            ):
                asked = time.monotonic()
                with contextlib.suppress(QmpError):
                    self.migrate(resume=True)
            return False

        wait_for("the migration is well again", SETTLE_SECONDS, well, interval=0.01)
        self.target.paused_by_operator = False

    def hold(self, step, before):
        """Keeps the disturbance up until the migration has recovered in spite of it, or for
        hold_ms. Manual recovery starts later, in wait_until_well()."""
        if not (step.until_recovered and self.round.auto):
            time.sleep(step.hold_ms / 1000)
            return
        wait_for(
            "the migration recovers in spite of the disturbance",
            SETTLE_SECONDS,
            lambda: self.is_over() or self.recoveries() > before,
            interval=0.01,
        )

    @staticmethod
    def answers(step):
        """Whether the destination's monitor answers during the step: it is neither stopped nor
        dead."""
        return not any(
            action.name in ("stall", "kill") and action.side == "destination"
            for action in step.actions
        )

    def do_step(self, step):
        before = self.recoveries()
        self.note_counts(step)
        if step.burst:
            self.set_speed(BURST)
        with contextlib.ExitStack() as undo:
            for action in step.actions:
                undo.enter_context(run_action(self.target, action))
            if step.burst and self.answers(step):
                self.set_speed(self.options.bandwidth)
            self.hold(step, before)
        if step.burst and not self.answers(step):
            self.set_speed(self.options.bandwidth)
        self.wait_until_well()
        self.totals.note(step)
        time.sleep(step.rest_ms / 1000)

    def note_counts(self, step):
        """Saves the counts of a source that is about to be killed."""
        if any(action.name == "kill" and action.side == "source" for action in step.actions):
            there = self.setup.source.query()["postroad"]
            self.recovered += there["recoveries"]
            self.paused += there["pauses"]

    def run_steps(self, wanted):
        """wanted(recoveries): whether to run another step."""
        for number, step in enumerate(self.round.steps):
            if self.is_over() or not wanted(self.recovered + self.recoveries()):
                return
            self.current = f"in step {number}: {step}"
            self.started.append((time.monotonic(), self.current))
            self.say(f"  step {number}: {step}")
            self.do_step(step)

    # The end

    def finish(self):
        self.current = "at the end"
        self.started.append((time.monotonic(), self.current))
        self.set_speed(0)
        self.wait_until_well()
        for engine in self.engines:
            engine.wait_status("completed", 60)
        self.target.check_strangers(wait_for_all=True)
        info = check_statistics(*self.engines)
        self.setup.verify()
        for engine in self.engines:
            check_log(engine)
        there = self.setup.source.query()["postroad"]
        self.totals.rounds += 1
        self.totals.recoveries += self.recovered + there["recoveries"]
        self.totals.pauses += self.paused + there["pauses"]
        self.totals.kills += self.target.kills
        self.totals.bytes += info["ram"]["total"]
        self.totals.verified += info["postroad"].get("verified-pages", 0) * info["ram"]["page-size"]
        self.totals.refused_cancels += self.target.refused_cancels

    def step_at(self, moment):
        """The step that was under way at a moment."""
        began, what = max(
            (each for each in self.started if each[0] <= moment),
            default=(0, "before the first step"),
        )
        return f"{what}, which began at {began:.3f}"

    def run(self, wanted):
        try:
            self.prepare(self.engines)
            self.begin()
            self.run_steps(wanted)
            self.finish()
        except Failure as failure:
            states = {engine.name: describe(engine) for engine in self.engines}
            raise Failure(f"{self.current}: {failure}\n{states}") from None


def describe(engine):
    try:
        info = engine.query()
    except (Failure, OSError) as failure:
        return str(failure)
    return f"{info.get('status')} ({info['postroad'].get('reason')})"


__all__ = ["POSTCOPY", "MigrationRound", "Totals"]
