# SPDX-License-Identifier: GPL-2.0-or-later
"""Child processes that never outlive the test, and waits for conditions with a deadline."""

import ctypes
import os
import signal
import subprocess
import time

# Seconds that a test waits at most for something to happen. Only a failure takes as long. So the
# bound allows for a machine that is very busy.
LONG = 240

PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None, use_errno=True)


class Failure(Exception):
    """An expectation that was not met, in words for the reader of the report."""


class Skip(Exception):
    """The reason why this machine can't run the test."""


def expect(condition, message):
    if not condition:
        raise Failure(message)


def wait_for(what, seconds, probe, interval=0.03):
    """Returns probe()'s first true value; `what` names the condition in the failure."""
    deadline = time.monotonic() + seconds
    while True:
        value = probe()
        if value:
            return value
        if time.monotonic() > deadline:
            raise Failure(f"waited {seconds} s in vain: {what}")
        time.sleep(interval)


def die_with_parent(how=signal.SIGKILL):
    """Called in a child process: has it killed when the thread that started it ends."""
    LIBC.prctl(PR_SET_PDEATHSIG, how, 0, 0, 0)


def raise_on_signals():
    """Turns the first SIGTERM or SIGHUP into an exception, so that the program cleans up. Further
    signals are ignored, so that they do not interrupt this."""

    def stop(number, _frame):
        for either in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(either, lambda *_: None)
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGHUP, stop)


class Process:
    """A child process with its output in a log file. gently: stop() sends SIGTERM before
    SIGKILL."""

    def __init__(self, name, argv, log, env=None, gently=True):
        self.name = name
        self.gently = gently
        self.log = log
        full_env = {**os.environ, **(env or {})}
        with open(log, "ab") as out:
            self.popen = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=full_env,
                preexec_fn=die_with_parent,
            )

    @property
    def pid(self):
        return self.popen.pid

    def alive(self):
        return self.popen.poll() is None

    def exit_code(self):
        return self.popen.poll()

    def wait(self, seconds=LONG):
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Failure(f"{self.name} (pid {self.pid}) is still running after {seconds} s") from None

    def stop(self):
        """Ends the process."""
        if self.alive() and self.gently:
            self.popen.terminate()
            try:
                self.popen.wait(LONG)
            except subprocess.TimeoutExpired:
                pass
        self.kill()

    def kill(self):
        if self.alive():
            self.popen.kill()
        self.popen.wait()

    def output(self):
        with open(self.log, "r", errors="replace") as log:
            return log.read()
