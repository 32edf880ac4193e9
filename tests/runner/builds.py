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

# Tests of one build at a time, for each CPU: most of them wait, most of the time.
TESTS_A_CPU = 2

SANITIZER_ENV = {
    "ASAN_OPTIONS": "detect_leaks=1:detect_stack_use_after_return=1",
    "LSAN_OPTIONS": "print_suppressions=0",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
}

# -O1 and line numbers alone: half the time of -O2 -g, and what sanitizers report needs no more.
LIGHT = ["-Dinvariants=enabled", "-Doptimization=1", "-Dc_args=-g1"]


@dataclass(frozen=True)
class Build:
    """A kind of build, and which of the tests it runs."""

    name: str
    directory: str
    options: tuple
    suites: tuple  # of meson: each test that is in one of them
    programs: tuple = None  # for other stages, built beside the programs of its tests; None: everything is built
    timeouts: int = 4  # meson's timeouts times this: other stages run beside

    def path(self, *names):
        return os.path.join(ROOT, self.directory, *names)


# Each test is in the suite "unit" or "inprocess". Those that differ without a sanitizer are in
# "plain", too, and those with threads in "threads" (tests/meson.build).
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
    """Runs a program and waits for its end; a signal does not make it shorter, since the program
    has the signal, too. Returns it with its output, if that was asked for, in stdout."""
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
    """Whether a build is to run this test, as meson describes it."""
    return bool({suite.split(":")[-1] for suite in test["suite"]} & set(build.suites))


def programs_of_tests(build):
    """The files that ninja makes for the tests that a build runs, relative to its directory."""
    wanted = {target for test in introspect(build, "tests") if runs(build, test) for target in test["depends"]}
    return sorted(
        os.path.relpath(file, build.path())
        for target in introspect(build, "targets")
        if target["id"] in wanted
        for file in target["filename"]
    )


def check_all_run(tally, builds):
    """Each test that one of the builds has is run by one of them."""
    tests = {name_of(test): [] for build in builds for test in introspect(build, "tests")}
    for build in builds:
        for test in introspect(build, "tests"):
            if runs(build, test):
                tests[name_of(test)].append(build.name)
    lost = sorted(name for name, where in tests.items() if not where)
    for build in builds:
        print(f"{build.name} runs {sum(build.name in where for where in tests.values())} of {len(tests)} programs")
    tally.add("fail" if lost else "pass", "every test belongs to a build", f"no build runs {', '.join(lost)}" if lost else "")


def randomness_wrapper():
    """ThreadSanitizer of GCC 12 finds no room where addresses have more than 28 random bits."""
    try:
        with open("/proc/sys/vm/mmap_rnd_bits") as bits:
            if int(bits.read()) <= 28:
                return []
    except OSError:
        pass
    works = subprocess.run(["setarch", "-R", "true"], capture_output=True, check=False).returncode == 0
    return ["--wrapper", "setarch -R"] if works else []


def run_tests(tally, build, enter=()):
    """The tests of one build, each cmocka test counted. enter: a program that meson is to run
    under."""
    logs = build.path("meson-logs", "testlog*.json")  # its name tells of a wrapper
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
