# SPDX-License-Identifier: GPL-2.0-or-later
"""The builds of the tests, and the unit and in-process tests that each build runs."""

import glob
import json
import os
import subprocess
from dataclasses import dataclass

from . import cmocka
from .keepers import some_huge_pages

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# The number of tests of one build that run at a time, for each CPU. Most tests mostly wait.
TESTS_A_CPU = 2

SANITIZER_ENV = {
    "ASAN_OPTIONS": "detect_leaks=1:detect_stack_use_after_return=1",
    "LSAN_OPTIONS": "print_suppressions=0",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
}

# -O1 and line numbers: it compiles in half the time of -O2 -g, and sanitizer reports need no more.
LIGHT = ["-Dinvariants=enabled", "-Doptimization=1", "-Dc_args=-g1"]


@dataclass(frozen=True)
class Build:
    """A kind of build, and the tests that it runs."""

    name: str
    directory: str
    options: tuple
    suites: tuple  # meson's suites; the build runs each test that is in one of them
    # Programs that other stages need, built besides those of its tests; None: all programs are
    # built.
    programs: tuple = None
    timeouts: int = 4  # a factor for meson's timeouts, as other stages run at the same time

    def path(self, *names):
        return os.path.join(ROOT, self.directory, *names)


# Each test is in the suite "unit" or "inprocess". Tests that behave differently without a sanitizer
# are also in "plain", and tests with threads also in "threads" (tests/meson.build).
PLAIN = Build("plain", "build", (), ("plain",))
ASAN = Build(
    "asan",
    "build-asan",
    ("-Db_sanitize=address,undefined", *LIGHT),
    ("unit", "inprocess"),
    ("postroad",),
    8,
)
TSAN = Build("tsan", "build-tsan", ("-Db_sanitize=thread", *LIGHT), ("threads",), (), 8)
DEBIAN13 = Build("debian13", "build-debian13", (), ("unit",))
BUILDS = (PLAIN, ASAN, TSAN)


def run(argv, **kind):
    """Runs a program and waits for its end, even after a signal: the program gets the same signal.
    Returns the result, with the output in stdout if `kind` redirects it to a pipe."""
    with subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.DEVNULL, text=True, **kind) as process:
        output, _ = process.communicate()
    return subprocess.CompletedProcess(argv, process.returncode, output)


def run_quietly(argv, **kind):
    return run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kind)


def compile_build(tally, build):
    """Sets up and compiles one build; warnings are errors."""
    if not os.path.exists(build.path("build.ninja")):
        done = run_quietly(["meson", "setup", build.directory, "--werror", *build.options])
        if done.returncode:
            tally.add("fail", f"{build.name}: set-up of the build", "\n" + done.stdout[-3000:])
            return
    targets = [] if build.programs is None else [*build.programs, *programs_of_tests(build)]
    tally.add_output(
        f"{build.name}: compiles without warnings", run_quietly(["ninja", "-C", build.directory, *targets])
    )


def introspect(build, what):
    done = run(["meson", "introspect", build.directory, f"--{what}"], stdout=subprocess.PIPE)
    return json.loads(done.stdout)


def name_of(test):
    return test["name"].split(" / ")[-1]


def runs(build, test):
    """Returns whether a build has to run this test. test: as meson describes it."""
    return bool({suite.split(":")[-1] for suite in test["suite"]} & set(build.suites))


def programs_of_tests(build):
    """Returns the files that ninja builds for the tests of a build, relative to its directory."""
    wanted = {target for test in introspect(build, "tests") if runs(build, test) for target in test["depends"]}
    return sorted(
        os.path.relpath(file, build.path())
        for target in introspect(build, "targets")
        if target["id"] in wanted
        for file in target["filename"]
    )


def check_all_run(tally, builds):
    """Checks that each test of the builds is run by at least one of them."""
    tests = {name_of(test): [] for build in builds for test in introspect(build, "tests")}
    for build in builds:
        for test in introspect(build, "tests"):
            if runs(build, test):
                tests[name_of(test)].append(build.name)
    lost = sorted(name for name, where in tests.items() if not where)
    for build in builds:
        print(f"{build.name} runs {sum(build.name in where for where in tests.values())} of {len(tests)} programs")
    detail = f"no build runs {', '.join(lost)}" if lost else ""
    tally.add("fail" if lost else "pass", "every test belongs to a build", detail)


def randomness_wrapper():
    """Returns meson's options that disable address randomization where ThreadSanitizer needs it.
    That of GCC 12 does not start if addresses have more than 28 random bits."""
    try:
        with open("/proc/sys/vm/mmap_rnd_bits") as bits:
            if int(bits.read()) <= 28:
                return []
    except OSError:
        pass
    works = subprocess.run(["setarch", "-R", "true"], capture_output=True, check=False).returncode == 0
    return ["--wrapper", "setarch -R"] if works else []


def run_tests(tally, build, enter=()):
    """Runs the tests of one build, and counts each cmocka test. enter: a command that starts
    meson."""
    logs = build.path("meson-logs", "testlog*.json")  # with a wrapper, meson adds to the name
    for old in glob.glob(logs):
        os.unlink(old)
    argv = [*enter, "meson", "test", "-C", build.directory, "--no-rebuild", "--quiet"]
    argv += ["--num-processes", str(TESTS_A_CPU * os.cpu_count()), "--timeout-multiplier", str(build.timeouts)]
    for suite in build.suites:
        argv += ["--suite", suite]
    if build == TSAN:
        argv += randomness_wrapper()
    with some_huge_pages():
        done = run_quietly(argv, env={**os.environ, **SANITIZER_ENV})
    if not glob.glob(logs):
        tally.add("fail", f"{build.name}: meson test", done.stdout[-2000:])
        return
    with open(glob.glob(logs)[0]) as lines:
        entries = list(map(json.loads, lines))
    for entry in entries:
        cmocka.report(tally, build.name, entry)
    missing = {name_of(test) for test in introspect(build, "tests") if runs(build, test)} - set(map(name_of, entries))
    if missing:
        tally.add("fail", f"{build.name}: all of its tests run", f"not {', '.join(sorted(missing))}")
