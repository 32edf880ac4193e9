/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The costs that grow with the guest's size. Each part prints a table, and adds a member to the
 * JSON. */
#pragma once

#include "tests/bench/bench.h"

/* The received bitmap in a recovery of a guest of this size. */
void size_bitmaps(const Bench *bench, uint64_t gib);
/* The source's scan for holes in the switch-over. */
void size_holes(const Bench *bench);
/* Whole migrations of guests up to this size. */
void size_migrations(const Bench *bench, guint max_mib);
