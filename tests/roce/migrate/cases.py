# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests of faults during migrations over rdma:.

At the end of each test the guest verifies all of its memory at the destination. Faults that differ
only in their kind follow each other within one migration, alternately on both rails."""

import os
import re
import time
from functools import partial

import cgroups
import strangers
import unprivileged
from move import PATIENT_URI, PORT, RAILS, Failure, LabError, Move, expect, wait_for
from guests import BootGuest, build_boot_sector, find_built, qemu_versions
from hugepages import huge_pages
from roce_lab import on_each

CASES = []
DEAD_SECONDS = 20
RACES = 8
ANSWER_SECONDS = 10.0  # an idle monitor answers in a few ms; the rest is for emulated hosts
WHERE = {None: "both hosts", "a": "the source", "b": "the destination"}


def case(name):
    """Registers a test under the behaviour that it proves."""

    def register(function):
        CASES.append((name, function))
        return function

    return register


class Test:
    """The lab and the migrations of one test. close() ends the migrations and restores both
    rails."""

    def __init__(self, lab, build, notes):
        self.lab, self.build, self.notes = lab, build, notes
        self.moves = []

    def move(self, **kind):
        move = Move(self.lab, self.build, **{"uri_options": PATIENT_URI, **kind})
        move.notes = self.notes
        self.moves.append(move)
        return move

    def logs(self):
        return "\n".join(move.logs() for move in self.moves)

    def close(self):
        for move in self.moves:
            move.close()
        # A message that cannot be sent breaks soft-RoCE's management queue pair. An example is the
        # last message of a process that ends while its rail is down.
        self.lab.renew_disturbed()


def both_rails(move):
    return move.uri(1), move.uri(2)


def break_rail(lab, fault, rail, host):
    """fault: "cut" or one of the lab's FAULTS."""
    if fault == "cut":
        lab.cut(rail, host)
    else:
        lab.inject(fault, rail, host)


@case("migration-over-rdma-completes")
def completes(test):
    move = test.move()
    move.start(move.uri(1))
    move.finish()


# Engines with less memory than the guest


@case("small-engine-brings-in-a-large-guest-over-rdma")
def small_engine(test):
    """Cuts a rail in the middle of the migration."""
    with cgroups.groups(test):
        move = test.move(wrapper=cgroups.WRAPPER, size_mb=48)
        cgroups.put_guest(move.destination_guest)
        before = cgroups.usage(move.lab.b, "guest")
        move.start_slowly(*both_rails(move), bandwidth="4M")
        cut = move.cut(lambda: test.lab.cut(1))
        cut.wait_active()
        move.complete()
        cgroups.expect_charged_to_guest(move, before, 38)
        move.finish()


# A path is lost, and the engines recover automatically over the other rail


def fail_over(move, fault, rail, host, **reasons):
    """Breaks a rail and waits for the recovery. Returns its times. reasons: for a side the texts,
    of which the reason of its pause must be one."""
    cut = move.cut(lambda: break_rail(move.lab, fault, rail, host))
    cut.wait_active()
    cut.expect_path(move.uri(3 - rail))
    times = cut.report(f"{fault} at {WHERE[host]}, rail {rail}")
    for engine in move.engines:
        said = cut.reason(engine, "postcopy-paused")
        wanted = reasons.get(engine.name, [""])
        expect(any(each in said for each in wanted), f"the {engine.name} should have paused as {wanted}: '{said}'")
    return times


def fail_over_again_and_again(test, faults):
    """Each fault breaks the rail that is in use since the previous fault. rdma-del comes last, if
    at all: soft-RoCE's device cannot come back while an engine has it open. The guest's memory
    takes two minutes, since each fault may take many seconds on a busy machine."""
    move = test.move(size_mb=32, pace_us=1000000)
    move.start_slowly(*both_rails(move), bandwidth="128K")
    rail = 1
    for fault, host, reasons in faults:
        try:
            fail_over(move, fault, rail, host, **reasons)
            if fault != "rdma-del":
                test.lab.restore(rail)
            rail = 3 - rail
            left = move.destination.remaining()
            wait_for("pages come over the other rail", 30, lambda at=left: move.destination.remaining() < at)
        except (Failure, LabError) as failure:
            raise Failure(f"{fault} at {WHERE[host]}: {failure}") from None
    move.finish()


LOCAL = ("is DOWN", "cannot send", "address has gone")
TIMED_OUT = ("retry count exceeded",)
SILENCE = ("nothing heard",)
REMOVED = ("was removed",)
TOLD = ("the destination has paused",)

CHAINS = {
    "failover-to-rail-2-and-back-whatever-happens-at-the-source": (
        ("cut", None, {}),
        ("cut", "a", {"source": LOCAL}),
        ("link-down", "a", {"source": LOCAL}),
        ("address-del", "a", {"source": LOCAL}),
        ("blackhole", "a", {"destination": TIMED_OUT}),
        ("rdma-del", "a", {"source": REMOVED}),
    ),
    "failover-to-rail-2-and-back-whatever-happens-at-the-destination": (
        ("cut", "b", {"destination": LOCAL}),
        ("link-down", "b", {"destination": LOCAL}),
        ("address-del", "b", {"destination": LOCAL}),
        ("blackhole", "b", {"destination": TIMED_OUT}),
        ("rdma-del", "b", {"destination": REMOVED}),
    ),
    # The control channel outlives the queue pairs, or they outlive it. One side may not notice.
    "failover-when-only-a-part-of-a-rail-dies": (
        ("blackhole", None, {"destination": TIMED_OUT + SILENCE}),
        ("blackhole-rdma", None, {"destination": TIMED_OUT, "source": TOLD}),
        ("blackhole-tcp", None, {}),
        ("blackhole-rdma", "a", {"destination": TIMED_OUT, "source": TOLD}),
        ("blackhole-tcp", "a", {"source": SILENCE}),
        ("blackhole-tcp", "b", {"destination": SILENCE}),
    ),
}
for chain, its_faults in CHAINS.items():
    CASES.append((chain, partial(fail_over_again_and_again, faults=its_faults)))


@case("each-fault-thread-has-a-queue-pair-and-no-fault-is-lost-with-a-rail")
def fault_threads(test):
    move = test.move(size_mb=32, pace_us=1000000, settings=("fault-threads=2",))
    move.start_slowly(*both_rails(move), bandwidth="128K")
    for rail, fault in ((1, "cut"), (2, "blackhole")):
        fail_over(move, fault, rail, None)
        test.lab.restore(rail)
    move.finish()


# Both rails fail, for a while or permanently


@case("both-rails-dead-for-20-s-keep-both-sides-paused-until-one-is-back")
def both_dead(test):
    move = test.move()
    move.start_slowly(*both_rails(move))
    cut = move.cut(lambda: [test.lab.cut(rail) for rail in RAILS])
    cut.wait_paused()
    slowest = 0.0
    while time.time() - cut.at < DEAD_SECONDS:
        for engine in move.engines:
            began = time.monotonic()
            engine.query()
            slowest = max(slowest, time.monotonic() - began)
        cut.expect_only_paused()
    expect(slowest < ANSWER_SECONDS, f"a monitor took {slowest:.1f} s to answer while both rails were dead")
    test.notes.append(f"both rails dead for {DEAD_SECONDS} s, slowest monitor answer {slowest * 1000:.0f} ms")
    move.expect_midway()
    cut.expect_only_paused()
    test.lab.mend(2)
    cut.wait_active(90)
    cut.report()
    move.finish()


def falls_back(test, fault):
    """Injects the fault on both rails and both hosts at once."""
    move = test.move()
    move.start_slowly(*both_rails(move), move.uri(1, "tcp"))
    cut = move.cut(lambda: on_each(RAILS, lambda rail: test.lab.inject(fault, rail)))
    cut.wait_active(90)
    cut.expect_path(move.uri(1, "tcp"))
    cut.report(f"{fault} of both rails")
    move.finish()


CASES += [
    ("all-rdma-silent-falls-back-to-tcp", partial(falls_back, fault="blackhole-rdma")),
    ("all-rdma-devices-removed-falls-back-to-tcp", partial(falls_back, fault="rdma-del")),
]


# Recovery by command, and interference with it


def reasons_of_pause(engine, nth):
    """Returns the reason in the engine's n-th event of a pause."""
    paused = [event["data"] for event in engine.migrations() if event["data"]["status"] == "postcopy-paused"]
    return f"{engine.name}: {paused[nth - 1].get('reason')}" if len(paused) >= nth else f"{engine.name}: not paused"


def type_recovery(move, uri):
    """Types the command without -d, so that it returns at the end of the migration."""
    return move.lab.a.popen(move.source.ctl, move.source.qmp_path, f"migrate -r {uri}")


@case("recovery-by-hand-waits-for-the-end-of-the-migration")
def by_hand(test):
    move = test.move(settings=("auto-recover=off",))
    move.start_slowly(*both_rails(move))
    cut = move.cut(lambda: test.lab.cut(1))
    cut.wait_paused()
    cut.expect_only_paused()
    typed = type_recovery(move, move.uri(2))
    cut.wait_active()
    cut.expect_path(move.uri(2))
    cut.report()
    expect(typed.alive(), f"the command did not wait: {typed.output()}")
    move.complete()
    code = typed.wait(20)
    expect(code == 0, f"the command ended with {code}: {typed.output()}")
    move.finish()


@case("killed-engines-are-replaced-and-the-migration-recovers")
def killed(test):
    """The kernel ends the killed engine's queue pairs, so that no READ of it lands in pages that
    the next engine has placed."""
    move = test.move(settings=("auto-recover=off", "max-postcopy-bandwidth=256K"))
    move.start(move.uri(1))
    move.wait_midway()
    for engine in (move.destination, move.source):
        move.replace(engine)
        move.wait_all("postcopy-paused")
        left = move.expect_midway()
        move.source.hmp(f"migrate -d -r {move.uri(2)}")
        move.wait_all("postcopy-active")
        wait_for("more pages come", 60, lambda before=left: move.destination.remaining() < before)
    move.finish()


@case("engines-without-privileges-recover-over-rdma")
def without_privileges(test):
    """After they have become another user, engines connect standbys and lanes, register memory in
    recoveries, listen again, and are replaced after a kill."""
    with unprivileged.devices_of_group(*test.lab.hosts):
        move = test.move(
            size_mb=32,
            pace_us=1500000,
            settings=("max-postcopy-bandwidth=128K",),
            options=unprivileged.as_user("--group", unprivileged.GROUP),
            wrapper=unprivileged.limited(),
        )
        move.start_slowly(*both_rails(move), bandwidth="128K")
        pinned = [unprivileged.expect_unprivileged(engine) for engine in move.engines]
        limit = unprivileged.LIMIT // 1024
        test.notes.append(f"pinned by source and destination, with a limit of {limit} KiB: {pinned} KiB")
        for rail in RAILS:
            fail_over(move, "cut", rail, None)
            test.lab.restore(rail)
        recover_at_another_port(move, PORT + 10)
        for engine in move.engines:
            cut = move.cut(lambda killed=engine: move.replace(killed))
            survivor = move.engines[1 - move.engines.index(engine)]
            cut.wait_seen("postcopy-active", 60, [survivor])
            move.wait_all("postcopy-active")
            for each in move.engines:
                unprivileged.expect_unprivileged(each)
        move.finish()


def recover_at_another_port(move, port):
    """Recovers by command. The destination listens at another port."""
    move.source.hmp("migrate_pause")
    move.wait_all("postcopy-paused")
    move.destination.hmp(f"migrate_recover rdma:0.0.0.0:{port}?ack-timeout=17&{PATIENT_URI}")
    uri = f"rdma:{move.lab.b.address(2)}:{port}?{PATIENT_URI}"
    by_hand = move.cut(lambda: move.source.hmp(f"migrate -d -r {uri},{move.uri(1)}"))
    by_hand.wait_seen("postcopy-active", 60)


@case("engine-without-permission-on-rdma-devices-says-how-to-get-it")
def may_not(test):
    """The guest stays at the source, and migrates once the engines have the permission."""
    words = "no permission on /dev/infiniband/*", "--group"
    move = test.move(incoming="defer", options=unprivileged.as_user())
    listen = f"migrate_incoming rdma:0.0.0.0:{PORT}?ack-timeout=17&{PATIENT_URI}"
    with unprivileged.devices_of_group(test.lab.b):
        move.destination.refused(listen, *words)
    move.destination.hmp(listen)
    with unprivileged.devices_of_group(test.lab.a):
        move.source.refused(f"migrate {move.uri(1)}", *words)
    status = move.source.status()
    expect(status == "failed", f"the source is {status}")
    move.source_guest.wait_verifies()
    move.start(move.uri(1))
    move.finish()


@case("stale-peer-and-strangers-queue-pair-do-not-disturb")
def stale_and_strange(test):
    lab = test.lab
    move = test.move(settings=("auto-recover=off",))
    recorder = strangers.HelloRecorder(lab.a, 1)
    move.start_slowly(*both_rails(move))
    move.slow_down("128K")  # an unexpected peer waits for seconds before it is refused
    hello = recorder.hello()
    cut = move.cut(lambda: None)
    expect(strangers.epoch_of(hello) == 1, f"the first HELLO has epoch {strangers.epoch_of(hello)}")

    late = strangers.of_a_recovery(hello)
    foreign = strangers.of_another_migration(late)

    def current():
        """Returns the epoch in use. Standby connections also consume numbers."""
        return move.destination.query()["postroad"]["epoch"]

    def send_hellos():
        """Sends three HELLOs: that of epoch 1, that of a source that has missed a recovery, and
        that of another migration."""
        reasons = strangers.send_hellos(lab.a, lab.b.address(2), hello, late, foreign)
        test.notes.append("; ".join(reasons))
        over = f"epoch 1 is over; the current one is {current()}"
        expect(len(reasons) == 3 and over in reasons[1], f"a reason should say that epoch 1 is over: {reasons}")

    def stranger(timeout_ms):
        return strangers.StrangersQueuePair(lab.a, test.build, move.uri(2), timeout_ms)

    send_hellos()
    stranger(1000).expect_refused()
    statuses = [cut.statuses(engine) for engine in move.engines]
    expect(not any(statuses), f"strangers changed the state of a running migration: {statuses}")

    cut = move.cut(lambda: lab.cut(1))
    cut.wait_paused()
    patient = stranger(60000)
    send_hellos()
    cut.expect_only_paused()
    move.source.hmp(f"migrate -d -r {move.uri(2)}")
    cut.wait_active()
    patient.expect_refused("refused the data lane")

    cut = move.cut(lambda: None)
    expect(current() > 1, "the recovery has taken no new epoch")
    send_hellos()
    statuses = [cut.statuses(engine) for engine in move.engines]
    expect(not any(statuses), f"strangers changed the state of a recovered migration: {statuses}")
    move.finish()


@case("malicious-destination-cannot-change-the-sources-memory")
def hostile(test):
    """The destination posts a WRITE and an atomic addition in place of two READs, with the keys
    that it has. It reads both pages afterwards, so that the guest would find a change."""
    move = test.move(destination_env={"LD_PRELOAD": find_built(test.build, "libhostile.so")})
    move.start_slowly(*both_rails(move))
    for what, recoveries in (("WRITE", 1), ("atomic", 2)):
        wait_for(
            f"the destination has posted its {what} and both have recovered",
            60,
            lambda n=recoveries: move.source.query()["postroad"]["recoveries"] >= n,
        )
        posted = f"hostile: {what} to" in move.destination.process.output()
        expect(posted, f"the engines recovered, but the destination posted no {what}")
        test.notes.append(f"{what}: " + "; ".join(reasons_of_pause(each, recoveries) for each in move.engines))
    move.complete()
    move.destination_guest.end()
    move.source.end()
    said = move.destination.process.output()
    tries = re.findall(r"only a bug explains: remote (?:access|invalid request) error", said)
    expect(len(tries) == 2, f"two operations should have been refused: {tries}")


def cut_rail_2_in_recovery(move):
    """Returns whether the rail was cut before the recovery was complete. The race is intended."""
    again = move.cut(lambda: move.source.hmp(f"migrate -d -r {move.uri(2)}"))
    again.wait_seen("postcopy-recover-setup", 30, [move.source])
    move.lab.cut(2)
    again.wait_seen("postcopy-paused", 60, [move.source])
    move.wait_all("postcopy-paused")
    move.lab.mend(2)
    return all("postcopy-active" not in again.statuses(engine) for engine in move.engines)


def cut_after_messages(move, messages):
    """Cuts the path after this number of messages of the recovery's handshake."""
    uri = f"faulty+{move.uri(2)}&cut-after-messages={messages}"
    again = move.cut(lambda: move.source.hmp(f"migrate -d -r {uri}"))
    again.wait_seen("postcopy-paused", 60, [move.source])
    move.wait_all("postcopy-paused")
    again.expect_only_paused()


@case("cuts-during-recovery-lead-back-to-the-pause-again-and-again")
def cut_during_recovery(test):
    move = test.move(settings=("auto-recover=off",))
    move.start_slowly(*both_rails(move))
    first = move.cut(lambda: test.lab.cut(1))
    first.wait_paused()
    for messages in range(1, 4):
        cut_after_messages(move, messages)
    hits = 0
    for _ in range(RACES):
        hits += cut_rail_2_in_recovery(move)
        if hits == 2:
            break
    expect(hits, f"none of {RACES} recoveries was cut before it was complete")
    last = move.cut(lambda: move.source.hmp(f"migrate -d -r {move.uri(2)}"))
    last.wait_seen("postcopy-active", 60)
    last.expect_path(move.uri(2))
    move.finish()


# A stock QEMU


def boot_guest(test, **more):
    image = os.path.join(test.lab.share, "boot-sector.img")
    return {"guest": BootGuest, "image": build_boot_sector(image, 16), **more}


@case("stock-qemu-with-the-agent-preloaded-moves-over-rdma")
def qemu_moves(test):
    move = test.move(**boot_guest(test, preload=True))
    move.start(move.uri(1))
    move.finish()


@case("stock-qemu-outlives-its-rail")
def qemu_outlives(test):
    move = test.move(**boot_guest(test))
    move.start_slowly(*both_rails(move))
    fail_over(move, "cut", 1, None)
    move.finish()


def outlive_with_huge_pages(test, **kind):
    with huge_pages(test, BootGuest.RAM_MB // 2):
        move = test.move(**boot_guest(test, backend="huge", **kind))
        move.start_slowly(*both_rails(move))
        fail_over(move, "cut", 1, None)
        move.finish()


@case("guest-of-huge-pages-outlives-its-rail")
def huge(test):
    outlive_with_huge_pages(test)


@case("guest-of-huge-pages-outlives-its-rail-with-the-newest-qemu")
def huge_newest(test):
    outlive_with_huge_pages(test, qemu=qemu_versions()[-1].program)
