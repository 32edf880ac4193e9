#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""flood.py ADDRESS PORT: sends bursts of random datagrams from a host of the lab to an echo
service, for ever.

Compares the answers. Prints twice a second the numbers of answers and of wrong answers."""

import os
import select
import socket
import sys
import time

BURST = 8
SIZE = 1400
ANSWER_SECONDS = 0.2  # for the answers to a burst; later ones are not counted
TICK = 0.5


def burst(port, number):
    """Returns (echoed, bad)."""
    sent = {}
    for i in range(BURST):
        name = (number * BURST + i).to_bytes(8, "big")
        sent[name] = name + os.urandom(SIZE - len(name))
        port.send(sent[name])
    echoed = bad = 0
    while sent and select.select([port], [], [], ANSWER_SECONDS)[0]:
        data = port.recv(SIZE * 2)
        expected = sent.pop(data[:8], None)
        if expected is None and int.from_bytes(data[:8], "big") < number * BURST:
            continue  # late
        echoed += 1
        bad += data != expected
    return echoed, bad


def main():
    port = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    port.connect((sys.argv[1], int(sys.argv[2])))
    echoed = bad = number = 0
    said = time.monotonic()
    while True:
        try:
            more, wrong = burst(port, number)
            echoed, bad = echoed + more, bad + wrong
        except OSError:  # the guest does not answer (yet)
            time.sleep(ANSWER_SECONDS)
        number += 1
        if time.monotonic() >= said + TICK:
            print(f"flood: echoed={echoed} bad={bad}", flush=True)
            said = time.monotonic()


if __name__ == "__main__":
    main()
