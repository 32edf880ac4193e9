# SPDX-License-Identifier: GPL-2.0-or-later
"""Bad input and bad days: a clear error, nothing lost, the process still serving."""

import socket

from harness.case import case
from harness.engine import Engine
from harness.lab import Move
from harness.process import expect
from harness.vm import GuestSpec, Qemu


def expect_failed(move, *words):
    info = move.source.wait_status("failed")
    for word in words:
        expect(word in info.get("error-desc", ""), f"the error lacks {word!r}: {info.get('error-desc')!r}")
    move.expect_source_runs()
    return info


@case("different-ram-sizes-are-refused-and-the-guest-runs-on")
def sizes_differ(lab):
    move = Move(lab, destination_spec=GuestSpec(ram_mb=320))
    move.start()
    expect_failed(move, "ram0", "size")


@case("different-ram-blocks-are-refused-and-the-guest-runs-on")
def blocks_differ(lab):
    move = Move(lab, destination_spec=GuestSpec(nodes=2))
    move.start()
    expect_failed(move, "ram")


@case("absent-destination-is-an-error-and-the-guest-runs-on")
def destination_absent(lab):
    move = Move(lab)
    uri = move.uri(port=4999)
    move.source.hmp(f"migrate -d {uri}")
    expect_failed(move, "4999")
    move.start()
    move.wait_completed()
    move.expect_guest_sound()


@case("dead-destination-is-an-error-and-the-guest-runs-on")
def destination_unreachable(lab):
    move = Move(lab, settings=("connect-timeout=1000",))
    move.network.black_hole(1)
    move.start()
    expect_failed(move, move.network.destination.address(1))


@case("second-path-of-the-list-is-taken-when-the-first-does-not-connect")
def second_path(lab):
    move = Move(lab, settings=("connect-timeout=1000",))
    move.network.black_hole(1)
    move.source.hmp(f"migrate -d {move.uri(link=1)},{move.uri(link=2)}")
    move.wait_completed()
    move.expect_guest_sound()


@case("cancel-before-switch-over-leaves-the-guest-running")
def cancel(lab):
    """The destination is reachable and silent, so the migration is still in its set-up."""
    move = Move(lab, settings=("connect-timeout=20000", "handshake-timeout=20000"))
    move.network.black_hole(1)
    move.start()
    move.source.wait_status("setup")
    move.source.hmp("migrate_cancel")
    move.source.wait_status("cancelled", 10)
    move.expect_source_runs()
    move.source.hmp(f"migrate -d {move.uri(link=2)}")
    move.wait_completed()
    move.expect_guest_sound()


@case("cancel-in-postcopy-is-refused")
def cancel_in_postcopy(lab):
    move = Move(lab)
    move.slow_down()
    move.start()
    move.wait_midway()
    move.source.refused("migrate_cancel", "postcopy")
    move.full_speed()
    move.wait_completed()
    move.expect_guest_sound()


@case("migrate-while-one-runs-is-refused")
def migrate_twice(lab):
    move = Move(lab)
    move.slow_down()
    move.start()
    move.wait_midway()
    move.source.refused(f"migrate -d {move.uri()}")
    move.source.refused(f"migrate -d -r {move.uri()}", "postcopy-paused")
    move.destination.refused(f"migrate_recover {move.uri()}", "postcopy-paused")
    move.full_speed()
    move.wait_completed()
    move.expect_guest_sound()


@case("resume-of-nothing-and-nonsense-are-refused")
def nonsense(lab):
    move = Move(lab)
    source = move.source
    source.refused(f"migrate -d -r {move.uri()}", "postcopy-paused")
    source.refused("migrate_pause")
    for uri in ("nonsense", "tcp:", "tcp:host", "tcp:host:port", "tcp:host:70000", "carrier-pigeon:a:1"):
        source.refused(f"migrate -d {uri}", uri.partition(":")[0])
    source.refused("no_such_command", "no_such_command")
    source.refused("migrate_set_parameter no-such-parameter 1", "no-such-parameter")
    source.refused("migrate_set_parameter heartbeat-interval 0", "heartbeat-interval")
    source.refused("migrate_set_parameter heartbeat-interval soon", "heartbeat-interval", "soon")
    source.refused("migrate_set_capability no-such-capability on", "no-such-capability")
    move.expect_source_runs()
    move.start()
    move.wait_completed()
    move.expect_guest_sound()


def refused_source(lab, spec=None, agent=True, words=()):
    """A source QEMU that can't be migrated: says so, and its guest runs on."""
    vm = Qemu(lab, lab.network.source, spec or GuestSpec(), agent=agent)
    engine = Engine(lab, lab.network.source, vm.guest_option())
    vm.wait_booted()
    engine.hmp(f"migrate -d ofi:{lab.network.destination.address(1)}:4444")
    info = engine.wait_status("failed")
    for word in words:
        expect(word in info["error-desc"], f"the error lacks {word!r}: {info['error-desc']!r}")
    expect(vm.status() == "running", f"the guest must run, it is {vm.status()}")
    vm.console.wait_running("source")


@case("qemu-without-shared-ram-is-refused")
def without_share(lab):
    refused_source(lab, spec=GuestSpec(share="off"), words=("share=on",))


@case("qemu-without-the-agent-is-refused")
def without_agent(lab):
    refused_source(lab, agent=False, words=("LD_PRELOAD",))


@case("port-in-use-is-named-and-the-engine-does-not-start")
def port_in_use(lab):
    host = lab.network.destination
    first = Move(lab)
    argv = [lab.engine_file(), "--guest", first.destination_vm.guest_option()]
    argv += ["--qmp", lab.path("second.qmp"), "--incoming", "ofi:0.0.0.0:4444"]
    second = lab.start("second-engine", host.command(argv), lab.sanitizer_env)
    expect(second.wait() == 1, f"a port in use: exit code {second.exit_code()}")
    expect("4444" in second.output(), f"the port is not named: {second.output()}")
    first.start()
    first.wait_completed()
    first.expect_guest_sound()


@case("second-monitor-client-is-served-or-refused")
def second_client(lab):
    move = Move(lab)
    other = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    other.connect(move.source.qmp_path)
    other.settimeout(5)
    expect(other.recv(4096), "a second client of the monitor hears nothing")
    other.sendall(b"this is not JSON\n" * 10)
    expect(move.source.status() == "none", "the first client is not served any more")
    other.close()
    move.start()
    move.wait_completed()
    move.expect_guest_sound()
