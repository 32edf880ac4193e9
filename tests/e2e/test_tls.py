# SPDX-License-Identifier: GPL-2.0-or-later
"""Migrations with certificates, and peers without one."""

from harness.case import case
from harness.engine import Engine
from harness.lab import Move
from harness.process import LONG, expect, wait_for
from harness.vm import GuestSpec, Qemu


def recover_with_tls(lab, scheme):
    """Both paths are encrypted: the one that is cut and the one of the recovery."""
    move = Move(lab, scheme=scheme, settings=("auto-recover=off",), tls=True)
    move.slow_down()
    move.start()
    move.wait_midway()
    move.network.link_down(1)
    move.wait_paused()
    move.finish_over(link=2)
    for engine in move.engines:
        log = engine.process.output()
        expect("TLS 1.3 with" in log, f"{engine.name} did not speak TLS 1.3: {log[-2000:]}")


@case("recover-with-tls-over-tcp-after-link-cut")
def tls_tcp(lab):
    recover_with_tls(lab, "tcp")


@case("recover-with-tls-over-ofi-after-link-cut")
def tls_ofi(lab):
    recover_with_tls(lab, "ofi")


@case("standby-path-takes-over-with-tls")
def tls_standby(lab):
    move = Move(lab, scheme="tcp", tls=True)
    move.slow_down()
    move.source.hmp(f"migrate -d {move.uri(link=1)},{move.uri(link=2)}")
    move.wait_midway()
    wait_for(
        "the other path stands by",
        LONG,
        lambda: "standby" in [path.get("state") for path in move.source.paths()],
    )
    move.network.link_down(1)
    wait_for("the source recovers", LONG, lambda: move.source.query()["postroad"]["recoveries"] >= 1)
    move.full_speed()
    move.wait_completed()
    move.expect_guest_sound()


@case("source-without-certificates-is-told-and-disturbs-nothing")
def plain_source(lab):
    move = Move(lab, scheme="tcp", tls=True)
    other_vm = Qemu(lab, lab.network.source, GuestSpec(), name="qemu-other")
    other = Engine(lab, lab.network.source, other_vm.guest_option(), name="postroad-other")
    other_vm.wait_booted()
    move.slow_down()
    move.start()
    move.wait_midway()
    other.hmp(f"migrate -d {move.uri(link=2)}")
    info = other.wait_status("failed")
    expect("wants TLS" in info["error-desc"], f"the reason is not named: {info['error-desc']}")
    expect(other_vm.status() == "running", "the other guest does not run any more")
    move.full_speed()
    move.wait_completed()
    move.expect_guest_sound()
    expect(move.source.query()["postroad"]["pauses"] == 0, "the migration was disturbed")
