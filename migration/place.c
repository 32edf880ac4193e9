/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/place.h"

#include <errno.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>

#include "migration/migration.h"

static struct uffdio_range range_of(const PrRamBlock *block, uint64_t page, uint64_t n)
{
	return (struct uffdio_range){
		.start = block->base + page * block->page_size,
		.len = n * block->page_size,
	};
}

static void set_error(GError **error, const char *call, const PrRamBlock *block, uint64_t page,
		      int code)
{
	g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_SYSTEM,
		    "%s for page %" G_GUINT64_FORMAT " of RAM block %s: %s%s", call, page,
		    block->idstr, g_strerror(code),
		    code == ESRCH || code == ENOENT
			    ? "; the guest's process has gone or unmapped it"
			    : "");
}

/* Lets whoever waits in these pages fault again. */
static gboolean wake(int uffd, const PrRamBlock *block, uint64_t page, uint64_t n, GError **error)
{
	struct uffdio_range range = range_of(block, page, n);

	if (ioctl(uffd, UFFDIO_WAKE, &range) < 0) {
		set_error(error, "UFFDIO_WAKE", block, page, errno);
		return FALSE;
	}
	return TRUE;
}

/* One UFFDIO_CONTINUE. Returns how many pages it mapped; with 0, *ret_errno says why. */
static uint64_t continue_some(int uffd, const PrRamBlock *block, uint64_t page, uint64_t n,
			      int *ret_errno)
{
	struct uffdio_continue args = {.range = range_of(block, page, n)};

	if (ioctl(uffd, UFFDIO_CONTINUE, &args) == 0)
		return n;
	*ret_errno = errno;
	return args.mapped > 0 ? (uint64_t)args.mapped / block->page_size : 0;
}

gboolean pr_place_expose(int uffd, const PrRamBlock *block, uint64_t page, uint64_t n,
			 GError **error)
{
	while (n > 0) {
		int code = 0;
		uint64_t done = continue_some(uffd, block, page, n, &code);
		if (done == 0 && code == EAGAIN)
			continue;
		if (done == 0 && code != EEXIST && code != EFAULT) {
			set_error(error, "UFFDIO_CONTINUE", block, page, code);
			return FALSE;
		}
		if (done == 0) {
			if (!wake(uffd, block, page, 1, error))
				return FALSE;
			done = 1;
		}
		page += done;
		n -= done;
	}
	return TRUE;
}

/* Maps a zero page where the memfd has none. EEXIST: it has one. */
static int zero_page(int uffd, const PrRamBlock *block, uint64_t page)
{
	struct uffdio_zeropage args = {.range = range_of(block, page, 1)};

	return ioctl(uffd, UFFDIO_ZEROPAGE, &args) == 0 ? 0 : errno;
}

gboolean pr_place_resolve(int uffd, const PrRamBlock *block, uint64_t page, GError **error)
{
	int code = 0;

	if (continue_some(uffd, block, page, 1, &code) == 1)
		return TRUE;
	if (code == EFAULT)
		code = zero_page(uffd, block, page);
	switch (code) {
	case 0:
		return TRUE;
	case EEXIST: /* mapped, or there is a page now after all: the next fault finds out */
	case EAGAIN:
		return wake(uffd, block, page, 1, error);
	default:
		set_error(error, "resolving a fault", block, page, code);
		return FALSE;
	}
}

gboolean pr_place_wake_all(int uffd, const PrRamBlock *block, GError **error)
{
	return wake(uffd, block, 0, block->n_pages, error);
}
