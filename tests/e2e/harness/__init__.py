# SPDX-License-Identifier: GPL-2.0-or-later
"""Two hosts on one machine, each with a QEMU and an engine. The end-to-end tests, the chaos tests,
the benchmarks and the demo are made of this. It needs nothing but Python's standard library."""
