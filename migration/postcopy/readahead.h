/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Guesses which pages a guest's thread will touch next, from where it has faulted.
 *
 * For each thread a few streams are followed, because a thread that copies walks in two places. A
 * fault belongs to the stream that it continues, or else to the nearest one. Two equal steps, at
 * most PR_READAHEAD_STRIDE pages either way, make a stream regular: sequential, up or down, or
 * strided. Then pages ahead of it are suggested, each once. The window doubles with each fault that
 * goes on where it was expected, also among the pages suggested already (they may be on their way
 * still), up to the caller's limit; a fault that strays ends it. Random faults suggest nothing.
 *
 * A fault whose thread says nothing about who it is for (PR_READAHEAD_NO_THREAD) is followed by its
 * address alone: all such faults share PR_READAHEAD_SHARED streams. KVM's asynchronous faults are
 * of that kind: an arbitrary kworker waits in the place of a vCPU.
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
#define PR_READAHEAD_SHARED    32   /* of all faults that are nobody's */
#define PR_READAHEAD_THREADS   64   /* a thread more takes the place of another */

#define PR_READAHEAD_NO_THREAD 0 /* in the place of a thread's id */

typedef struct PrReadaheadStream {
	guint block;
	guint window;	/* pages; 0: not regular */
	int64_t last;	/* page of its last fault */
	int64_t stride; /* pages; 0: one fault only */
	int64_t front;	/* last page suggested; `last` if none is */
	uint64_t used;	/* when, in faults; 0: free */
} PrReadaheadStream;

typedef struct PrReadahead {
	struct {
		uint32_t tid;
		PrReadaheadStream streams[PR_READAHEAD_STREAMS];
	} threads[PR_READAHEAD_THREADS];
	PrReadaheadStream shared[PR_READAHEAD_SHARED];
	uint64_t faults;
} PrReadahead;

/* Pages of one block: page, page + stride, …: n of them. */
typedef struct PrReadaheadRun {
	guint block;
	guint n;
	uint64_t page;
	int64_t stride;
} PrReadaheadRun;

/* A thread has faulted on a page of a block of n_pages. Suggests what to read as well, within the
 * block; never more than `limit` pages ahead of the fault. Often nothing: n is 0. */
void pr_readahead_fault(PrReadahead *self, uint32_t tid, guint block, uint64_t page,
			uint64_t n_pages, guint limit, PrReadaheadRun *ret);

/* Claims the next pages of a plan that one READ can cover. Returns how many (0: none is left), the
 * first in *ret_page. */
uint64_t pr_readahead_claim(PrReadaheadRun *plan, PrRamBlock *block, uint64_t max,
			    uint64_t *ret_page);
