/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Guesses which pages a guest thread will touch next, from the pages that it has faulted on.
 *
 * For each thread a few streams are followed, because a thread that copies walks in two places. A
 * fault belongs to the stream that it continues, or else to the nearest one. Two equal steps, at
 * most PR_READAHEAD_STRIDE pages either way, make a stream regular: sequential, up or down, or
 * strided. Then pages ahead of the stream are suggested, each once. The window doubles with each
 * fault at an expected page. Pages that were suggested and are still in flight are expected, too.
 * The window grows up to the caller's limit; a fault elsewhere ends the regularity. Random faults
 * suggest nothing.
 *
 * Some faults do not say which guest thread waits (PR_READAHEAD_NO_THREAD). They are followed by
 * address alone, and share PR_READAHEAD_SHARED streams. KVM's asynchronous faults are of that kind:
 * an arbitrary kworker waits in a vCPU's place.
 *
 * No I/O, no allocation, fixed size; all zeros is a valid beginning. Not for several threads at
 * once.
 */
#pragma once

#include <glib.h>
#include <stdint.h>

#include "migration/core/params.h"
#include "migration/memory/ram.h"

#define PR_READAHEAD_START     2    /* pages: the first window */
#define PR_READAHEAD_STRIDE    1024 /* pages */
#define PR_READAHEAD_STREAMS   4    /* of each thread */
#define PR_READAHEAD_SHARED    32   /* of all faults without a thread */
#define PR_READAHEAD_THREADS   64   /* one more takes the place of another */

#define PR_READAHEAD_NO_THREAD 0 /* instead of a thread id */

typedef struct PrReadaheadStream {
	guint block;
	guint window;	/* pages; 0: not regular */
	int64_t last;	/* page of its last fault */
	int64_t stride; /* pages; 0: the stream has one fault */
	int64_t front;	/* last page suggested; `last` if there is none */
	uint64_t used;	/* number of the fault that used it last; 0: free */
} PrReadaheadStream;

typedef struct PrReadahead {
	struct {
		uint32_t tid;
		PrReadaheadStream streams[PR_READAHEAD_STREAMS];
	} threads[PR_READAHEAD_THREADS];
	PrReadaheadStream shared[PR_READAHEAD_SHARED];
	uint64_t faults;
} PrReadahead;

/* n pages of one block: page, page + stride, … */
typedef struct PrReadaheadRun {
	guint block;
	guint n;
	uint64_t page;
	int64_t stride;
} PrReadaheadRun;

/* A thread has faulted on a page of a block with n_pages pages. Suggests further pages of the
 * block, at most `limit` pages ahead of the fault. ret->n is 0 where nothing is suggested, which is
 * often. */
void pr_readahead_fault(PrReadahead *self, uint32_t tid, guint block, uint64_t page,
			uint64_t n_pages, guint limit, PrReadaheadRun *ret);

/* Claims the next pages of a run that one READ can cover. Returns how many, the first of them in
 * *ret_page. 0: the run is at its end. */
uint64_t pr_readahead_claim(PrReadaheadRun *plan, PrRamBlock *block, uint64_t max,
			    uint64_t *ret_page);
