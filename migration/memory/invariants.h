/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Invariants, checked where they would be broken. With the build option `invariants` (on by default
 * in builds for debugging or with a sanitizer) an engine that breaks one aborts at once, and names
 * block and page. Nothing safe can be done after that, with the guest's memory in two places. In
 * other builds the checks cost nothing.
 *
 *  - A page is placed at most once.
 *  - Nothing is written to a page that is received, or that nobody has claimed. This is checked
 *    before each READ is posted and when it has landed. The data path, which knows no pages, writes
 *    between these two.
 *  - A destination's memory is emptied only while no page is received.
 *  - The source's guest does not run once RUN may have been seen.
 */
#pragma once

#include "migration/memory/ram.h"

#ifndef PR_INVARIANTS
#define PR_INVARIANTS 0
#endif

void pr_invariant_broken(const char *format, ...) G_GNUC_PRINTF(1, 2) G_GNUC_NORETURN;

/* For a READ of n pages that is about to be posted, or has landed. */
void pr_invariant_check_claimed(const PrRamBlock *block, uint64_t page, uint64_t n,
				const char *what);
/* The whole block is about to be emptied. */
void pr_invariant_check_emptied(const PrRamBlock *block);
/* n pages are about to be marked received: none of them may be received. */
void pr_invariant_check_new(const PrRamBlock *block, uint64_t page, uint64_t n);
/* The source's guest is about to run here (again). */
void pr_invariant_check_may_run(gboolean run_may_be_seen);

static inline void pr_invariant_claimed(const PrRamBlock *block, uint64_t page, uint64_t n,
					const char *what)
{
	if (PR_INVARIANTS)
		pr_invariant_check_claimed(block, page, n, what);
}

static inline void pr_invariant_new(const PrRamBlock *block, uint64_t page, uint64_t n)
{
	if (PR_INVARIANTS)
		pr_invariant_check_new(block, page, n);
}

static inline void pr_invariant_emptied(const PrRamBlock *block)
{
	if (PR_INVARIANTS)
		pr_invariant_check_emptied(block);
}

static inline void pr_invariant_may_run(gboolean run_may_be_seen)
{
	if (PR_INVARIANTS)
		pr_invariant_check_may_run(run_may_be_seen);
}
