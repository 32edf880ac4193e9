# SPDX-License-Identifier: GPL-2.0-or-later
"""Compares Postroad with QEMU's own postcopy: the same guest, hosts and link, and figures from
inside the guest. It needs only Python's standard library and the end-to-end tests' harness; the
plots need gnuplot."""
