# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests under KVM: a stock QEMU on the lab's hosts, whose CPUs have AMD's SVM (emulated, where
this machine's KVM is not used for the hosts).

Under KVM three things differ. A vCPU waits for a page inside KVM_RUN, in the kernel. The kernel
itself accesses the guest's memory. KVM notifies Linux guests of a missing page, and they run
another task until it arrives (asynchronous page faults)."""

import re
import time

from cases import ANSWER_SECONDS, both_rails, boot_guest, fail_over, outlive_with_huge_pages
from move import expect, wait_for
from linux_guest import Flood, LinuxGuest, build_linux
from roce_lab import Host, on_each
from userfaults import recorded

CASES, NEWER_CASES = [], []
SECONDS, LINUX_SECONDS = 300, 800  # bounds of a test
# A guest that is emulated twice leaves its host little CPU time.
PATIENT = ("heartbeat-timeout=10000", "connect-timeout=20000", "handshake-timeout=30000")
IN_KVM_RUN = "kvm_arch_vcpu_ioctl_run"
IN_USERFAULT = "handle_userfault"
PAGES_NOTIFIED = 50
GAP_SECONDS = 60

# Prints the state and the kernel stack of some threads of a process.
STACKS = """
pid=$1
shift
for thread in "$@"; do
    echo "thread $thread"
    grep ^State "/proc/$pid/task/$thread/status"
    cat "/proc/$pid/task/$thread/stack"
done
"""

HANDED_OVER = "the guest at the source, which was handed over"
STOPPED = "it was told to stop, and has stopped"
FENCED = "its RAM is write-protected: what the destination reads has not changed"

# COMMAND PID FILE: runs the command with the RAM of a QEMU and the file as arguments.
WITH_RAM = """
ram=
for fd in /proc/$2/fd/*; do
    case $(readlink "$fd") in
    */memfd:memory-backend*) ram=$fd ;;
    esac
done
"$1" "${ram:?}" "$3"
"""


def case(name, *lists):
    """Registers a test in the lists of the kernels with which it runs."""

    def register(function):
        for each in lists:
            each.append((name, function))
        return function

    return register


def move_under_kvm(test, **kind):
    on_each(test.lab.hosts, Host.load_kvm)
    return test.move(**boot_guest(test, kvm=True, patience=PATIENT, **kind))


def vcpu_threads(guest):
    return [cpu["thread-id"] for cpu in guest.qmp.command("query-cpus-fast")]


def waiting(guest, threads):
    """Returns the states, as letters of ps, of the vCPUs that wait in KVM_RUN for a page."""
    done = guest.host.run("sh", "-c", STACKS, "sh", guest.process.pid, *threads)
    stacks = done.stdout.split("thread ")[1:]
    there = [stack for stack in stacks if IN_KVM_RUN in stack and IN_USERFAULT in stack]
    return [re.search(r"State:\s+(\w)", stack)[1] for stack in there]


def answered(test, what, ask):
    """Expects that a monitor answers soon. Returns its answer."""
    began = time.monotonic()
    answer = ask()
    seconds = time.monotonic() - began
    expect(seconds < ANSWER_SECONDS, f"{what} was answered after {seconds:.1f} s, with a vCPU waiting for a page")
    test.notes.append(f"{what} was answered in {seconds * 1000:.0f} ms while a vCPU waited in KVM_RUN for a page")
    return answer


def expect_paused_engine_answers(test, engine):
    info = answered(test, f"the {engine.name}'s query-migrate", engine.query)
    expect(info["status"] == "postcopy-paused", f"the {engine.name} is {info['status']}")


def expect_answers_without_vcpu(test, guest):
    """Sends a query for which QEMU needs no vCPU."""
    info = answered(test, "QEMU's query-status", lambda: guest.qmp.command("query-status"))
    expect(info["status"] == "running", f"QEMU at the destination is {info}")


def expect_answers_with_vcpu(test, guest):
    """Sends commands for which QEMU interrupts its vCPUs. Linux 6.12 allows that while they wait
    for a page."""
    qmp = guest.qmp
    answered(test, "QEMU's stop", lambda: qmp.command("stop"))
    line = {"command-line": "info registers"}
    said = answered(test, "QEMU's info registers", lambda: qmp.command("human-monitor-command", **line))
    expect("EIP=" in said or "RIP=" in said, f"QEMU's registers are {said!r}")
    info = qmp.command("query-status")
    expect(info["status"] == "paused", f"QEMU at the destination was stopped, and is {info}")
    answered(test, "QEMU's cont", lambda: qmp.command("cont"))


def wait_vcpu_waits(guest, threads):
    return wait_for("a vCPU waits in KVM_RUN for a page", 60, lambda: waiting(guest, threads), interval=0.2)


@case("guest-under-kvm-moves-over-rdma", CASES)
def moves(test):
    move = move_under_kvm(test)
    move.start(move.uri(1))
    move.finish()


@case("guest-under-kvm-outlives-its-rail", CASES)
def outlives(test):
    move = move_under_kvm(test)
    move.start_slowly(*both_rails(move))
    fail_over(move, "cut", 1, None)
    move.finish()


@case("guest-of-huge-pages-under-kvm-outlives-its-rail", CASES)
def huge(test):
    on_each(test.lab.hosts, Host.load_kvm)
    outlive_with_huge_pages(test, kvm=True, patience=PATIENT)


def pause_with_waiting_vcpu(test, break_off):
    """Interrupts a migration. Returns it, and the threads of the destination's vCPUs, one of which
    waits for a page."""
    move = move_under_kvm(test, settings=("auto-recover=off",))
    threads = vcpu_threads(move.destination_guest)
    move.start_slowly(*both_rails(move))
    break_off(move)
    wait_vcpu_waits(move.destination_guest, threads)
    return move, threads


def pause(move):
    move.source.hmp("migrate_pause")
    move.wait_all("postcopy-paused")


def go_on(move, rail):
    left = move.expect_midway()
    move.source.hmp(f"migrate -d -r {move.uri(rail)}")
    move.wait_all("postcopy-active")
    wait_for("more pages come", 60, lambda: move.destination.remaining() < left)
    move.finish()


@case("engine-killed-and-resumed-while-a-vcpu-waits-in-kvm-run", CASES)
def killed(test):
    """Linux 6.1 does not interrupt that vCPU, so the test sends QEMU no command that needs it."""
    move, threads = pause_with_waiting_vcpu(test, lambda move: move.destination.kill())
    expect_answers_without_vcpu(test, move.destination_guest)
    move.follow(move.destination)
    move.wait_all("postcopy-paused")
    expect_answers_without_vcpu(test, move.destination_guest)
    for engine in move.engines:
        expect_paused_engine_answers(test, engine)
    wait_vcpu_waits(move.destination_guest, threads)
    go_on(move, 2)


@case("monitors-answer-while-a-vcpu-waits-in-kvm-run", NEWER_CASES)
def answers(test):
    move, threads = pause_with_waiting_vcpu(test, pause)
    for engine in move.engines:
        expect_paused_engine_answers(test, engine)
    expect_answers_without_vcpu(test, move.destination_guest)
    expect_answers_with_vcpu(test, move.destination_guest)
    wait_vcpu_waits(move.destination_guest, threads)
    go_on(move, 2)


# The operator lets the source's guest run again after the hand-over. The write protection stops it
# at its first write.


def start_fenced(test):
    """Starts a migration, and waits until the source's RAM is write-protected."""
    move = move_under_kvm(test, settings=("auto-recover=off", "guest-timeout=8000"))
    move.start_slowly(*both_rails(move))
    said = move.source.process.output
    wait_for("the source's RAM is fenced", 60, lambda: "is write-protected, which took" in said())
    return move


def with_ram(command, move):
    """Runs a command with the RAM of the source's QEMU and a file."""
    guest = move.source_guest
    return guest.host.run("sh", "-c", WITH_RAM, "sh", command, guest.process.pid, f"{move.directory}/ram")


def let_run(move, watched):
    """Lets the source's guest run. It must wait at its first write, unless a watching engine stops
    it before. Its memory must not change."""
    guest = move.source_guest
    threads, rounds = vcpu_threads(guest), guest.rounds()
    copied = with_ram("cp", move)
    expect(copied.returncode == 0, f"the source's RAM can't be copied: {copied.stderr}")
    said = move.source.process.output
    guest.qmp.send("cont")
    wait_for(
        "a vCPU of the source's guest waits in KVM_RUN, or was stopped before",
        60,
        lambda: waiting(guest, threads) or (watched and STOPPED in said()),
        interval=0.2,
    )
    compared = with_ram("cmp", move)
    expect(compared.returncode == 0, f"the source's RAM has changed: {compared.stdout}{compared.stderr}")
    expect(guest.rounds() == rounds, "the source's guest has written all its memory")
    move.expect_midway()


def recover(move):
    move.source.hmp(f"migrate -d -r {move.uri(2)}")
    for words in (HANDED_OVER, FENCED):
        move.destination.wait_said(words, 20)


def finish_fenced(move):
    """Completes the migration. The answer to `cont` may come only after the fence was lifted."""
    move.full_speed()
    move.wait_all("completed", 90)
    guest = move.source_guest
    expect(guest.qmp.answer(20), "the source's QEMU does not answer after the fence was lifted")
    wait_for("the source's guest is stopped", 20, lambda: guest.qmp.command("query-status")["status"] != "running")
    move.finish()


@case("guest-let-run-at-the-source-changes-no-page-and-is-stopped", CASES)
def let_run_watched(test):
    """The migration is paused, so that it does not end during the test."""
    move = start_fenced(test)
    pause(move)
    let_run(move, watched=True)
    for words in (HANDED_OVER, FENCED):
        move.source.wait_said(words, 20)
    recover(move)
    finish_fenced(move)


@case("guest-let-run-at-the-source-without-an-engine-changes-no-page", NEWER_CASES)
def let_run_orphan(test):
    move = start_fenced(test)
    move.source.kill()
    move.destination.wait_status("postcopy-paused")
    let_run(move, watched=False)
    move.follow(move.source)
    reason = "the next engine of the source says so"
    wait_for(reason, 20, lambda: HANDED_OVER in move.source.query()["postroad"].get("reason", ""))
    recover(move)
    finish_fenced(move)


# Linux


# Users that wait for pages. Only the faults of one user pass through its kernel function.
WAITERS = {
    "kvm_mmu_page_fault": "vCPUs in KVM_RUN",
    "kvm_set_msr_common": "MSRs that are set while the state is loaded, such as kvmclock's",
    "record_steal_time": "steal time",
    "async_pf_execute": "kworkers of asynchronous page faults",
    "tun_do_read": "vhost-net",
}


@case("linux-under-kvm-with-vhost-net-and-async-page-faults-outlives-its-rail", NEWER_CASES)
def linux(test):
    build_linux(test.build)
    on_each(test.lab.hosts, Host.load_kvm)
    move = test.move(guest=LinuxGuest, patience=PATIENT)
    source, destination = move.source_guest, move.destination_guest
    leaving = Flood(move, source)
    leaving.wait_more()
    arriving = Flood(move, destination)
    with recorded(destination.host) as faults:
        move.start_slowly(*both_rails(move))
        expect_notified(move)
        arriving.wait_more()
        fail_over(move, "cut", 1, None)
        arriving.wait_more()
        move.complete(seconds=240)
        expect_all_waited(test, faults.count())
    expect_times(source.console, destination.console)
    move.finish()


def expect_notified(move):
    """Waits until KVM has notified the guest at the destination of arrived pages (asynchronous page
    faults)."""
    source, destination = move.source_guest.console, move.destination_guest.console
    before = source.kvm().told

    def notified():
        return destination.kvm() and destination.kvm().told >= before + PAGES_NOTIFIED

    wait_for(f"KVM notifies the guest of {PAGES_NOTIFIED} pages", 120, notified)
    move.expect_midway()


def expect_all_waited(test, faults):
    for function, who in WAITERS.items():
        expect(faults.get(function), f"{who} waited for no missing page: {faults}")
    waited = ", ".join(f"{faults[function]} by {who}" for function, who in WAITERS.items())
    test.notes.append(f"pages waited for: {waited}")


def expect_times(source, destination):
    """Expects that the guest's clock is KVM's and continues at the destination, and that the steal
    time grows there."""
    first, last = destination.kvm_lines()[0], destination.kvm()
    expect(last.clock == "kvm-clock", f"the guest's clock is {last.clock}")
    expect(last.steal > first.steal, f"the steal time at the destination does not grow: {last.steal}")
    gap = destination.progress()[0].t - source.last().t
    expect(0 < gap < GAP_SECONDS, f"{gap} s lie between the last line at the source and the first at the destination")
