/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Memory for the bitmaps other than the received bitmap: it grows with the guest and ends with the
 * engine. It is a memfd, so that the guest's cgroup can be charged for it before it is touched, as
 * for the received bitmap (allocate.h).
 */
#pragma once

#include <glib.h>

typedef struct PrScratch PrScratch;

/* NULL: errno says why. */
PrScratch *pr_scratch_new(gsize bytes);
void pr_scratch_free(PrScratch *self);
/* How many bytes pr_scratch_take() uses up for so many. */
gsize pr_scratch_need(gsize bytes);
/* The next piece, filled with zeros. There must be room for it. */
void *pr_scratch_take(PrScratch *self, gsize bytes);
int pr_scratch_fd(const PrScratch *self);
gsize pr_scratch_bytes(const PrScratch *self);
