# SPDX-License-Identifier: GPL-2.0-or-later
"""Postroad beside QEMU's own postcopy: the same guest, the same hosts, the same link, figures from
inside the guest. Python's standard library and the end-to-end tests' harness; gnuplot for the plots."""
