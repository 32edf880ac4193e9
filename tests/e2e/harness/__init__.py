# SPDX-License-Identifier: GPL-2.0-or-later
"""Two hosts on one machine, each with a QEMU and an engine: what the end-to-end tests and the demo
are made of. Python's standard library only."""
