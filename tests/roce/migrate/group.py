# SPDX-License-Identifier: GPL-2.0-or-later
"""The migrations as a group of tests."""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]

import runner  # noqa: E402
import cases  # noqa: E402
from cast import Failure, LabError  # noqa: E402


def perform(lab, build, function, notes):
    stage = cases.Stage(lab, build, notes)
    try:
        function(stage)
    except (Failure, LabError, runner.OutOfTime) as error:
        raise Failure(f"{error}\n{stage.logs()}") from error
    finally:
        stage.close()


GROUP = runner.Group("rdma", cases.CASES, perform)
