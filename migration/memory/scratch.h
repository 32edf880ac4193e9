/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Memory that grows with the guest and ends with the engine: the bitmaps beside the received
 * bitmap. It is a memfd, so that it can be charged to the guest, as the received bitmap is, before
 * it is touched (allocate.h).
 */
#pragma once

#include <glib.h>

typedef struct PrScratch PrScratch;

/* NULL: see errno. */
PrScratch *pr_scratch_new(gsize bytes);
void pr_scratch_free(PrScratch *self);
/* Bytes that pr_scratch_take() takes for so many. */
gsize pr_scratch_need(gsize bytes);
/* The next piece, of zeros. There has to be room. */
void *pr_scratch_take(PrScratch *self, gsize bytes);
int pr_scratch_fd(const PrScratch *self);
gsize pr_scratch_bytes(const PrScratch *self);
