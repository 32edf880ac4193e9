#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests of the data path of rdma: between two RoCE hosts, without engine and guest.

Host a is the source, host b the destination. Each test drives both sides step by step, and may
break rail 1."""

import os
import re
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.dont_write_bytecode = True
sys.path.insert(0, HERE)

import runner  # noqa: E402
from rdma_pair import CONNECT_MS, KIB, MIB, PORT, Programs, Spoiled, expect, perform  # noqa: E402
from roce_lab import LabError, wait_until  # noqa: E402

NOTICED_SECONDS = 15.0  # after a fault: 3.2 s for the lanes' timers, the rest for emulated hosts
CASES = []

# The device gives up a READ after 3.8 s instead of 0.3 s. A host that gets no CPU for a moment must
# not look like a broken rail.
TIMERS = "ack-timeout=17&retry=6&bulk-retry=6&read-deadline-ms=0"
PATIENT = TIMERS + "&connect-timeout-ms=3000"
# For tests that break a rail: 2.1 s for an urgent READ, 3.2 s for a bulk READ.
BRIEF = "ack-timeout=17&connect-timeout-ms=3000"
DEFAULTS = ""


def case(name, options=PATIENT, **kind):
    """Registers a test under the behaviour that it proves. options: of the URI of both sides. kind:
    see Pair."""

    def register(function):
        CASES.append((name, (function, options, kind)))
        return function

    return register


@case("reads-of-every-size-bring-the-right-bytes")
def right_bytes(pair):
    pair.fill(0, 0, 16 * MIB)
    pair.connect()
    for lane in (0, 1):
        for size in (4 * KIB, 8 * KIB, 64 * KIB, 256 * KIB, MIB):
            # 5 MiB - 4 KiB: READs do not begin and end at the borders of registered chunks.
            offset = (3 + 5 * lane) * MIB - 4 * KIB
            pair.check(0, offset, max(size, 4 * MIB if size == MIB else 512 * KIB), size, lane)
    pair.close()


@case("holes-stay-holes-on-both-sides")
def holes(pair):
    pair.fill(0, 0, 4 * MIB)
    pair.fill(1, 8 * MIB, 64 * KIB)
    pair.fill(1, 40 * MIB, 4 * KIB)
    before = pair.source.resources()["blocks"]
    grants = pair.connect()
    expect(grants == [(0, 0, 4 * MIB), (1, 8 * MIB, 64 * KIB), (1, 40 * MIB, 4 * KIB)], f"granted: {grants}")
    expect(pair.source.resources()["blocks"] == before, "registering has filled holes of the source")
    expect(pair.destination.resources()["blocks"] == [0, 0], "the destination has memory before the first READ")
    pair.check(1, 40 * MIB, 4 * KIB, lane=0, size=4 * KIB)
    pair.check(1, 8 * MIB, 64 * KIB)
    pair.check(0, 2 * MIB, 64 * KIB)
    blocks = pair.destination.resources()["blocks"]
    expect(blocks == [2 * MIB, 68 * KIB], f"the destination's blocks hold {blocks} bytes")
    pair.close()
    for side in pair.sides:
        expect(side.resources()["pinned"] == 0, f"{side.name}: memory is pinned after the end of the path")


@case("urgent-read-takes-no-more-memory-than-its-page")
def urgent_page(pair):
    pair.fill(0, 0, 8 * MIB)
    pair.connect()
    pair.check(0, 5 * MIB, 4 * KIB, lane=0, size=4 * KIB)
    blocks = pair.destination.resources()["blocks"]
    expect(blocks == [4 * KIB, 0], f"the destination's blocks hold {blocks} bytes")
    pair.close()


@case("ungranted-range-fails-the-path-in-words")
def ungranted(pair):
    pair.fill(0, 0, MIB)
    pair.connect()
    expect("not posted" in pair.destination.refuses("check", 1, 0, 2 * MIB, 4096, 4096, 1), "a hole was read")
    expect("does not let us" in pair.destination.do("await-failure", 1000), "the failure has another reason")
    pair.close()


@case("pages-touched-after-connect-are-granted-when-asked-again")
def touched_later(pair):
    pair.fill(0, 0, MIB)
    pair.open()
    pair.fill(0, MIB, MIB)
    pair.fill(0, 10 * MIB, 4 * KIB)
    pair.fill(1, 0, 256 * KIB)
    pair.grant()
    # One READ over ranges that were registered at different times.
    pair.check(0, 0, 2 * MIB, size=MIB)
    pair.check(0, 10 * MIB, 4 * KIB)
    pair.check(1, 0, 256 * KIB)
    pair.close()


@case("pages-that-were-given-back-and-taken-again-are-read-as-they-are-now")
def exchanged(pair):
    pair.fill(0, 0, 8 * MIB)
    pair.open()
    pair.source.do("punch", 0, 2 * MIB, 64 * KIB)
    pair.fill(0, 2 * MIB, 64 * KIB, seed=2)
    pair.source.do("punch", 0, 4 * MIB, MIB)
    pair.source.do("punch", 0, 6 * MIB, 4 * KIB)
    pair.fill(0, 6 * MIB, 4 * KIB, seed=3)
    # A read of the pages since then must not hide the change. (Linux before 6.2 pins another
    # mapping anyway.)
    pair.source.do("touch", 0, 0, 3 * MIB)
    pair.source.do("touch", 0, 6 * MIB, 4 * KIB)
    granted = pair.grant()
    expect(not any(at < 5 * MIB and at + n > 4 * MIB for block, at, n in granted if block == 0), f"granted: {granted}")
    pair.check(0, 2 * MIB, 64 * KIB, seed=2)
    pair.check(0, 6 * MIB, 4 * KIB, seed=3)
    for begin, end in ((0, 2 * MIB), (2 * MIB + 64 * KIB, 4 * MIB), (5 * MIB, 6 * MIB), (6 * MIB + 4 * KIB, 8 * MIB)):
        pair.check(0, begin, end - begin)
    pair.close()


def covered(grants):
    """Returns the ranges (begin, end) that the grants of one block cover; adjacent ranges are
    merged."""
    spans = []
    for begin, length in sorted((at, n) for _, at, n, *_ in grants):
        expect(not spans or spans[-1][1] <= begin, f"granted twice: {grants}")
        if spans and spans[-1][1] == begin:
            spans[-1] = (spans[-1][0], begin + length)
        else:
            spans.append((begin, begin + length))
    return spans


@case("grants-that-come-piece-by-piece-never-name-a-page-that-was-exchanged")
def incremental_grants(pair):
    """In each MiB the guest discards 128 KiB that were registered, and writes half of it again.
    Then the source scans its RAM in an order that the destination chooses. The destination reads
    each grant before the next scan."""
    pair.fill(0, 0, 16 * MIB)
    pair.open()
    for at in range(0, 16 * MIB, MIB):
        pair.source.do("punch", 0, at + 64 * KIB, 128 * KIB)
        pair.fill(0, at + 64 * KIB, 64 * KIB, seed=2)
    pair.fill(0, 20 * MIB, 4 * KIB, seed=3)
    pair.destination.do("set-grants")
    for at in (10 * MIB, 0, 14 * MIB, 6 * MIB, 2 * MIB, 20 * MIB, 4 * MIB, 8 * MIB, 12 * MIB, 30 * MIB):
        words = pair.source.do("grants-within", 0, at, 2 * MIB)
        pair.destination.do("add-grants", words)
        spans = covered([tuple(map(int, word.split(":"))) for word in words.split()])
        if at >= 16 * MIB:
            expect(spans == ([(at, at + 4 * KIB)] if at == 20 * MIB else []), f"granted: {spans}")
            continue
        first, second = at + MIB, at + 2 * MIB
        wanted = [(at, at + 128 * KIB), (at + 192 * KIB, first + 128 * KIB), (first + 192 * KIB, second)]
        expect(spans == wanted, f"granted: {spans}, instead of {wanted}")
        for mib in (at, first):
            pair.check(0, mib, 64 * KIB)
            pair.check(0, mib + 64 * KIB, 64 * KIB, seed=2, lane=0, size=4 * KIB)
            pair.check(0, mib + 192 * KIB, MIB - 192 * KIB)
    pair.check(0, 20 * MIB, 4 * KIB, seed=3, lane=0)
    pair.close()


@case("probe-is-answered-without-grants-and-beside-a-full-window-and-fails-with-its-path")
def probes(pair):
    pair.open()
    for lane in (0, 1):
        for count in (1, 4):
            pair.destination.do("probe", lane, count)
    expect(pair.destination.resources()["blocks"] == [0, 0], "a probe has transferred memory")
    pair.fill(0, 0, 16 * MIB)
    pair.grant()
    pair.destination.do("probe", 0, 4)
    pair.inject("blackhole", "b")
    reason = pair.destination.refuses("probe", 0, 1)
    expect("the probe failed" in reason, f"it ended with: {reason}")
    expect("retry count exceeded" in pair.destination.do("await-failure", 1000), "the failure has another reason")
    expect("not posted" in pair.destination.refuses("probe", 1, 1), "a probe was posted on a dead path")
    pair.close()


@case("peers-with-another-epoch-secret-or-uuid-are-refused-and-the-right-peer-connects")
def strangers(pair):
    pair.fill(0, 0, MIB)
    pair.destination.do("open", 7, 60000)
    for binding in ((6, 0x5E), (8, 0x5E), (7, 0x5F), (7, 0x5E, 0x12)):
        epoch, *rest = binding
        reason = pair.source.refuses("open", epoch, CONNECT_MS, *rest)
        expect("refused the data lane" in reason, f"{binding} was refused with: {reason}")
    stranger = pair.lab.a.run("rping", "-c", "-a", pair.lab.b.address(1), "-p", PORT, "-C", 1)
    expect(
        "RDMA_CM_EVENT_REJECTED" in stranger.stderr + stranger.stdout,
        f"another program was not rejected: {stranger}",
    )
    pair.source.do("open", 7, CONNECT_MS)
    pair.destination.answer()
    pair.grant()
    pair.check(0, 0, MIB)
    pair.close()


# The order of rdma-pair's answer: timer, retries, RNR retries and timer, READs out and in, access,
# traffic class.
REMOTE_READ = 4


def expect_attributes(pair, timers, *lanes):
    pair.connect()
    for side, access in ((pair.source, REMOTE_READ), (pair.destination, 0)):
        found = [tuple(map(int, lane.split(":"))) for lane in side.do("attributes").split()]
        wanted = [(timers[0], retry, *timers[1:3], *timers[3:4] * 2, access, tos) for retry, tos in lanes]
        expect(found == wanted, f"the queue pairs of the {side.name} are set to {found}, not to {wanted}")
    pair.close()


@case("timers-and-limits-are-set-on-both-sides-by-default", DEFAULTS)
def default_attributes(pair):
    expect_attributes(pair, (14, 6, 12, 16), (3, 184), (5, 104))


@case(
    "timers-and-limits-are-set-on-both-sides-as-the-uri-says",
    "ack-timeout=15&retry=2&bulk-retry=4&rnr-retry=5&rnr-timer=14&depth=8&tos=8&bulk-tos=16",
)
def chosen_attributes(pair):
    expect_attributes(pair, (15, 5, 14, 8), (2, 8), (4, 16))


@case("several-urgent-lanes-are-set-alike-and-read-and-end-together", BRIEF)
def urgent_lanes(pair):
    for side in pair.sides:
        side.do("lanes", 4)
    pair.fill(0, 0, 16 * MIB)
    expect_attributes(pair, (17, 6, 12, 16), (3, 184), (5, 104), (3, 184), (3, 184))
    pair.connect()
    for lane in range(4):
        pair.destination.do("probe", lane, 4)
        pair.check(0, (3 + 3 * lane) * MIB - 4 * KIB, 256 * KIB, size=4 * KIB, lane=lane)
    break_rail(pair, "blackhole", "b", TIMED_OUT)


@case(
    "urgent-read-that-takes-too-long-on-another-lane-fails-the-path-too",
    "ack-timeout=20&retry=6&read-deadline-ms=600",
)
def late_read_on_another_lane(pair):
    for side in pair.sides:
        side.do("lanes", 3)
    pair.fill(0, 0, MIB)
    pair.connect()
    pair.check(0, 0, MIB)
    pair.inject("blackhole", "b")
    expect("the READ failed" in pair.destination.refuses("check", 2, 0, 0, 4096, 4096, 1), "it came back")
    reason = pair.destination.do("await-failure", 1000)
    expect("an urgent READ has not come back for" in reason, f"the reason is: {reason}")
    pair.close()


# With these options the device's own timers notice a fault only after 30 s.
PATIENT_DEVICE = "ack-timeout=20&retry=6&bulk-retry=6&read-deadline-ms="


@case("urgent-read-that-takes-too-long-fails-the-path-in-words", PATIENT_DEVICE + "600")
def late_read(pair):
    pair.fill(0, 0, MIB)
    pair.connect()
    pair.check(0, 0, MIB)
    pair.inject("blackhole", "b")
    began = time.monotonic()
    expect("the READ failed" in pair.destination.refuses("check", 0, 0, 0, 4096, 4096, 1), "it came back")
    seconds = time.monotonic() - began
    at, times, *words = pair.destination.do("await-failure", 1000).split(" ")
    pair.note(f"{seconds * 1000:.0f} ms: {' '.join(words)}")
    expect("an urgent READ has not come back for" in " ".join(words), f"the reason is: {words}")
    expect(times == "1" and 0.6 <= seconds < 20, f"failed {times} times, after {seconds:.1f} s")
    pair.close()


@case("process-that-was-stopped-does-not-fail-its-path-for-late-reads", PATIENT_DEVICE + "3000")
def stopped(pair):
    pair.fill(0, 0, 16 * MIB)
    pair.connect()
    pair.destination.do("pull")
    for _ in range(3):
        pair.destination.process.signal(19)
        time.sleep(4.5)  # more than the deadline that is under test
        pair.destination.process.signal(18)
        time.sleep(0.3)  # for READs to be in flight again; the test does not depend on it
    expect("has not failed" in pair.destination.refuses("await-failure", 2000), "the path has failed")
    pair.source.do("close")
    pair.destination.do("await-failure", 10000)
    pair.destination.do("join-pull")
    pair.destination.do("close")


@case("completion-that-is-polled-late-does-not-fail-the-path", PATIENT_DEVICE + "3000")
def neglected(pair):
    pair.fill(0, 0, MIB)
    pair.connect()
    pair.destination.do("neglect", 0, 5000)
    pair.check(0, 0, MIB, lane=0)
    pair.close()


@case("fifty-paths-leave-nothing-behind")
def fifty(pair):
    pair.fill(0, 0, MIB)
    found = []
    for number in range(50):
        pair.connect()
        pair.check(0, 0, 256 * KIB)
        pair.close()
        if number in (0, 49):
            found.append([{**side.resources(), "blocks": 0} for side in pair.sides])
    for first, last, side in zip(*found, pair.sides):
        expect(first == last, f"after the first path the {side.name} had {first}, after the last one {last}")


@case("nothing-lands-after-the-end-of-a-path-that-hangs")
def fenced(pair):
    pair.fill(0, 0, 16 * MIB)
    for lane, size in ((1, MIB), (0, 4 * KIB)):
        pair.connect()
        pair.check(0, 0, 8 * size, size)
        pair.inject("blackhole", "b")
        took = int(pair.destination.do("abandon", lane, 8, size))
        pair.note(f"the end took {took / 1000:.1f} ms")
        expect(took < 10 * 1000 * 1000, f"it took {took} us")
        pair.restore()
        pair.source.do("close")
        pair.connect()
        pair.check(0, 8 * MIB, MIB)
        pair.destination.do("marked", 8 * size)
        pair.close()


@case("host-without-a-listener-is-an-error-in-words")
def nobody_listens(pair):
    uri = f"rdma:{pair.lab.b.address(1)}:{PORT + 1}"
    pair.source.do("end")
    pair.source.do("begin", "source", uri)
    reason = pair.source.refuses("open", 1, CONNECT_MS)
    expect("nobody listens there" in reason and uri in reason, f"the error is: {reason}")


@case("host-that-is-away-is-given-up-in-time")
def host_away(pair):
    pair.inject("blackhole", "b")
    began = time.monotonic()
    reason = pair.source.refuses("open", 1, 1000)
    seconds = time.monotonic() - began
    expect(seconds < 10, f"it took {seconds:.1f} s")
    expect(f"rdma:{pair.lab.b.address(1)}" in reason, f"the error is: {reason}")


def expect_words(pair, reason, *words):
    pair.note(reason)
    missing = [word for word in words if word not in reason]
    expect(not missing, f"the error has no {missing}: {reason}")


@case("limit-on-locked-memory-is-an-error-that-names-the-number")
def memlock(pair):
    limited = ("setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock", "prlimit", f"--memlock={MIB}")
    side = pair.other("destination", limited, PORT + 1)
    reason = side.refuses("open", 1, 1000)
    expect_words(pair, reason, "128 MiB", "RLIMIT_MEMLOCK is 1 MiB", "ulimit -l 132096", side.uri)
    side = pair.other("source", limited)
    side.do("fill", 0, 0, 2 * MIB, 1)
    expect_words(pair, side.refuses("open", 1, 1000), "2 MiB", "RLIMIT_MEMLOCK is 1 MiB", "ulimit -l 3072", side.uri)


NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


@case("missing-permission-is-an-error-that-says-so")
def permission(pair):
    for device in ("rdma_cm", "uverbs*"):
        pair.lab.a.run("sh", "-c", f"chmod 600 /dev/infiniband/{device}", check=True)
        try:
            reason = pair.other("source", NOBODY).refuses("open", 1, 1000)
        finally:
            pair.lab.a.run("sh", "-c", f"chmod 666 /dev/infiniband/{device}", check=True)
        expect_words(pair, reason, "no permission on /dev/infiniband", pair.uri)


@case("host-without-a-device-is-an-error-that-says-how-to-get-one", fresh=True)
def no_device(pair):
    try:
        pair.inject("rdma-del", "a")
        pair.lab.inject("rdma-del", 2, "a")
        expect_words(pair, pair.source.refuses("open", 1, 1000), "has no RDMA device", "rdma link add", pair.uri)
    finally:
        pair.lab.restore(2)


# The default options, because a refusal has little room for its text, which names the path.
@case("unequal-mtu-is-an-error-that-names-both", DEFAULTS)
def unequal_mtu(pair):
    pair.broken = True
    pair.lab.b.run("ip", "link", "set", "eth1", "mtu", 1500, check=True)
    pair.destination.do("open", 1, CONNECT_MS)
    words = ("packets of 4096 bytes", "takes 1024")
    expect_words(pair, pair.source.refuses("open", 1, CONNECT_MS), "refused the data lane", *words)
    try:
        pair.destination.answer()
    except LabError as error:
        expect_words(pair, str(error), *words, "ip link set dev")
    else:
        raise LabError("the destination accepted it")


def packets_dropped(host, rail):
    """Returns the number of packets that a black hole on this rail has dropped."""
    text = host.run("tc", "-s", "filter", "show", "dev", f"eth{rail}", "ingress", check=True).stdout
    return int(re.search(r"(\d+) pkt", text)[1])


def reconnect_after_loss(pair):
    """Loses a connect request. Returns the seconds from the restoration of the rail until both
    sides are connected."""
    pair.epoch += 1
    pair.inject("blackhole", "b")
    pair.destination.do("open", pair.epoch, CONNECT_MS)
    pair.source.ask("open", pair.epoch, CONNECT_MS)
    wait_until("the request is lost", 30, lambda: packets_dropped(pair.lab.b, 1))
    pair.lab.undo("blackhole", 1, "b")
    began = time.monotonic()
    for side in pair.sides:
        side.answer()
    return time.monotonic() - began


@case("connect-request-that-is-lost-is-repeated-sooner-than-rdma-cm-would", TIMERS)
def lost_request(pair):
    """Tries three times, because a busy host may be late."""
    pair.fill(0, 0, MIB)
    pair.connect()
    pair.close()
    for _ in range(3):
        seconds = reconnect_after_loss(pair)
        pair.note(f"connected {seconds:.2f} s after the rail was restored")
        pair.grant()
        pair.check(0, 0, MIB)
        pair.close()
        if seconds < 3.5:
            return
    raise LabError(f"it took {seconds:.1f} s; rdma_cm's own repetition comes after 4.3 s")


@case("attempt-that-is-given-up-on-a-dead-rail-leaves-the-device-as-it-was")
def attempt_on_dead_rail(pair):
    def connect():
        """Connects. If the device is spoiled now, the attempt spoiled it. That is a failure, and no
        reason for a second attempt."""
        try:
            pair.connect()
        except Spoiled as error:
            raise LabError(f"no program connects over the rail any more, not even rping: {error}") from None

    pair.fill(0, 0, MIB)
    pair.connect()  # earlier tests have not spoiled the device
    pair.close()
    hits = 0
    for _ in range(4):
        connect()  # this attempt succeeds, and resolves the address for the next one
        pair.check(0, 0, MIB)
        pair.close()
        pair.inject("blackhole", "b")
        pair.source.ask("open", pair.epoch, CONNECT_MS)
        wait_until("the request is lost", 30, lambda: packets_dropped(pair.lab.b, 1))
        pair.inject("link-down", "a")
        began = time.monotonic()
        try:
            pair.source.answer()
        except LabError as error:
            # If another message was lost, the source had not sent its request yet.
            pair.note(f"{error}")
            hits += "device rxe1 is DOWN" in str(error)
        else:
            raise LabError("the source connected through a black hole")
        expect(time.monotonic() - began < 20, "it has tried again on a rail that is down")
        pair.mend()
        if hits == 2:
            break
    expect(hits, "no attempt was in progress when its rail went down")
    connect()
    pair.check(0, 0, MIB)
    pair.close()


@case("removal-of-an-unrelated-address-does-not-fail-the-path")
def other_address(pair):
    pair.fill(0, 0, MIB)
    pair.connect()
    for action in ("add", "del") * 2:
        pair.lab.b.run("ip", "address", action, "10.88.99.2/24", "dev", "eth1", check=True)
    expect("has not failed" in pair.destination.refuses("await-failure", 1000), "the path has failed")
    pair.check(0, 0, MIB)
    pair.close()


@case("wrong-addresses-and-options-are-errors-that-help")
def wrong_uris(pair):
    pair.destination.do("end")
    for uri, words in (
        ("rdma:10.99.0.1:4460", "check the addresses"),
        (f"rdma:{pair.lab.b.address(2)}:4460?dev=rxe1", "that address is on rxe2"),
        (f"rdma:{pair.lab.b.address(1)}:4460?retry=7", "from 1 to 6"),
    ):
        expect_words(pair, pair.destination.refuses("begin", "destination", uri), uri, words)


def break_rail(pair, fault, host, reasons, noticed_by="destination"):
    """Breaks rail 1 during READs. All READs must complete, each side must report one failure with a
    reason, and the path must end quickly. noticed_by: the side whose host has the fault. The
    destination always notices it."""
    pair.destination.do("pull")
    pair.inject(fault, host)
    # A host that is busy with READs may take seconds to run the command that breaks its rail.
    broken = time.time()
    for side in {pair.destination, getattr(pair, noticed_by)}:
        at, times, *words = side.do("await-failure", 20000).split(" ")
        seconds = int(at) / 1e6 - broken
        text = " ".join(words)
        pair.note(f"{side.name}: {seconds * 1000:.0f} ms: {text}")
        expect(times == "1", f"the {side.name} has reported the failure {times} times")
        expect(seconds < NOTICED_SECONDS, f"the {side.name} noticed after {seconds:.2f} s")
        expect(side is pair.source or any(reason in text for reason in reasons), f"the reason is: {text}")
    counts = list(map(int, pair.destination.do("join-pull").split()))
    for posted, ok, failed in zip(counts[::3], counts[1::3], counts[2::3]):
        expect(posted == ok + failed and ok, f"READs posted, succeeded, failed: {counts}")
    drained = pair.close()
    expect(max(drained) < 10 * 1000 * 1000, f"closing took {drained} us")


def fault_case(name, fault, host, reasons, noticed_by="destination", comes_back=True):
    """Registers a test that breaks and restores rail 1 twice, each time with a new epoch."""

    @case(name, BRIEF if TIMED_OUT[0] in reasons else PATIENT)
    def test(pair):
        pair.fill(0, 0, 16 * MIB)
        for _ in range(2 if comes_back else 1):
            pair.connect()
            break_rail(pair, fault, host, reasons, noticed_by)
            if comes_back:
                pair.mend()
        if comes_back:
            pair.connect()
            pair.check(0, 0, 4 * MIB, size=MIB)
            pair.close()


TIMED_OUT = ("retry count exceeded",)
LOCAL = ("is DOWN", "cannot send", "address has gone")
REMOVED = ("was removed", "the peer closed")

fault_case("cable-cut", "cut", None, (*LOCAL, *TIMED_OUT), "source")
fault_case("link-down-at-the-destination", "link-down", "b", LOCAL)
fault_case("link-down-at-the-source", "link-down", "a", TIMED_OUT, "source")
fault_case("address-removed-at-the-destination", "address-del", "b", LOCAL)
fault_case("black-hole-at-the-destination", "blackhole", "b", TIMED_OUT)
fault_case("black-hole-at-the-source", "blackhole", "a", TIMED_OUT)
# soft-RoCE's device disappears, and can come back, only after the programs that used it have ended.
fault_case("device-removed-at-the-destination", "rdma-del", "b", REMOVED, comes_back=False)
fault_case("device-removed-at-the-source", "rdma-del", "a", REMOVED, "source", comes_back=False)


@case("opening-a-path-on-a-removed-device-fails-at-once")
def dead_device(pair):
    pair.fill(0, 0, MIB)
    pair.connect()
    pair.inject("rdma-del", "a")
    pair.source.do("await-failure", 10000)
    pair.source.do("close")
    # The kernel keeps the removed device as long as a program has it open.
    for side in (pair.source, pair.other("source")):
        began = time.monotonic()
        reason = side.refuses("open", 2, CONNECT_MS)
        seconds = time.monotonic() - began
        pair.note(f"{seconds * 1000:.0f} ms: {reason}")
        expect(seconds < 8, f"it took {seconds:.1f} s")
    pair.destination.do("await-failure", 10000)
    pair.destination.do("close")


GROUP = runner.Group("verbs", CASES, perform, subject=Programs)

if __name__ == "__main__":
    sys.exit(runner.main([GROUP], __doc__))
