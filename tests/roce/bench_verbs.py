#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""What rdma: reads between the lab's two hosts, beside ib_read_lat and ib_read_bw over the same rail in the same
run. The figures of an emulated host mean nothing by themselves; their ratio does."""

import argparse
import os
import re
import statistics
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.dont_write_bytecode = True
sys.path[:0] = [HERE, os.path.join(HERE, "..", "..", "soft-roce")]

from roce_lab import Lab, LabError  # noqa: E402
from test_verbs import KIB, MIB, Pair  # noqa: E402

TYPICAL, AVERAGE_RATE = 4, 3  # columns of perftest's tables


def perftest(lab, tool, column, *options):
    """One figure of perftest's only row; b reads from a."""
    argv = [tool, "-d", "rxe1", "-x", "1", "-F", *options]
    server = lab.a.popen(*argv)
    try:
        for _ in range(20):
            time.sleep(0.5)  # until the server listens, the client fails at once
            client = lab.b.run(*argv, lab.a.address(1), timeout=120)
            rows = re.findall(r"^\s*\d+\s+\d+\s+[\d.].*$", client.stdout, re.MULTILINE)
            if client.returncode == 0 and rows:
                return float(rows[-1].split()[column])
        raise LabError(f"{tool}: {client.stdout}{client.stderr}")
    finally:
        server.close()


def latency(lab, pair, size, count):
    theirs = perftest(lab, "ib_read_lat", TYPICAL, "-s", str(size), "-n", str(count))
    ours = int(pair.destination.do("latency", 0, size, count).split()[0]) / 1000
    return theirs, ours


def rate(lab, pair, size, total):
    theirs = perftest(lab, "ib_read_bw", AVERAGE_RATE, "-s", str(size), "-n", str(total // size))
    ours = float(pair.destination.do("bandwidth", size, total)) / MIB
    return theirs, ours


MEASUREMENTS = (
    ("4 KiB READ, urgent lane, us", lambda lab, pair: latency(lab, pair, 4 * KIB, 1000)),
    ("128 KiB READs, bulk lane, MiB/s", lambda lab, pair: rate(lab, pair, 128 * KIB, 40 * MIB)),
    ("1 MiB READs, bulk lane, MiB/s", lambda lab, pair: rate(lab, pair, MIB, 40 * MIB)),
)


def measure(lab, program, rounds):
    with Pair(lab, program, {}) as pair:
        pair.fill(0, 0, 16 * MIB)
        pair.connect()
        pair.check(0, 0, 16 * MIB)  # everything is registered
        print(f"{'median of ' + str(rounds):34}{'perftest':>10}{'rdma:':>10}{'ratio':>8}")
        for name, function in MEASUREMENTS:
            results = [function(lab, pair) for _ in range(rounds)]
            theirs, ours = (statistics.median(column) for column in zip(*results))
            print(f"{name:34}{theirs:10.1f}{ours:10.1f}{ours / theirs:8.2f}", flush=True)
        pair.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", default="build", help="build directory (default: build)")
    parser.add_argument("--lab", metavar="DIRECTORY", help="use the lab that runs there")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    program = os.path.abspath(os.path.join(options.build, "tests/roce/rdma-pair"))
    if options.lab:
        return measure(Lab.attach(options.lab), program, options.rounds)
    with Lab(build=options.build) as lab:
        return measure(lab, program, options.rounds)


if __name__ == "__main__":
    sys.exit(main())
