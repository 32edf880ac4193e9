/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * How a page that was read comes into the guest. There is this one way for all READs: those of the
 * fault threads, those of the pull threads, and those whose pages the verify thread compares first.
 * The steps, and the crash point (core/crash-point.h) behind each:
 *
 *  1. The data lands in the memfd, while the claim keeps everybody else from the page.
 *     [page-landed]
 *  2. The received bit is set, then the claim ends (ram.h). [page-received]
 *  3. UFFDIO_CONTINUE maps the page and wakes the vCPUs that wait for it. [page-exposed]
 *  4. The waiting bits are cleared. Where one was set, the caller notifies the fault threads, which
 *     then count how long their vCPUs have waited.
 *
 * Invariants:
 *  - A page that the guest can see has its received bit set, and its data in the memfd is final.
 *  - The engine may die between any two steps. Without the received bit the next engine reads the
 *    page again, and nobody has seen it. With the bit, but before step 3, the page costs one more
 *    fault, which is resolved at once.
 *  - Nobody waits forever. A fault thread sets the waiting bit, then looks at the received bit;
 *    this side sets the received bit, then looks at the waiting bit. Both use sequentially
 *    consistent operations, so at least one of them sees the other.
 *
 * Zero pages and holes carry no data. They become received without steps 1 and 3: whoever waits for
 * one is resolved by its fault thread, since a call to the kernel for each range would cost more
 * than the pages.
 *
 * No allocation, no lock; any number of threads, for different pages.
 */
#pragma once

#include "migration/core/crash-point.h"
#include "migration/memory/invariants.h"
#include "migration/memory/ram.h"

/* Step 1 for n claimed pages. what: names the READ if an invariant is broken. */
static inline void pr_place_landed(const PrRamBlock *block, uint64_t page, uint64_t n,
				   const char *what)
{
	pr_invariant_claimed(block, page, n, what);
	pr_crash_point(PR_CRASH_DESTINATION_PAGE_LANDED);
}

/* Steps 2 to 4 for n pages that have landed. *ret_waiters: how many waiting bits were set, also on
 * failure. FALSE: the guest's process or the kernel failed; the pages are received, but not all of
 * them are mapped. */
gboolean pr_place(PrRam *ram, int uffd, PrRamBlock *block, uint64_t page, uint64_t n,
		  uint64_t *ret_waiters, GError **error);

/* The source says that these n pages are zero: marks those received that nobody has received or
 * claimed. Returns how many waiting bits were set. */
uint64_t pr_place_zero(PrRam *ram, PrRamBlock *block, uint64_t page, uint64_t n);
