# SPDX-License-Identifier: GPL-2.0-or-later
"""SVG plots, drawn by gnuplot: the distribution of latencies, and the guest's speed over time."""

import os
import subprocess

from harness.process import Failure

from .guest import bucket_start

COLOURS = {
    "qemu-postcopy": "#999999",
    "qemu-preempt": "#d95f02",
    "postroad-ofi": "#1b9e77",
    "postroad-tcp": "#7570b3",
    "before": "#cccccc",
}
SMOOTH = 5  # a point of the time line is the mean of this many slots of 10 ms


def draw(path, script):
    """Runs a gnuplot script that writes to `path`, which must not be empty afterwards."""
    script = f'set terminal svg size 900,520 dynamic font "sans,13"\nset output "{path}"\n{script}'
    try:
        done = subprocess.run(
            ["gnuplot"], input=script, capture_output=True, text=True, timeout=60, check=False
        )
    except FileNotFoundError:
        raise Failure("gnuplot is not installed: apt-get install gnuplot-nox") from None
    if done.returncode or not os.path.getsize(path):
        raise Failure(f"gnuplot: {path}: {done.stderr.strip()[-500:]}")


def data_block(name, points):
    rows = "\n".join(f"{x:.4f} {y:.9f}" for x, y in points)
    return f"${name} << EOD\n{rows}\nEOD\n"


def curves(series):
    """Returns the data blocks and the plot command. series: {engine: points}."""
    blocks, parts = [], []
    for index, (name, points) in enumerate(series.items()):
        blocks.append(data_block(f"d{index}", points))
        parts.append(f'$d{index} with lines lw 2 lc rgb "{COLOURS[name]}" title "{name}"')
    return "".join(blocks), "plot " + ", \\\n     ".join(parts) + "\n"


def pooled(runs, part):
    return [sum(column) for column in zip(*(run[part]["buckets"] for run in runs))]


def slower_than(buckets):
    """Returns [(us, part of the accesses that took at least this long)]."""
    total = left = sum(buckets)
    points = []
    for bucket, count in enumerate(buckets):
        if left and bucket:
            points.append((bucket_start(bucket) / 1000, left / total))
        left -= count
    return points


def latencies(path, config):
    engines = config["engines"]
    series = {"before": slower_than(pooled([run for e in engines.values() for run in e["runs"]], "before"))}
    series |= {name: slower_than(pooled(engine["runs"], "phase")) for name, engine in engines.items()}
    blocks, plot = curves({name: points for name, points in series.items() if points})
    draw(
        path,
        f'{blocks}set title "{config["name"]}: accesses in postcopy that took longer (all runs)"\n'
        'set xlabel "us, seen in the guest"\nset ylabel "part of the accesses"\n'
        "set logscale xy\nset grid\nset format y '10^{%T}'\n"
        f"{plot}",
    )


def typical(runs):
    """Returns the run with the median total time."""
    return sorted(runs, key=lambda run: run["total_ms"])[len(runs) // 2]


def smoothed(points):
    values = [y for _, y in points]
    return [
        (points[i][0], sum(values[max(0, i - SMOOTH + 1) : i + 1]) / len(values[max(0, i - SMOOTH + 1) : i + 1]))
        for i in range(len(points))
    ]


def speeds(path, config):
    series = {name: smoothed(typical(engine["runs"])["timeline"]) for name, engine in config["engines"].items()}
    blocks, plot = curves(series)
    draw(
        path,
        f'{blocks}set title "{config["name"]}: speed of the guest (typical run of each)"\n'
        'set xlabel "ms since the command to migrate"\nset ylabel "part of its normal speed"\n'
        "set xrange [-300:*]\nset yrange [0:1.5]\nset grid\n"
        f"{plot}",
    )


def draw_config(folder, config):
    """Draws both plots of one configuration. Returns their paths."""
    paths = [os.path.join(folder, f"{config['name']}-{what}.svg") for what in ("latency", "speed")]
    latencies(paths[0], config)
    speeds(paths[1], config)
    return paths
