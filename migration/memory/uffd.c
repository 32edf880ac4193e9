/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/memory/uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>

#include "migration/core/types.h"

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

/* Wakes the threads that wait for these pages; each faults again if its page is missing. */
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

/* Maps n pages, which are whole host pages. */
static gboolean continue_whole(int uffd, const PrRamBlock *block, uint64_t page, uint64_t n,
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
			if (!wake(uffd, block, page, block->per_host, error))
				return FALSE;
			done = MIN(n, block->per_host);
		}
		page += done;
		n -= done;
	}
	return TRUE;
}

gboolean pr_uffd_continue(int uffd, const PrRamBlock *block, uint64_t page, uint64_t n,
			  GError **error)
{
	if (block->per_host == 1)
		return continue_whole(uffd, block, page, n, error);
	for (uint64_t at = pr_ram_host_start(block, page); at < page + n; at += block->per_host)
		if (pr_ram_is_whole(block, at) &&
		    !continue_whole(uffd, block, at, block->per_host, error))
			return FALSE;
	return TRUE;
}

/* The kernel has no UFFDIO_ZEROPAGE for huge pages. A page that fallocate() allocates is zero,
 * too. */
static int zero_huge_page(int uffd, const PrRamBlock *block, uint64_t page)
{
	struct uffdio_range range = range_of(block, page, block->per_host);
	int code = 0;

	if (fallocate(block->memfd, 0, (off_t)(block->memfd_offset + page * block->page_size),
		      (off_t)range.len) < 0)
		return errno;
	return continue_some(uffd, block, page, block->per_host, &code) > 0 ? 0 : code;
}

/* Maps a zero page where the memfd has no page. EEXIST: it has one. */
static int zero_page(int uffd, const PrRamBlock *block, uint64_t page)
{
	struct uffdio_zeropage args = {.range = range_of(block, page, 1)};

	if (block->per_host > 1)
		return zero_huge_page(uffd, block, page);
	return ioctl(uffd, UFFDIO_ZEROPAGE, &args) == 0 ? 0 : errno;
}

gboolean pr_uffd_resolve(int uffd, const PrRamBlock *block, uint64_t page, GError **error)
{
	int code = 0;

	if (continue_some(uffd, block, page, block->per_host, &code) > 0)
		return TRUE;
	if (code == EFAULT)
		code = zero_page(uffd, block, page);
	switch (code) {
	case 0:
		return TRUE;
	case EEXIST: /* it is mapped, or the memfd has a page by now: the next fault finds out */
	case EAGAIN:
		return wake(uffd, block, page, block->per_host, error);
	default:
		set_error(error, "resolving a fault", block, page, code);
		return FALSE;
	}
}

gboolean pr_uffd_wake_all(int uffd, const PrRam *ram, GError **error)
{
	for (guint i = 0; i < ram->n_blocks; i++)
		if (!wake(uffd, &ram->blocks[i], 0, ram->blocks[i].n_pages, error))
			return FALSE;
	return TRUE;
}
