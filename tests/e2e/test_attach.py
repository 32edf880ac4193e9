# SPDX-License-Identifier: GPL-2.0-or-later
"""Engines that attach to a QEMU which was started without any preparation (guest/attach/): QEMUs of
other users and in their own sandbox, the preload agent instead, and helpers that die."""

import os
import signal
import subprocess

from harness.case import case
from harness.engine import Engine
from harness.lab import Move, children_of
from harness.process import LONG, Failure, expect, wait_for
from harness.vm import GuestSpec, Qemu

# The options with which libvirt starts QEMU.
SANDBOX = ("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
CAPABILITIES = 1 << 19 | 1 << 1  # SYS_PTRACE, DAC_OVERRIDE
OVER = ("none", "failed", "cancelled")  # no migration is under way


def uid_of(vm):
    with open(f"/proc/{vm.process.pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("Uid:"))


def move_and_verify(lab, **vm):
    move = Move(lab, vm=vm)
    move.start()
    move.wait_completed()
    move.expect_guest_sound()
    return move


@case("move-of-a-qemu-in-its-own-sandbox")
def in_a_sandbox(lab):
    move_and_verify(lab, options=SANDBOX)


@case("move-of-a-qemu-that-has-become-another-user")
def runas(lab):
    move = move_and_verify(lab, options=("-runas", "nobody"))
    expect(uid_of(move.destination_vm) != 0, "QEMU runs as root: the test proves nothing")


@case("move-of-a-qemu-of-another-user-in-its-own-sandbox")
def another_user(lab):
    os.chmod(lab.directory, 0o777)  # for QEMU's sockets and its console
    wrapper = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "--")
    move = move_and_verify(lab, options=SANDBOX, wrapper=wrapper)
    expect(uid_of(move.destination_vm) != 0, "QEMU runs as root: the test proves nothing")


def start_refused(lab, host, guest, wrapper=()):
    """Starts an engine that must refuse its guest and end. Returns what it prints. wrapper: a
    command that execs it."""
    argv = [*wrapper, lab.engine_file(), "--guest", guest, "--qmp", lab.path("refused.qmp")]
    engine = lab.start("refused-engine", host.command(argv), lab.sanitizer_env)
    expect(engine.wait() == 1, f"an engine that had to refuse its guest ended with {engine.exit_code()}")
    return engine.output()


@case("move-with-the-preload-agent")
def preloaded(lab):
    move = move_and_verify(lab, agent=True)
    for engine in move.engines:
        expect(not children_of(engine.process.pid), f"{engine.name} has a helper as well as an agent")
    said = start_refused(lab, lab.network.destination, f"qemu:qmp={move.destination_vm.qmp_path}")
    expect("add agent=PATH" in said, f"the refusal to attach beside an agent does not name the remedy: {said}")


@case("move-of-a-qemu-that-is-named-by-its-pid")
def by_pid(lab):
    host = lab.network.source
    vm = Qemu(lab, host, GuestSpec())
    vm.wait_booted()
    engine = Engine(lab, host, f"{vm.guest_option()},pid={vm.process.pid}")
    wait_for("the engine serves its monitor", LONG, lambda: engine.status() == "none")
    engine.process.stop()
    said = start_refused(lab, host, f"{vm.guest_option()},pid={os.getpid()}")
    expect("does not run the vCPUs" in said, f"the refusal does not say why: {said}")
    expect("name that one's" in said, f"the refusal does not say what to do: {said}")


def helper_of(engine):
    children = children_of(engine.process.pid)
    expect(len(children) == 1, f"{engine.name} has the children {children}")
    return children[0]


@case("helper-that-dies-between-stop-and-run-does-not-keep-the-source-stopped")
def dies_in_the_switch(lab):
    """The source's guest can run on without the helper."""
    move = Move(lab, settings=("auto-recover=off", "heartbeat-timeout=4000"), program="killable-postroad")
    move.source.restart_to_freeze("source-state-sent")
    move.start()
    move.source.wait_frozen()
    os.kill(helper_of(move.source), signal.SIGKILL)
    move.network.link_down(1)
    move.source.thaw()
    wait_for("the source has given up the migration", LONG, lambda: move.source.status() in ("failed", "cancelled"))
    move.expect_source_runs()


@case("attaching-without-the-privilege-is-refused")
def no_privilege(lab):
    host = lab.network.source
    vm = Qemu(lab, host, GuestSpec())
    vm.wait_booted()
    wrapper = ("setpriv", "--bounding-set", "-sys_ptrace", "--inh-caps", "-sys_ptrace", "--")
    said = start_refused(lab, host, vm.guest_option(), wrapper)
    for word in ("SYS_PTRACE", "libpostroad-agent.so", "agent=PATH"):
        expect(word in said, f"the refusal lacks {word!r}: {said}")
    vm.console.wait_running("source")


@case("helper-has-what-it-needs-and-nothing-else")
def confined(lab):
    """It lives until its engine ends, and ignores signals from the terminal."""
    host = lab.network.source
    vm = Qemu(lab, host, GuestSpec())
    engine = Engine(lab, host, vm.guest_option())
    helper = helper_of(engine)
    with open(f"/proc/{helper}/status") as status:
        fields = dict(line.rstrip("\n").split(":\t", 1) for line in status if ":\t" in line)
    for name in ("CapPrm", "CapEff", "CapBnd"):
        expect(int(fields[name], 16) == CAPABILITIES, f"the helper has {name} {fields[name]}")
    expect(int(fields["CapInh"], 16) == 0, f"the helper has CapInh {fields['CapInh']}")
    expect(fields["NoNewPrivs"] == "1", "the helper may gain privileges")
    sanitized = lab.engine_build != lab.build
    expect(fields["Seccomp"] == "2" or sanitized, "the helper has no filter of system calls")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(helper, number)
    expect(engine.status() == "none", "the engine does not answer")
    expect(helper_of(engine) == helper, "a signal that is for the engine has ended the helper")
    expect("it has ended" not in engine.process.output(), "a signal that is for the engine has ended the helper")
    engine.kill()
    wait_for("the helper ends with its engine", LONG, lambda: not os.path.exists(f"/proc/{helper}"))


# Helpers that die


def kill_helper(engine):
    os.kill(helper_of(engine), signal.SIGKILL)
    wait_for(
        f"{engine.name} says that its helper has ended", LONG, lambda: "it has ended" in engine.process.output()
    )


@case("killed-helpers-in-mid-pull-and-then-their-engines")
def helpers_die(lab):
    """The pull goes on without helpers, and the next engines recover."""
    move = Move(lab, settings=("auto-recover=off",))
    move.start_midway()
    for engine in move.engines:
        kill_helper(engine)
        expect(engine.status() == "postcopy-active", f"{engine.name} is {engine.status()} without its helper")
    left = move.expect_midway()
    wait_for("pages come without helpers", LONG, lambda: move.destination.remaining() < left)
    move.expect_midway()
    for engine in move.engines:
        engine.kill()
    for engine in move.engines:
        engine.resume()
    move.wait_paused()
    move.finish_over(link=1)


@case("killed-helpers-in-mid-pull-and-the-move-ends-without-them")
def helpers_not_missed(lab):
    """The fault mode can be turned off without helpers. Only engines that are started anew have
    helpers again."""
    move = Move(lab)
    move.start_midway()
    for engine in move.engines:
        kill_helper(engine)
    move.expect_midway()
    move.finish()
    said = move.destination.process.output()
    expect("turning the fault mode off" not in said, f"the fault mode is on still: {said[-500:]}")


@case("qemu-that-dies-without-a-helper-beside-it-is-told")
def dies_without_helper(lab):
    move = Move(lab)
    move.start_midway()
    kill_helper(move.destination)
    move.destination_vm.process.kill()
    wait_for(
        "the destination tells of QEMU's end",
        LONG,
        lambda: any("the guest is gone" in (reason or "") for _, reason in move.destination.reasons()),
    )


def userfaultfds(engine):
    """Counts those of the engine and its helper."""
    folders = [f"/proc/{pid}/fd" for pid in (engine.process.pid, *children_of(engine.process.pid))]
    links = []
    for folder in folders:
        for name in os.listdir(folder):
            try:
                links.append(os.readlink(f"{folder}/{name}"))
            except FileNotFoundError:
                pass
    return links.count("anon_inode:[userfaultfd]")


@case("userfaultfds-of-a-killed-qemu-are-closed")
def killed_qemu_is_let_go(lab):
    """Otherwise kernel threads that wait for its pages, such as KVM's, would wait until the engine
    ends."""
    move = Move(lab, settings=("auto-recover=off",))
    move.start_midway()
    expect(userfaultfds(move.destination) > 0, "the engine has no userfaultfd")
    move.destination_vm.process.kill()
    wait_for("the engine closes its userfaultfds", LONG, lambda: userfaultfds(move.destination) == 0)
    move.destination.wait_status("postcopy-paused")


# The crash points where a helper dies, with the number of the pass. The first stop of QEMU is the
# probe's, which makes no calls. Then the helper parks the state memfd, and turns the fault mode
# on. At the end it undoes both in the opposite order.
POINTS = (
    "attach-stopped",
    "attach-stopped:2",
    "attach-scratch-written",
    "attach-registers-set",
    "attach-in-call",
    "attach-call-done",
    "attach-before-restore",
    "attach-restored",
    "attach-pair-made",
    "attach-sent",
    "attach-received",
    "attach-pushed",
    "attach-stopped:3",
    "attach-in-call:7",
    "attach-call-done:8",
    "attach-uffd-made",
    "attach-uffd-ready",
    "attach-registered",
    "attach-entries-dropped",
    "attach-marked",
    "attach-unregistered",
    "attach-uffd-closed",
)
# Points that a move does not reach by itself. Each has its own case.
ELSEWHERE = ("attach-old-state-closed",)


def carry_on(move):
    """Does what an operator would do next to move the guest. Returns True when the migration has
    completed."""
    source, destination = (engine.status() for engine in move.engines)
    if (source, destination) == ("completed", "completed"):
        return True
    if source == "postcopy-paused" and destination in ("postcopy-paused", "completed"):
        move.resume()
    elif source in OVER and destination == "postcopy-paused":
        move.destination.hmp("migrate_cancel")
    elif source in OVER and destination in OVER:
        move.start()
    return False


def wait_killed(engine, point, times):
    """Waits until the helper dies at this point, and kills its engine. Without a helper the engine
    may also have ended by itself."""
    said = "killed at its crash point"
    wait_for(f"the helper dies at {point}", LONG, lambda: engine.process.output().count(said) == times)
    engine.process.kill()
    engine.process.wait()
    engine.process.name = f"killed-{engine.name}"
    engine.qmp.close()


def die_and_go_on(lab, *points):
    """The destination's helpers die, one at each of these points. Its QEMU lives on, and a new
    engine completes the move."""
    move = Move(lab, scheme="tcp", settings=("auto-recover=off",), program="killable-postroad")
    engine = move.destination
    engine.process.stop()
    engine.restart(kill_at=points[0])
    engine.connect()
    move.start()
    wait_killed(engine, points[0], 1)
    for count, point in enumerate(points[1:], 2):
        engine.restart("--resume", kill_at=point)
        wait_killed(engine, point, count)
    expect(move.destination_vm.process.alive(), "QEMU has died with the helper")
    engine.resume()
    wait_for("the guest has arrived", LONG, lambda: carry_on(move), interval=0.2)
    move.expect_guest_sound()


for _point in POINTS:
    _name = _point.replace(":", "-time-")
    case(f"helper-killed-at-{_name}")(lambda lab, point=_point: die_and_go_on(lab, point))


@case("helper-killed-at-attach-old-state-closed")
def old_state(lab):
    """A state memfd is parked. The next engine closes it, since its migration had not begun."""
    die_and_go_on(lab, "attach-pushed", "attach-old-state-closed")


@case("helper-killed-at-every-point-there-is", light=True)
def complete(lab):
    """The lists above name all of them."""
    listed = subprocess.run(
        [lab.engine_file("killable-postroad")],
        env={**os.environ, "POSTROAD_KILL": "list-attach"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    tested = {point.split(":")[0] for point in POINTS} | set(ELSEWHERE)
    if set(listed) != tested:
        raise Failure(f"no test for {sorted(set(listed) - tested)}; no such points: {sorted(tested - set(listed))}")
