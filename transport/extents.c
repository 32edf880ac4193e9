/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Theory of operation
 *
 * tmpfs tells by SEEK_DATA. hugetlbfs does not: to it all is data, and reading a hole through a mapping allocates a huge page.
 * There a mapping of our own is registered with a userfaultfd that answers a missing page with an error
 * (UFFD_FEATURE_SIGBUS): MADV_POPULATE_READ then maps a page that is there, and fails where there is none.
 */
#include "transport/extents.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 /* Linux 5.14 */
#endif
#define BLOCK_BYTES 512 /* of st_blocks */

/* A part of a hugetlbfs file, mapped to be looked at. */
typedef struct Look {
	uint8_t *map;
	uint64_t start, bytes, page; /* start: in the file */
	int uffd;
} Look;

static void look_clear(Look *look)
{
	if (look->map)
		munmap(look->map, look->bytes);
	if (look->uffd >= 0)
		close(look->uffd);
}
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(Look, look_clear)

static gboolean watch(Look *look)
{
	struct uffdio_api api = {.api = UFFD_API,
				 .features = UFFD_FEATURE_SIGBUS | UFFD_FEATURE_MISSING_HUGETLBFS};
	struct uffdio_register range = {.range = {(uintptr_t)look->map, look->bytes},
					.mode = UFFDIO_REGISTER_MODE_MISSING};

	look->uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
	return look->uffd >= 0 && ioctl(look->uffd, UFFDIO_API, &api) == 0 &&
	       ioctl(look->uffd, UFFDIO_REGISTER, &range) == 0;
}

/* Of what is in the file from start to end. FALSE: it can't be looked at. */
static gboolean look_begin(Look *look, int fd, uint64_t start, uint64_t end, uint64_t page)
{
	void *map;

	look->page = page;
	look->start = start - start % page;
	look->bytes = (end - look->start + page - 1) / page * page;
	map = mmap(NULL, look->bytes, PROT_READ, MAP_SHARED | MAP_NORESERVE, fd,
		   (off_t)look->start);
	if (map == MAP_FAILED)
		return FALSE;
	look->map = map;
	return watch(look);
}

static gboolean is_allocated(const Look *look, uint64_t offset)
{
	int code;

	do
		code = madvise(look->map + offset, look->page, MADV_POPULATE_READ) == 0 ? 0 : errno;
	while (code == EINTR);
	return code != EFAULT;
}

/* The first page at or after `offset` that is allocated, or is not; the end if there is none. */
static uint64_t find(const Look *look, uint64_t offset, gboolean allocated)
{
	while (offset < look->bytes && is_allocated(look, offset) != allocated)
		offset += look->page;
	return offset;
}

/* *ret: where to look. */
static gboolean next_huge(int fd, uint64_t base, uint64_t page, PrExtent *ret)
{
	g_auto(Look) look = {.uffd = -1};
	uint64_t from = base + ret->start, end = base + ret->end;

	if (!look_begin(&look, fd, from, end, page))
		return TRUE;
	uint64_t start = find(&look, 0, /* allocated= */ TRUE);
	uint64_t stop = find(&look, start, /* allocated= */ FALSE);
	ret->start = MAX(from, look.start + start) - base;
	ret->end = MIN(end, look.start + stop) - base;
	return start < look.bytes;
}

static gboolean next_small(int fd, uint64_t base, PrExtent *ret)
{
	uint64_t mask = (uint64_t)sysconf(_SC_PAGESIZE) - 1, end = ret->end;
	off_t data = lseek(fd, (off_t)(base + ret->start), SEEK_DATA);

	/* ENXIO: nothing but hole to the end. */
	if (data < 0)
		return errno != ENXIO;
	ret->start = ((uint64_t)data - base) & ~mask;
	if (ret->start >= end)
		return FALSE;
	off_t hole = lseek(fd, data, SEEK_HOLE);
	if (hole >= 0)
		ret->end = MIN(end, ((uint64_t)hole - base + mask) & ~mask);
	return TRUE;
}

static gboolean is_huge(int fd, uint64_t *ret_page)
{
	struct statfs fs;

	if (fstatfs(fd, &fs) < 0 || fs.f_type != HUGETLBFS_MAGIC)
		return FALSE;
	*ret_page = (uint64_t)fs.f_bsize;
	return TRUE;
}

static gboolean is_all_allocated(const struct stat *st)
{
	return (uint64_t)st->st_blocks * BLOCK_BYTES >= (uint64_t)st->st_size;
}

gboolean pr_extent_next(int fd, uint64_t base, uint64_t from, uint64_t end, PrExtent *ret)
{
	struct stat st;
	uint64_t page;

	*ret = (PrExtent){from, end};
	if (from >= end || !next_small(fd, base, ret))
		return FALSE;
	/* What hugetlbfs always says. */
	if (ret->start > from || ret->end < end || !is_huge(fd, &page))
		return TRUE;
	if (fstat(fd, &st) == 0 && (st.st_blocks == 0 || is_all_allocated(&st)))
		return st.st_blocks > 0;
	return next_huge(fd, base, page, ret);
}

gboolean pr_extent_is_kept(int fd)
{
	struct stat st;
	uint64_t page;

	return is_huge(fd, &page) || (fstat(fd, &st) == 0 && is_all_allocated(&st));
}
