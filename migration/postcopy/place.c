/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/postcopy/place.h"

#include "migration/memory/uffd.h"

gboolean pr_place(PrRam *ram, int uffd, PrRamBlock *block, uint64_t page, uint64_t n,
		  uint64_t *ret_waiters, GError **error)
{
	pr_ram_received(ram, block, page, n, /* travelled= */ TRUE);
	pr_crash_point(PR_CRASH_DESTINATION_PAGE_RECEIVED);
	gboolean exposed = pr_uffd_continue(uffd, block, page, n, error);
	pr_crash_point(PR_CRASH_DESTINATION_PAGE_EXPOSED);
	*ret_waiters = pr_ram_take_waiting(block, page, n);
	return exposed;
}

uint64_t pr_place_zero(PrRam *ram, PrRamBlock *block, uint64_t page, uint64_t n)
{
	pr_ram_zero(ram, block, page, n);
	pr_crash_point(PR_CRASH_DESTINATION_ZERO_RECEIVED);
	return n > 0 ? pr_ram_take_waiting(block, page, n) : 0;
}
