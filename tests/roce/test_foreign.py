# SPDX-License-Identifier: GPL-2.0-or-later
"""What a peer can do to the other one's memory with a connection that is its own, and with keys that it was told.

As in test_verbs.py, rdma-pairs stand in for the engines; the path is the engines' own. Here one of them turns on the
other."""

from test_verbs import MIB, PATIENT, PORT, Pair, expect

CASES = []


def case(name):
    """Registers a test under the behaviour that it proves."""

    def register(function):
        CASES.append((name, function, PATIENT))
        return function

    return register


class SecondPair(Pair):
    """Two more processes, with a path of their own."""

    def __init__(self, first, port):
        super().__init__(first.lab, first.program, first.env, first.options)
        self.destination = first.other("destination", (), port)
        self.source = first.other("source", (), port)


# What a peer may do with a connection that is its own. A queue pair that refuses an operation falls into the error state,
# so that each try has a connection of its own.
NOT_ALLOWED = ("remote invalid request error", "remote access error")  # the queue pair's answer, or its key's
BAD_KEY = NOT_ALLOWED[1:]
URGENT, BULK = 0, 1


def foreign(side, lane, operation, addr, key):
    return side.do("foreign", lane, operation, addr, key)


def granted(pair):
    """(address, key) of the first grant."""
    addr, key = pair.source.do("grants").split()[0].split(":")[3:]
    return addr, key


def expect_refused(pair, lane, operation, addr, key, statuses, what):
    """And that the guest's memory is what it was."""
    ended = foreign(pair.destination, lane, operation, addr, key)
    print(f"     {what}, {operation}: {ended}")
    expect(ended in statuses, f"{what}: {operation} ended with {ended!r}, not with one of {statuses}")
    pair.source.do("filled", 0, 0, 4 * MIB, 1)


@case("foreign-write-or-atomic-to-the-sources-memory-is-refused-by-queue-pair-and-by-key")
def foreign_write(pair):
    pair.fill(0, 0, 4 * MIB)
    for operation, lane in (("write", BULK), ("atomic", URGENT)):
        pair.connect()
        addr, key = granted(pair)
        expect(foreign(pair.destination, lane, "read", addr, key) == "success", "the key is not even good for reading")
        expect_refused(pair, lane, operation, addr, key, NOT_ALLOWED, "as it is granted")
        pair.close()
        # Were the queue pairs to take it, the key would not; that such a queue pair takes it shows on other memory.
        pair.connect()
        addr, key = granted(pair)
        bait = pair.source.do("allow").split()
        expect(foreign(pair.destination, lane, operation, *bait) == "success", f"{operation} does not work at all")
        expect(int(pair.source.do("bait"), 16) != 0, f"{operation} has not arrived")
        expect_refused(pair, lane, operation, addr, key, BAD_KEY, "over a queue pair that takes anything")
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


@case("source-can-do-nothing-to-the-destinations-memory")
def foreign_source(pair):
    """Nothing of it is exported: not even its own key for READs to land lets anybody in."""
    pair.fill(0, 0, 4 * MIB)
    for operation in ("read", "write", "atomic"):
        for opened, statuses in ((False, NOT_ALLOWED), (True, BAD_KEY)):
            pair.connect()
            pair.check(0, 0, 4 * MIB)
            where = pair.destination.do("own-key", 0, 0).split()
            if opened:
                bait = pair.destination.do("allow").split()
                expect(foreign(pair.source, BULK, operation, *bait) == "success", f"{operation} does not work at all")
            ended = foreign(pair.source, BULK, operation, *where)
            print(f"     {operation}{', over a queue pair that takes anything' if opened else ''}: {ended}")
            expect(ended in statuses, f"{operation} ended with {ended!r}, not with one of {statuses}")
            pair.destination.do("filled", 0, 0, 4 * MIB, 1)
            pair.close()
