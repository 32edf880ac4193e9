# SPDX-License-Identifier: GPL-2.0-or-later
"""An engine dies at each crash point (migration/core/crash-point.h), and the next one continues.
The guest verifies its pages all the time. In the end it runs on one side, with no page wrong."""

import os
import subprocess

from harness.case import case
from harness.process import LONG, Failure, expect, wait_for
from harness.twins import OVER, Twins

STAYS, GOES, EITHER = "stays at the source", "goes to the destination", "either"

# The crash point, with the number of the pass unless it is the first; the plan that leads there;
# and where the guest belongs when the engine has died there.
POINTS = (
    ("source-stopping-noted", "move", STAYS),
    ("source-stopped", "move", STAYS),
    ("source-ram-told", "move", STAYS),
    ("source-state-sent", "move", STAYS),
    ("source-loaded", "move", STAYS),
    ("record-written", "move", STAYS),
    ("record-renamed", "move", STAYS),
    ("record-written:2", "move", STAYS),
    ("record-renamed:2", "move", GOES),
    ("source-handed-over-noted", "move", GOES),
    ("source-active", "move", GOES),
    ("source-run-sent", "move", GOES),
    ("source-fenced", "move", GOES),
    ("source-resumed-guest", "undo", STAYS),
    ("source-reconnected", "recover", GOES),
    ("source-bitmaps-taken", "recover", GOES),
    ("source-resume-sent", "recover", GOES),
    ("source-recovered", "recover", GOES),
    ("source-incarnation-noted", "resume", GOES),
    ("source-completed", "move", GOES),
    ("record-written:3", "move", GOES),
    ("source-completed-noted", "move", GOES),
    ("source-unfenced", "move", GOES),
    ("destination-state-kept", "move", STAYS),
    ("destination-faults-on", "move", STAYS),
    ("destination-listening", "move", STAYS),
    ("destination-page-landed", "move", STAYS),
    ("destination-page-received", "move", STAYS),
    ("destination-loaded", "move", STAYS),
    ("destination-loaded-noted", "move", STAYS),
    ("destination-zero-received", "move", EITHER),
    ("destination-run-noted", "move", GOES),
    ("destination-running", "move", GOES),
    ("destination-started-noted", "move", GOES),
    ("destination-page-landed:30", "move", GOES),
    ("destination-page-received:30", "move", GOES),
    ("destination-page-exposed:10", "move", GOES),
    ("destination-readmitted", "recover", GOES),
    ("destination-bitmap-sent", "recover", GOES),
    ("destination-bitmap-sent:2", "recover", GOES),
    ("destination-resume-acked", "recover", GOES),
    ("destination-adopted", "resume", GOES),
    ("destination-woken", "resume", GOES),
    ("destination-completed-noted", "move", GOES),
    ("destination-shut-sent", "move", GOES),
    ("destination-released", "move", GOES),
    ("destination-ended-noted", "undo", STAYS),
)
# Tested in one process instead (tests/integration/test-resume.c): here only luck leads there.
ELSEWHERE = ("source-taken-back-noted",)

# The crash points of the other engine, for those that an engine reaches only as it undoes a
# migration.
OTHER_DIES_AT = {"source-resumed-guest": "destination-loaded", "destination-ended-noted": "source-ram-told"}


def side_of(point):
    return "destination" if point.startswith("destination-") else "source"


def start_to_be_killed(twins, side, point):
    engine = getattr(twins, side)
    engine.restart_to_be_killed(point)
    return engine


def lead_there(twins, point, plan):
    """Starts what leads to the crash point. Returns the engines that die."""
    side = side_of(point)
    if plan == "resume":
        twins.start_midway()
        engine = getattr(twins, side)
        engine.kill()
        engine.restart("--resume", kill_at=point)
        return [engine]
    engine = start_to_be_killed(twins, side, point)
    if plan == "recover":
        twins.start_midway()
        twins.source.hmp("migrate_pause")
        for other in twins.engines:
            other.wait_status("postcopy-paused")
        twins.migrate(resume=True)
        return [engine]
    if plan == "undo":
        other = "source" if side == "destination" else "destination"
        engines = [engine, start_to_be_killed(twins, other, OTHER_DIES_AT[point])]
        twins.migrate()
        return engines
    twins.full_speed()
    twins.migrate()
    return [engine]


def expect_whose(twins, whose):
    """Checks on which side the guest is, when both engines run again and the source knows it."""
    wait_for(
        "the source knows where the guest belongs",
        LONG,
        lambda: twins.source.status() in (*OVER, "postcopy-paused", "completed"),
    )
    if whose == STAYS:
        expect(twins.source.status() in OVER, f"the source is {twins.source.status()}")
        twins.source_guest.wait_running()
        expect(not twins.destination_guest.running(), "the guest was not handed over, and runs at the destination")
    elif whose == GOES:
        expect(twins.source.status() not in OVER, f"the source is {twins.source.status()}")
        expect(not twins.source_guest.running(), "the guest was handed over, and runs at the source")


def die_and_go_on(lab, scheme, point, plan, whose):
    twins = Twins(lab, scheme=scheme)
    dead = lead_there(twins, point, plan)
    for engine in dead:
        engine.note_killed()
        said = engine.process.output()
        expect("killed at its crash point" in said, f"{engine.name} was not killed at its crash point")
    for engine in dead:
        engine.resume()
    expect_whose(twins, whose)
    twins.finish()


def add_case(scheme, point, plan, whose):
    name = point.replace(":", "-time-")
    register = case(f"killed-at-{name}-over-{scheme}", light=True)
    register(lambda lab: die_and_go_on(lab, scheme, point, plan, whose))


for _row in POINTS:
    add_case("tcp", *_row)
for _row in POINTS:
    if _row[0] in ("destination-page-landed:30", "destination-page-received:30", "source-run-sent"):
        add_case("ofi", *_row)


@case("killed-at-every-point-there-is", light=True)
def complete(lab):
    """The lists above name all of them."""
    listed = subprocess.run(
        [lab.engine_file("killable-postroad")],
        env={**os.environ, "POSTROAD_KILL": "list"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    tested = {point.split(":")[0] for point, _, _ in POINTS} | set(ELSEWHERE)
    if set(listed) != tested:
        raise Failure(f"no test for {sorted(set(listed) - tested)}; no such points: {sorted(tested - set(listed))}")
