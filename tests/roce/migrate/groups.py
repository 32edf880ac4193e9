# SPDX-License-Identifier: GPL-2.0-or-later
"""The migrations as groups of tests."""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]

import runner  # noqa: E402
import cases  # noqa: E402
import kvm  # noqa: E402
from move import Failure, LabError  # noqa: E402


def perform(subject, function, notes):
    test = cases.Test(*subject, notes)
    try:
        function(test)
    except (Failure, LabError, runner.OutOfTime) as error:
        raise Failure(f"{error}\n{test.logs()}") from error
    finally:
        test.close()


def subject(lab, build):
    return lab, build


# One CPU: Linux patches its own code when a guest under KVM starts or ends. This can crash an
# emulated host with two CPUs.
NEWER = {"kernel": "6.12", "cpus": 1}
GROUPS = [
    runner.Group("rdma", cases.CASES, perform, subject),
    runner.Group("kvm", kvm.CASES, perform, subject, kvm.SECONDS),
    runner.Group("kvm-6.12", kvm.NEWER_CASES, perform, subject, kvm.LINUX_SECONDS, NEWER),
]
