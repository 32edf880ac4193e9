# SPDX-License-Identifier: GPL-2.0-or-later
"""Both links are rails: the standby path pulls as well, and may be lost at any time."""

from harness.case import case
from harness.lab import Move
from harness.process import LONG, expect, wait_for
from harness.vm import GuestSpec

RATE_MBIT = 50
# The pull takes many seconds at this rate. The guest's own faults bring in at most 1000 pages a
# second. In the end it takes 16 s to verify its pages.
SPEC = GuestSpec(ram_mb=256, work_mb=64, work_rate=1000)


def start_over_both(lab, scheme, spec=SPEC):
    """Starts a migration, and waits until both links pull, slowly."""
    move = Move(lab, scheme=scheme, spec=spec)
    move.slow_down("1M")
    move.source.hmp(f"migrate -d {move.uri(link=1)},{move.uri(link=2)}")
    wait_for("two rails pull", LONG, lambda: rails(move) == 2)
    move.expect_midway()
    return move


def rails(move):
    return move.destination.query().get("postroad", {}).get("rails")


def carried(move):
    """Returns how many bytes each path has carried, as the destination's engine says."""
    paths = [path for path in move.destination.paths() if path["bytes"]]
    return {path["uri"]: path["bytes"] for path in paths}


def expect_never_paused(move):
    for engine in move.engines:
        info = engine.query()["postroad"]
        expect(info["pauses"] == 0, f"{engine.name} has paused {info['pauses']} times")


def both_links_carry(lab, scheme):
    """Both links are limited to the same rate. So equal shares mean that both were full all the
    time, and that the pull took half as long as over one link."""
    move = start_over_both(lab, scheme)
    for link in (1, 2):
        move.network.limit_rate(link, RATE_MBIT)
    before = [move.network.received(link) for link in (1, 2)]
    left = move.expect_midway()
    expect(left > RATE_MBIT * 125000, f"{left} bytes are too few to tell two links from one")
    move.full_speed()
    move.wait_completed()
    links = [move.network.received(link) - old for link, old in zip((1, 2), before)]
    for link, share in zip((1, 2), links):
        expect(share * 4 >= sum(links), f"link{link} carried {share} of {sum(links)} bytes")
    said = carried(move)
    expect(len(said) == 2, f"the engine says that these paths have carried something: {said}")
    expect_never_paused(move)
    move.expect_guest_sound()


@case("both-links-carry-the-bulk-over-tcp")
def both_tcp(lab):
    both_links_carry(lab, "tcp")


@case("both-links-carry-the-bulk-over-ofi")
def both_ofi(lab):
    both_links_carry(lab, "ofi")


def lose_a_rail(lab, scheme, lose):
    move = start_over_both(lab, scheme)
    move.slow_down("2M")
    uri = move.uri(link=2)
    before = carried(move).get(uri, 0)
    wait_for("link2 carries bulk", LONG, lambda: carried(move).get(uri, 0) > before + (1 << 20))
    getattr(move.network, lose)(2)
    wait_for("link2 is given up", LONG, lambda: rails(move) == 1)
    move.expect_midway()
    move.full_speed()
    move.wait_completed()
    expect_never_paused(move)
    move.expect_guest_sound()


@case("a-rail-that-goes-down-is-not-missed")
def rail_down(lab):
    lose_a_rail(lab, "ofi", "link_down")


@case("a-rail-that-goes-silent-is-not-missed")
def rail_silent(lab):
    lose_a_rail(lab, "tcp", "black_hole")


@case("the-path-in-use-is-lost-while-both-links-pull")
def path_in_use_lost(lab):
    move = start_over_both(lab, "ofi")
    move.slow_down("2M")
    move.network.black_hole(1)
    wait_for("the source recovers", LONG, lambda: move.source.query()["postroad"]["recoveries"] >= 1)
    move.expect_midway()
    move.full_speed()
    move.wait_completed()
    move.expect_guest_sound()
