/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What grows with the guest's size. Each part prints a table, and adds a member to the JSON. */
#pragma once

#include "tests/bench/bench.h"

/* The received bitmap in a recovery, of a guest of that size. */
void size_bitmaps(const Bench *bench, uint64_t gib);
/* The switch-over's look for holes. */
void size_holes(const Bench *bench);
/* Whole migrations, up to a guest of that size. */
void size_migrations(const Bench *bench, guint max_mib);
