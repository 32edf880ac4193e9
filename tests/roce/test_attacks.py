# SPDX-License-Identifier: GPL-2.0-or-later
"""Attacks of a malicious peer on the other side's memory, over its own connection and with the keys
that it got.

As in test_verbs.py, rdma-pair stands in for both engines, with the engine's own code for the data
path."""

from rdma_pair import MIB, PORT, Pair, expect
from test_verbs import PATIENT

CASES = []


def case(name):
    """Registers a test under the behaviour that it proves."""

    def register(function):
        CASES.append((name, (function, PATIENT, {})))
        return function

    return register


class SecondPair(Pair):
    """A second path, between two processes of their own."""

    def __init__(self, first, port):
        super().__init__(first.programs)
        self.destination = first.other("destination", (), port)
        self.source = first.other("source", (), port)
        self.sides = [self.destination, self.source]


# A queue pair that refuses an operation goes into the error state, so each attack has a connection
# of its own.
NOT_ALLOWED = ("remote invalid request error", "remote access error")  # of queue pair, and of key
BAD_KEY = NOT_ALLOWED[1:]
URGENT, BULK = 0, 1


def attack(side, lane, operation, addr, key):
    """Returns how the operation ended, in the words of libibverbs."""
    return side.do("attack", lane, operation, addr, key)


def granted(pair):
    """(address, key) of the first grant."""
    addr, key = pair.source.do("grants").split()[0].split(":")[3:]
    return addr, key


def expect_refused(pair, lane, operation, addr, key, statuses, what):
    """Also verifies that the source's memory has not changed."""
    ended = attack(pair.destination, lane, operation, addr, key)
    pair.note(f"{what}, {operation}: {ended}")
    expect(ended in statuses, f"{what}: {operation} ended with {ended!r}, not with one of {statuses}")
    pair.source.do("verify", 0, 0, 4 * MIB, 1)


@case("write-or-atomic-of-a-malicious-destination-is-refused-by-queue-pair-and-by-key")
def foreign_write(pair):
    pair.fill(0, 0, 4 * MIB)
    for operation, lane in (("write", BULK), ("atomic", URGENT)):
        pair.connect()
        addr, key = granted(pair)
        expect(attack(pair.destination, lane, "read", addr, key) == "success", "the key does not admit a READ")
        expect_refused(pair, lane, operation, addr, key, NOT_ALLOWED, "as it is granted")
        pair.close()
        # The queue pair now admits every operation, so that only the key refuses. The open page
        # shows that the operation works.
        pair.connect()
        addr, key = granted(pair)
        open_page = pair.source.do("allow").split()
        expect(attack(pair.destination, lane, operation, *open_page) == "success", f"{operation} does not work at all")
        expect(int(pair.source.do("open-page"), 16) != 0, f"{operation} has not arrived")
        expect_refused(pair, lane, operation, addr, key, BAD_KEY, "over a queue pair that admits everything")
        pair.close()


@case("key-of-a-connection-is-good-for-no-other-one-and-ends-with-it")
def foreign_key(pair):
    pair.fill(0, 0, 4 * MIB)
    pair.connect()
    addr, key = granted(pair)
    other = SecondPair(pair, PORT + 1)
    other.fill(0, 0, 4 * MIB)
    other.connect()
    expect_refused(other, BULK, "read", addr, key, BAD_KEY, "the key of another connection that lives")
    pair.check(0, 0, MIB)
    pair.close()
    pair.connect()
    fresh = granted(pair)
    expect(fresh[1] != key, "the new connection has the same key: the test proves nothing")
    expect_refused(pair, BULK, "read", addr, key, BAD_KEY, "the key of a connection that has ended")
    pair.close()
    pair.connect()
    pair.check(0, 0, 4 * MIB)
    pair.close()
    other.close()


@case("malicious-source-cannot-access-the-destinations-memory")
def foreign_source(pair):
    """The destination grants nothing. Even the key that it uses itself for incoming READs admits no
    peer."""
    pair.fill(0, 0, 4 * MIB)
    for operation in ("read", "write", "atomic"):
        for opened, statuses in ((False, NOT_ALLOWED), (True, BAD_KEY)):
            pair.connect()
            pair.check(0, 0, 4 * MIB)
            where = pair.destination.do("own-key", 0, 0).split()
            if opened:
                open_page = pair.destination.do("allow").split()
                expect(
                    attack(pair.source, BULK, operation, *open_page) == "success",
                    f"{operation} does not work at all",
                )
            ended = attack(pair.source, BULK, operation, *where)
            pair.note(f"{operation}{', over a queue pair that admits everything' if opened else ''}: {ended}")
            expect(ended in statuses, f"{operation} ended with {ended!r}, not with one of {statuses}")
            pair.destination.do("verify", 0, 0, 4 * MIB, 1)
            pair.close()
