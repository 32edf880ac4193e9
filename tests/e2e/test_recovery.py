# SPDX-License-Identifier: GPL-2.0-or-later
"""Paths that fail in the middle of postcopy, and recoveries."""

import time

from harness.case import case
from harness.lab import SLOW, Move
from harness.process import LONG, expect, wait_for
from harness.vm import GuestSpec

PAUSED_AND_BACK = (
    "postcopy-active",
    "postcopy-paused",
    "postcopy-recover",
    "postcopy-active",
    "completed",
)


def start_and_stop_midway(lab, scheme, slow=SLOW, **kind):
    """Starts a migration that does not recover by itself, and waits for the middle."""
    move = Move(lab, scheme=scheme, settings=("auto-recover=off",), **kind)
    move.slow_down(slow)
    move.start()
    move.wait_midway()
    return move


def cut_and_recover(lab, scheme):
    move = start_and_stop_midway(lab, scheme)
    move.network.link_down(1)
    move.wait_paused()
    move.finish_over(link=2)
    move.expect_path_taken(*PAUSED_AND_BACK)


@case("recover-over-ofi-after-link-cut")
def recover_ofi(lab):
    cut_and_recover(lab, "ofi")


@case("recover-over-tcp-after-link-cut")
def recover_tcp(lab):
    cut_and_recover(lab, "tcp")


@case("recover-with-another-transport")
def recover_other_transport(lab):
    """The second path has another transport than the first."""
    move = start_and_stop_midway(lab, "ofi", incoming="ofi:0.0.0.0:4444,tcp:0.0.0.0:4445")
    move.network.link_down(1)
    move.wait_paused()
    move.source.hmp(f"migrate -d -r tcp:{move.network.destination.address(2)}:4445")
    move.full_speed()
    move.wait_completed()
    move.expect_guest_sound()


@case("guest-runs-on-with-the-pages-it-has-while-paused", heavy=True)
def guest_runs_while_paused(lab):
    """Only pages of the workers are missing when the path is cut. So everything else in the guest
    runs on. It may take any time until all other pages have come: the workers wait for the
    surveyor, so that most of their pages are still missing."""
    spec = GuestSpec(ram_mb=128, work_mb=32, work_rate=0, survey=True, per_survey=1024, fresh=True)
    move = start_and_stop_midway(lab, "ofi", spec=spec, slow="128K")
    move.destination_vm.console.wait_surveyed()
    move.network.link_down(1)
    move.wait_paused()
    move.destination_vm.console.wait_running("destination, paused")
    began = move.destination_vm.console.last()
    move.destination_vm.console.wait_running("destination, paused for longer")
    after = move.destination_vm.console.last()
    expect(after.t > began.t, f"the guest's time stands still at {after.t} s")
    move.expect_midway()
    move.finish_over(link=2)


@case("recover-twice-in-a-row")
def recover_twice(lab):
    move = start_and_stop_midway(lab, "ofi")
    move.network.link_down(1)
    move.wait_paused()
    move.resume(link=2)
    for engine in move.engines:
        engine.wait_status("postcopy-active")
    move.wait_midway(fraction=0.8)
    move.network.link_up(1)
    move.network.link_down(2)
    move.wait_paused()
    move.finish_over(link=1)
    move.expect_path_taken(*PAUSED_AND_BACK[:-1], *PAUSED_AND_BACK[1:])


@case("recover-after-recovery-over-a-dead-link-failed")
def recovery_fails_first(lab):
    move = start_and_stop_midway(lab, "ofi")
    move.network.link_down(1)
    move.wait_paused()
    move.resume(link=1)
    wait_for(
        "the recovery over the dead link is given up",
        LONG,
        lambda: move.source.statuses().count("postcopy-paused") >= 2,
    )
    move.wait_paused()
    move.finish_over(link=2)


@case("recover-after-silent-loss")
def silent_loss(lab):
    """Both ends of the link stay up, and there is no error: only the heartbeat can detect this."""
    move = start_and_stop_midway(lab, "ofi")
    move.network.black_hole(1)
    move.wait_paused()
    for engine in move.engines:
        engine.wait_said("nothing heard")
    move.finish_over(link=2)


@case("recover-over-the-same-link-once-it-is-back")
def same_link(lab):
    move = start_and_stop_midway(lab, "tcp")
    move.network.black_hole(1)
    move.wait_paused()
    move.network.end_black_hole(1)
    move.finish_over(link=1)


def cut_during_bitmaps(lab, scheme):
    """Several recoveries are cut, each after one more message of the bitmap exchange."""
    move = start_and_stop_midway(lab, scheme)
    move.network.link_down(1)
    move.wait_paused()
    for messages in range(1, 5):
        paused = move.source.statuses().count("postcopy-paused")
        move.resume(link=2, prefix="faulty+", options=f"?cut-after-messages={messages}")
        wait_for(
            f"a recovery that is cut after {messages} messages goes back to paused",
            LONG,
            lambda before=paused: move.source.statuses().count("postcopy-paused") > before,
        )
        move.wait_paused()
    move.finish_over(link=2)


@case("recover-after-cut-during-bitmap-exchange-over-ofi")
def bitmaps_ofi(lab):
    cut_during_bitmaps(lab, "ofi")


@case("recover-after-cut-during-bitmap-exchange-over-tcp")
def bitmaps_tcp(lab):
    cut_during_bitmaps(lab, "tcp")


@case("recover-on-the-direct-path-after-socat-bridge-died")
def socat_bridge(lab):
    """The test of QEMU's first postcopy recovery: the path is a socat bridge, which is killed. The
    recovery is over the direct path."""
    move = Move(lab, scheme="tcp", settings=("auto-recover=off",))
    host = lab.network.source
    direct = lab.network.destination.address(1)
    bridge = lab.start(
        "socat",
        host.command(["socat", "TCP-LISTEN:6666,fork,reuseaddr,bind=127.0.0.1", f"TCP:{direct}:4444"]),
        gently=False,
    )
    wait_for("the bridge listens", LONG, lambda: "127.0.0.1:6666" in host.run("ss", "-ltn"))
    move.slow_down()
    move.source.hmp("migrate -d tcp:127.0.0.1:6666")
    move.wait_midway()
    lab.kill_tree(bridge)
    move.wait_paused()
    move.finish_over(link=1)
    move.expect_path_taken(*PAUSED_AND_BACK)


@case("recover-while-the-main-loop-of-qemu-is-stuck")
def main_loop_stuck(lab):
    """QEMU's main thread waits for a page that can't come, so that its monitor hangs. With a
    postcopy inside of QEMU nobody could ask for a recovery then. Postroad's monitor does not
    hang."""
    move = start_and_stop_midway(lab, "ofi")
    move.network.link_down(1)
    move.wait_paused()
    qemu = move.destination_vm
    size = qemu.spec.ram_mb << 20
    qemu.qmp.send("pmemsave", val=0, size=size, filename=lab.path("memory"))
    answer = qemu.qmp.answer(3)
    expect(answer is None, f"QEMU's monitor was to hang on a missing page, but answers {answer}")
    for engine in move.engines:
        expect(engine.status() == "postcopy-paused", f"{engine.name} is {engine.status()}")
    expect(qemu.qmp.answer(1) is None, "QEMU's monitor was to hang until the page has come")
    move.resume(link=2)
    move.full_speed()
    answer = qemu.qmp.answer(LONG)
    expect(answer and "return" in answer, f"after the recovery QEMU's monitor answers {answer}")
    move.wait_completed()
    move.expect_guest_sound()


def asked_to_pause(lab, side):
    move = start_and_stop_midway(lab, "ofi")
    getattr(move, side).hmp("migrate_pause")
    move.wait_paused()
    move.finish_over(link=1)


@case("migrate-pause-at-the-source-pauses-both")
def pause_source(lab):
    asked_to_pause(lab, "source")


@case("migrate-pause-at-the-destination-pauses-both")
def pause_destination(lab):
    asked_to_pause(lab, "destination")


@case("migrate-recover-adds-a-listener-and-the-old-one-stays")
def recover_adds_listener(lab):
    move = start_and_stop_midway(lab, "ofi")
    address = lab.network.destination.address(2)
    move.network.link_down(1)
    move.wait_paused()
    move.destination.hmp(f"migrate_recover tcp:{address}:5555")
    listening = lab.network.destination.run("ss", "-ltn")
    for port in (":4444", ":5555"):
        expect(port in listening, f"nobody listens on {port}: {listening}")
    move.source.hmp(f"migrate -d -r tcp:{address}:5555")
    move.full_speed()
    move.wait_completed()
    move.expect_guest_sound()


def recover_by_itself(lab, scheme):
    """Both paths are listed. One is lost after the other, and the engines recover by themselves."""
    move = Move(lab, scheme=scheme)
    move.slow_down()
    move.source.hmp(f"migrate -d {move.uri(link=1)},{move.uri(link=2)}")
    move.wait_midway(fraction=0.8)
    for lost, left in ((1, 2), (2, 1)):
        recoveries = move.source.query()["postroad"]["recoveries"]
        move.network.black_hole(lost)
        wait_for(
            f"the source recovers over link{left} by itself",
            LONG,
            lambda before=recoveries: move.source.query()["postroad"]["recoveries"] > before,
        )
        move.expect_midway()
        move.network.end_black_hole(lost)
    move.full_speed()
    move.wait_completed()
    move.expect_path_taken(*PAUSED_AND_BACK[:-1], *PAUSED_AND_BACK[1:])
    move.expect_guest_sound()


@case("recover-by-itself-over-the-other-listed-ofi-path")
def by_itself_ofi(lab):
    recover_by_itself(lab, "ofi")


@case("recover-by-itself-over-the-other-listed-tcp-path")
def by_itself_tcp(lab):
    recover_by_itself(lab, "tcp")


@case("recover-by-itself-over-another-transport")
def by_itself_other_transport(lab):
    move = Move(lab, incoming="ofi:0.0.0.0:4444,tcp:0.0.0.0:5555")
    move.slow_down()
    last_resort = f"tcp:{lab.network.destination.address(2)}:5555"
    move.source.hmp(f"migrate -d {move.uri(link=1)},{last_resort}")
    move.wait_midway(fraction=0.8)
    move.network.link_down(1)
    wait_for("the source recovers", LONG, lambda: move.source.query()["postroad"]["recoveries"] >= 1)
    expect(path_of(move.source, last_resort)["state"] == "active", f"paths: {move.source.paths()}")
    move.full_speed()
    move.wait_completed()
    move.expect_guest_sound()


def path_of(engine, uri):
    """Returns what query-paths says about one path."""
    return next((path for path in engine.paths() if path["uri"] == uri), {"state": "none"})


@case("whoever-notices-first-says-so-over-the-standby-path")
def tells_over_standby(lab):
    """The source would take a minute to notice the silence, the destination takes five seconds."""
    move = Move(lab)
    move.source.hmp("migrate_set_parameter heartbeat-timeout 60000")
    move.slow_down()
    move.source.hmp(f"migrate -d {move.uri(link=1)},{move.uri(link=2)}")
    move.wait_midway(fraction=0.8)
    for engine, state in zip(move.engines, ("standby", "standby")):
        wait_for(
            f"link2 stands by at the {engine.name}",
            LONG,
            lambda e=engine, s=state: path_of(e, move.uri(link=2))["state"] == s,
        )
    move.network.black_hole(1)
    wait_for("the source recovers", LONG, lambda: move.source.query()["postroad"]["recoveries"] >= 1)
    reasons = [reason or "" for status, reason in move.source.reasons() if status == "postcopy-paused"]
    told = any("the destination has paused: nothing heard" in reason for reason in reasons)
    expect(told, f"the source paused for these reasons: {reasons}")
    move.full_speed()
    move.wait_completed()
    move.expect_guest_sound()


@case("statistics-stay-right-across-recoveries")
def statistics(lab):
    move = start_and_stop_midway(lab, "ofi")
    move.network.link_down(1)
    move.wait_paused()
    before = move.destination.query()["ram"]
    time_paused = 1.0
    began = time.monotonic()
    wait_for("some time in the pause", LONG, lambda: time.monotonic() - began > time_paused)
    move.finish_over(link=2)
    source, destination = (engine.query() for engine in move.engines)
    for name, info in (("source", source), ("destination", destination)):
        ram = info["ram"]
        pages = ram["normal"] + ram["duplicate"]
        expect(pages * ram["page-size"] == ram["total"], f"{name}: pages don't add up: {ram}")
        expect(ram["transferred"] > before["transferred"], f"{name}: nothing travelled after the recovery")
        expect(info["total-time"] >= time_paused * 1000, f"{name}: total-time {info['total-time']} ms")
        paused = info["postroad"]["time-paused"]
        expect(
            time_paused * 1000 <= paused <= info["total-time"],
            f"{name}: paused {paused} ms of {info['total-time']} ms",
        )
        expect(info["postroad"]["recoveries"] == 1, f"{name}: {info['postroad']['recoveries']} recoveries")
        expect(info["postroad"]["pauses"] == 1, f"{name}: {info['postroad']['pauses']} pauses")
