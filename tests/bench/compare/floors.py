# SPDX-License-Identifier: GPL-2.0-or-later
"""The floors: the speed of the machine without an engine, and the engine alone for comparison
(bench-engine and bench-raw, over loopback)."""

import json
import subprocess

from harness.lab import find_built
from harness.process import Failure, die_with_parent

SECONDS = 600


def run_json(argv):
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
            preexec_fn=die_with_parent,
        )
    except subprocess.TimeoutExpired:
        raise Failure(f"{argv[0]}: did not end within {SECONDS} s") from None
    if done.returncode:
        raise Failure(f"{' '.join(argv)}: exit code {done.returncode}: {done.stderr.strip()[-500:]}")
    try:
        return json.loads(done.stdout)
    except ValueError as error:
        raise Failure(f"{argv[0]}: printed no JSON ({error}): {done.stdout[:300]!r}") from None


def measure(build, rounds, quick):
    size = ["--quick"] if quick else []
    raw = ["--quick", "memory", "tcp"] if quick else []
    return {
        "engine": run_json([find_built(build, "bench-engine"), "--json", "-", "-r", str(rounds), *size]),
        "raw": run_json([find_built(build, "bench-raw"), *raw]),
    }


def table(floors):
    """Returns the floors as lines of a table."""
    lines = ["Floors, and the engine alone (over loopback; medians)"]
    lines.append(f"  {'':<26}{'engine':>14}{'floor':>14}{'ratio':>8}")
    for scheme in ("ofi", "tcp"):
        figures = floors["engine"][scheme]
        rate = figures["pull"] / 1e6, figures["raw_read"] / 1e6
        lines.append(row(f"{scheme} bulk pull, raw READ", *rate, "MB/s"))
        lines.append(row(f"{scheme} bulk pull, memcpy", rate[0], figures["memcpy"] / 1e6, "MB/s"))
        for name in ("mean", "p50", "p99"):
            lines.append(row(f"{scheme} fault, {name}", figures["fault_us"][name], figures["floor_us"][name], "us"))
    lines.append("  the floor of a fault is a bare minor fault and a raw 4 KiB read")
    for name, figures in floors["raw"].items():
        shown = (
            f"{figures['bytes_per_s'] / 1e6:.0f} MB/s"
            if "bytes_per_s" in figures
            else f"p50 {figures['p50_us']} us, p99 {figures['p99_us']} us"
        )
        lines.append(f"  raw {name:<22} {shown}")
    return lines


def row(name, value, floor, unit):
    return f"  {name:<26}{f'{value:.1f} {unit}':>14}{f'{floor:.1f} {unit}':>14}{value / floor:>8.2f}"
