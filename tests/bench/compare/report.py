# SPDX-License-Identifier: GPL-2.0-or-later
"""Checks that a run is plausible, medians over the runs, and the tables."""

import os
import platform
import statistics
import subprocess
import time

from harness.process import expect
from harness.vm import QEMU

from .engines import ENGINES, REFERENCE

MB = 1e6
RATIOS = ("postroad-ofi", "postroad-tcp")


def cpu(side):
    """Returns the CPU time of a host for the migration: the engine, and QEMU without its vCPUs."""
    return lambda run: run[f"cpu_{side}_engine"] + run[f"cpu_{side}_qemu"]


def phase(name, scale=1.0):
    return lambda run: None if run["phase"][name] is None else run["phase"][name] / scale


def of_destination(name, scale=1.0):
    def value(run):
        own = run["statistics"][1]
        return own[name] / scale if name in own else None

    return value


# (name, unit, function of a run, whether the tables have ratios). All times are from the stop at
# the source to the end of the postcopy, unless the name says otherwise.
FIGURES = (
    ("access, mean", "us", phase("mean_us"), True),
    ("access, p50", "us", phase("p50_us"), True),
    ("access, p99", "us", phase("p99_us"), True),
    ("access, p99.9", "us", phase("p999_us"), True),
    ("access, max", "ms", phase("max_us", 1e3), True),
    ("stalls", "", phase("stalls"), True),
    ("stall, mean", "us", phase("stall_mean_us"), True),
    ("stall, p50", "us", phase("stall_p50_us"), True),
    ("stall, p99", "us", phase("stall_p99_us"), True),
    ("stalled, of each vCPU", "ms", phase("stall_ms"), True),
    ("QEMU: blocktime", "ms", of_destination("postcopy-blocktime"), False),
    ("engine: fault, mean", "us", of_destination("postcopy-latency", 1e3), False),
    ("command to stop", "ms", lambda run: run["precopy_ms"], True),
    ("downtime", "ms", lambda run: run["downtime_ms"], True),
    ("postcopy", "ms", lambda run: run["postcopy_ms"], True),
    ("total", "ms", lambda run: run["total_ms"], True),
    ("stop to 90 % of speed", "ms", lambda run: run["back_ms"], True),
    ("work lost by the end", "ms", lambda run: run["lost_ms"], True),
    ("CPU, source", "s", cpu("source"), True),
    ("CPU, destination", "s", cpu("destination"), True),
    ("bytes on the wire", "MB", lambda run: run["wire_bytes"] / MB, True),
    ("before: speed", "1/ms", lambda run: run["speed"] / 1e3, False),
    ("before: access, p99", "us", lambda run: run["before"]["p99_us"], False),
    ("before: access, max", "ms", lambda run: run["before"]["max_us"] / 1e3, False),
    ("before: stalled in 1 s", "ms", lambda run: run["before"]["stall_ms"], False),
)


def check_run(name, spec, run):
    """Refuses figures that are impossible, or that do not come from a postcopy."""
    seen = run["phase"]
    source, destination = run["statistics"]
    expect(run["speed"] > 0, f"{name}: the guest did nothing before the migration")
    expect(seen["accesses"] > 0, f"{name}: the guest accessed no memory during the migration")
    expect(seen["stalls"] > 0, f"{name}: no access waited for its page, so this was no postcopy")
    expect(
        run["wire_bytes"] >= spec.work_mb << 20,
        f"{name}: {run['wire_bytes']} bytes on the wire, the guest uses {spec.work_mb} MiB",
    )
    expect(
        source["status"] == destination["status"] == "completed",
        f"{name}: {source['status']} at the source, {destination['status']} at the destination",
    )
    expect(source["ram"]["postcopy-requests"] > 0, f"{name}: no page was requested")
    if name.startswith("qemu"):
        expect(destination.get("postcopy-blocktime", 0) > 0, f"{name}: QEMU reports no blocktime")
        sent = source["ram"]
        expect(
            sent["postcopy-bytes"] > 0.9 * sent["transferred"],
            f"{name}: {sent['precopy-bytes']} bytes were sent before the postcopy",
        )
    else:
        expect(destination["postroad"]["faults"] > 0, f"{name}: the engine served no fault")
        expect(destination["postcopy-latency"] > 0, f"{name}: the engine reports no latency")
        expect(source["postroad"]["pauses"] == 0, f"{name}: the migration was paused")


def median(values):
    """Returns the median, with None as infinity; None if at least half of the values are None."""
    known = [value for value in values if value is not None]
    if len(known) * 2 <= len(values):
        return None
    return statistics.median(known + [float("inf")] * (len(values) - len(known)))


def medians(runs):
    return {name: median([get(run) for run in runs]) for name, _, get, _ in FIGURES}


def number(value, unit=""):
    if value is None or value == float("inf"):
        return "-"
    text = f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
    if unit == "" and value == int(value):
        text = f"{value:.0f}"
    return f"{text} {unit}".strip()


def ratio(value, reference):
    if None in (value, reference) or not reference or float("inf") in (value, reference):
        return "-"
    return f"{value / reference:.2f}"


def table(config):
    """Returns the lines of a table: a row for each figure, a column for each engine, and ratios to
    QEMU's preempt mode."""
    found = {name: config["engines"][name]["median"] for name in ENGINES if name in config["engines"]}
    compared = [name for name in RATIOS if name in found and REFERENCE in found]
    counts = sorted({len(config["engines"][name]["runs"]) for name in found})
    shown = f"{config['name']}, {config['ram_mb']} MB guest ({config['work_mb']} MB in use)"
    lines = [f"{shown}: medians of {' to '.join(map(str, counts))}"]
    head = "".join(f"{name:>15}" for name in found)
    lines.append(f"  {'':<24}{head}" + "".join(f"{'/'.join((name[9:], 'preempt')):>13}" for name in compared))
    for name, unit, _, has_ratio in FIGURES:
        row = "".join(f"{number(found[engine][name], unit):>15}" for engine in found)
        if has_ratio:
            for engine in compared:
                row += f"{ratio(found[engine][name], found[REFERENCE][name]):>13}"
        lines.append(f"  {name:<24}{row}")
    for name, engine in config["engines"].items():
        lines += own_histogram(name, engine)
    return lines


def own_histogram(name, engine):
    """Returns a line with the engine's own histogram of fault latencies over all runs. QEMU 7.2 has
    none."""
    dists = [run["statistics"][1].get("postcopy-latency-dist") for run in engine["runs"]]
    if not all(dists):
        return []
    total = [sum(column) for column in zip(*dists)]
    shown = [f"{1 << i if i else 0} us: {count}" for i, count in enumerate(total) if count]
    return [f"  {name}, the engine's own histogram of faults, from … on: {', '.join(shown)}"]


def machine():
    """Describes the machine of the measurement."""
    with open("/proc/cpuinfo") as info:
        models = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
    version = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=True).stdout
    return {
        "cpus": os.cpu_count(),
        "cpu": models[0] if models else platform.machine(),
        "kernel": platform.release(),
        "qemu": version.splitlines()[0],
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "load": os.getloadavg(),
    }
