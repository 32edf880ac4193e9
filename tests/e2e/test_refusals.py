# SPDX-License-Identifier: GPL-2.0-or-later
"""Bad input, and failures before the migration has begun: the error is clear, the guest runs on,
and the engine still serves."""

import socket

from harness.case import case
from harness.lab import Move
from harness.process import LONG, expect, wait_for
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
    move = Move(lab, settings=("connect-timeout=3000",))
    move.network.black_hole(1)
    move.start()
    expect_failed(move, move.network.destination.address(1))


@case("second-path-of-the-list-is-taken-when-the-first-does-not-connect")
def second_path(lab):
    move = Move(lab, settings=("connect-timeout=3000",))
    move.network.black_hole(1)
    move.source.hmp(f"migrate -d {move.uri(link=1)},{move.uri(link=2)}")
    move.wait_completed()
    move.expect_guest_sound()


@case("cancel-before-switch-over-leaves-the-guest-running")
def cancel(lab):
    """The link loses everything, so that the migration is still in its set-up."""
    move = Move(lab, settings=("connect-timeout=20000", "handshake-timeout=20000"))
    move.network.black_hole(1)
    move.start()
    move.source.wait_status("setup")
    move.source.hmp("migrate_cancel")
    move.source.wait_status("cancelled")
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
    source.refused(f"migrate -d -r {move.uri()}", "migration is none")
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


def start_engine(lab, host, vm, *options):
    """Starts an engine that must refuse its options and end. Returns what it prints."""
    argv = [lab.engine_file(), "--guest", vm.guest_option(), "--qmp", lab.path("refused.qmp"), *options]
    engine = lab.start("refused-engine", host.command(argv), lab.sanitizer_env)
    expect(engine.wait() == 1, f"an engine that had to refuse its options ended with {engine.exit_code()}")
    return engine.output()


def refused_source(lab, *words, spec=None):
    """The engine refuses a QEMU that can't be moved, and the guest runs on. QEMU has the preload
    agent, which the engine asks for the RAM as it starts."""
    vm = Qemu(lab, lab.network.source, spec or GuestSpec(), agent=True)
    vm.wait_booted()
    said = start_engine(lab, lab.network.source, vm)
    for word in words:
        expect(word in said, f"the refusal lacks {word!r}: {said!r}")
    expect(vm.status() == "running", f"the guest must run, it is {vm.status()}")
    vm.console.wait_running("source")


@case("qemu-without-shared-ram-is-refused")
def without_share(lab):
    refused_source(lab, "share=on", spec=GuestSpec(share="off"))


@case("qemu-with-one-private-ram-backend-is-refused")
def one_private_backend(lab):
    move = Move(lab, spec=GuestSpec(nodes=2, share="on,off", fresh=True))
    move.start()
    expect_failed(move, "ram1", "share=on")


@case("second-engine-beside-one-guest-is-refused")
def second_engine(lab):
    move = Move(lab)
    said = start_engine(lab, lab.network.source, move.source_vm)
    expect("another engine" in said, f"the refusal does not say why: {said}")
    move.start()
    move.wait_completed()
    move.expect_guest_sound()


@case("port-in-use-is-named-and-the-engine-does-not-start")
def port_in_use(lab):
    host = lab.network.destination
    vm = Qemu(lab, host, GuestSpec(), incoming=True)
    lab.start("other-program", host.command(["socat", "TCP-LISTEN:4444", "STDOUT"]), gently=False)
    wait_for("the other program listens", LONG, lambda: ":4444" in host.run("ss", "-ltn"))
    said = start_engine(lab, host, vm, "--insecure", "--incoming", "ofi:0.0.0.0:4444")
    expect("4444" in said and "in use" in said, f"the port is not named: {said}")


@case("listening-for-other-hosts-needs-certificates-or-the-word")
def open_without_tls(lab):
    host = lab.network.destination
    vm = Qemu(lab, host, GuestSpec(), incoming=True)
    said = start_engine(lab, host, vm, "--incoming", f"ofi:{host.address(1)}:4444")
    expect("--tls-dir" in said and "--insecure" in said, f"the remedies are not named: {said}")


@case("second-monitor-client-is-served-or-refused")
def second_client(lab):
    move = Move(lab)
    other = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    other.connect(move.source.qmp_path)
    other.settimeout(30)
    expect(other.recv(4096), "a second client of the monitor hears nothing")
    other.sendall(b"this is not JSON\n" * 10)
    expect(move.source.status() == "none", "the first client is not served any more")
    other.close()
    move.start()
    move.wait_completed()
    move.expect_guest_sound()
