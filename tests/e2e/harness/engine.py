# SPDX-License-Identifier: GPL-2.0-or-later
"""One engine (`postroad`) beside one guest. Tests control it like an operator, with postroadctl,
and like a management program, over QMP."""

import signal
import subprocess

from .process import LONG, Failure, expect, wait_for
from .qmp import Qmp


class Engine:
    def __init__(
        self,
        lab,
        host,
        guest_option,
        incoming=None,
        name=None,
        settings=(),
        tls=None,
        options=(),
        wrapper=(),
        program="postroad",
    ):
        """tls: a directory of certificates; without it the engine is --insecure. wrapper: a command
        that execs the engine."""
        self.lab = lab
        self.name = name or f"postroad-{host.name}"
        self.qmp_path = lab.path(f"{self.name}.qmp")
        self.ctl = lab.build_file("postroadctl")
        argv = [lab.engine_file(program), "--guest", guest_option, "--qmp", self.qmp_path, "--log", "debug"]
        argv += ["--state-dir", lab.path(f"state-{self.name}")]
        argv += ["--incoming", incoming] if incoming else []
        argv += ["--tls-dir", tls] if tls else ["--insecure"]
        argv += options
        for setting in (*lab.settings, *settings):
            argv += ["--set", setting]
        self.argv = host.command([*wrapper, *argv])
        self.process = lab.start(self.name, self.argv, lab.sanitizer_env)
        self.qmp = Qmp(self.qmp_path)

    def note_killed(self):
        """Waits until the engine is dead. The test wanted it killed, so its exit code is no
        failure."""
        self.process.wait()
        expect(self.process.exit_code() == -9, f"{self.name} ended with {self.process.exit_code()}")
        self.process.name = f"killed-{self.name}"
        self.qmp.close()

    def kill(self):
        """kill -9."""
        self.process.kill()
        self.note_killed()

    def restart(self, *options, kill_at=None, freeze_at=None):
        """Starts a new process with the old arguments and `options`. kill_at, freeze_at: the crash
        point where it kills or stops itself."""
        env = dict(self.lab.sanitizer_env, **({"POSTROAD_KILL": kill_at} if kill_at else {}))
        env.update({"POSTROAD_FREEZE": freeze_at} if freeze_at else {})
        self.process = self.lab.start(self.name, self.argv + list(options), env)

    def restart_to_be_killed(self, point):
        """Replaces the process by one that kills itself at this crash point."""
        self.process.stop()
        self.restart(kill_at=point)
        self.connect()

    def restart_to_freeze(self, point):
        """Replaces the process by one that stops itself (SIGSTOP) at this crash point."""
        self.process.stop()
        self.restart(freeze_at=point)
        self.connect()

    def wait_frozen(self):
        wait_for(f"{self.name} stops at its crash point", LONG, lambda: "stopped at its crash point" in self.process.output())

    def thaw(self):
        self.process.popen.send_signal(signal.SIGCONT)

    def connect(self):
        """Connects to the monitor of the new process."""
        self.qmp = Qmp(self.qmp_path)

    def resume(self):
        """Starts the engine again with --resume, as an operator or systemd does after it has
        died."""
        self.restart("--resume")
        self.connect()

    def hmp(self, line, seconds=LONG):
        """Returns what postroadctl prints for one HMP line."""
        done = self.postroadctl(line, seconds)
        if done.returncode:
            raise Failure(f"{self.name}: '{line}' failed: {done.stdout}{done.stderr}")
        return done.stdout

    def refused(self, line, *words):
        """Runs an HMP line that must be refused, with these words in the message."""
        done = self.postroadctl(line, LONG)
        said = (done.stdout + done.stderr).strip()
        expect(done.returncode != 0, f"{self.name}: '{line}' was not refused; it said: {said!r}")
        for word in words:
            expect(word in said, f"{self.name}: the refusal of '{line}' lacks {word!r}: {said!r}")
        return said

    def postroadctl(self, line, seconds):
        try:
            return subprocess.run(
                [self.ctl, self.qmp_path, line],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise Failure(f"{self.name}: no answer to '{line}' in {seconds} s") from None

    def query(self):
        return self.qmp.command("query-migrate")

    def paths(self):
        return self.qmp.command("query-paths")

    def status(self):
        return self.query().get("status", "none")

    def remaining(self):
        return self.query().get("ram", {}).get("remaining", 0)

    def wait_status(self, status, seconds=LONG):
        try:
            wait_for(f"{self.name} is {status}", seconds, lambda: self.status() == status)
        except Failure as failure:
            info = self.query()
            raise Failure(f"{failure}; it is {info.get('status')}: {info.get('error-desc')}") from None
        return self.query()

    def statuses(self):
        """Returns the states of the migration so far, from the events."""
        events = self.qmp.drain_events()
        return [event["data"]["status"] for event in events if event["event"] == "MIGRATION"]

    def wait_said(self, words, seconds=LONG):
        """Waits for an event whose reason contains these words, or one of several."""
        wanted = (words,) if isinstance(words, str) else words
        wait_for(
            f"{self.name} says {words!r}",
            seconds,
            lambda: any(word in (reason or "") for _, reason in self.reasons() for word in wanted),
        )

    def reasons(self):
        """Returns (state, reason or None) of each event so far."""
        events = self.qmp.drain_events()
        return [
            (event["data"]["status"], event["data"].get("reason"))
            for event in events
            if event["event"] == "MIGRATION"
        ]
