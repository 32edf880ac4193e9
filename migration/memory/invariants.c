/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/memory/invariants.h"

#include <stdio.h>
#include <stdlib.h>

#include "migration/memory/bitmap.h"

void pr_invariant_broken(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	fputs("postroad: broken invariant: ", stderr);
	vfprintf(stderr, format, args);
	fputs("\n", stderr);
	va_end(args);
	abort();
}

void pr_invariant_check_claimed(const PrRamBlock *block, uint64_t page, uint64_t n,
				const char *what)
{
	for (uint64_t i = page; i < page + n; i++) {
		/* In this order, because the placing ends the claim last. */
		gboolean claimed = pr_bitmap_test(block->inflight, i);

		if (pr_bitmap_test(block->received, i))
			pr_invariant_broken("RAM block %s, page %" G_GUINT64_FORMAT
					    ": %s, but the page is received already",
					    block->idstr, i, what);
		if (!claimed)
			pr_invariant_broken("RAM block %s, page %" G_GUINT64_FORMAT
					    ": %s, but nobody has claimed the page",
					    block->idstr, i, what);
	}
}

void pr_invariant_check_new(const PrRamBlock *block, uint64_t page, uint64_t n)
{
	for (uint64_t i = page; i < page + n; i++)
		if (pr_bitmap_test(block->received, i))
			pr_invariant_broken("RAM block %s, page %" G_GUINT64_FORMAT
					    ": placed twice",
					    block->idstr, i);
}

void pr_invariant_check_emptied(const PrRamBlock *block)
{
	uint64_t page = pr_bitmap_next_set(block->received, block->n_pages, 0);

	if (page < block->n_pages)
		pr_invariant_broken("RAM block %s, page %" G_GUINT64_FORMAT
				    ": the memory is emptied, and the page is received",
				    block->idstr, page);
}

void pr_invariant_check_may_run(gboolean run_may_be_seen)
{
	if (run_may_be_seen)
		pr_invariant_broken(
			"the source is about to run its guest, and the destination may have, too");
}
