/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Theory of operation
 *
 * On tmpfs, lseek(2) with SEEK_DATA finds data. hugetlbfs reports all of a file as data, and
 * reading a hole through a mapping allocates a huge page. So for hugetlbfs a range is mapped here
 * and registered with a userfaultfd that answers a missing page with an error
 * (UFFD_FEATURE_SIGBUS). Then MADV_POPULATE_READ maps a page that is allocated and fails for one
 * that is not.
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
#define BLOCK_BYTES 512 /* the unit of st_blocks */

/* A part of a hugetlbfs file, mapped for probing its pages. */
typedef struct HugeProbe {
	uint8_t *map;
	uint64_t start, bytes, page; /* start: offset in the file; page: bytes of a huge page */
	int uffd;
} HugeProbe;

static void probe_clear(HugeProbe *probe)
{
	if (probe->map)
		munmap(probe->map, probe->bytes);
	if (probe->uffd >= 0)
		close(probe->uffd);
}
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(HugeProbe, probe_clear)

static gboolean register_missing(HugeProbe *probe)
{
	struct uffdio_api api = {.api = UFFD_API,
				 .features = UFFD_FEATURE_SIGBUS | UFFD_FEATURE_MISSING_HUGETLBFS};
	struct uffdio_register range = {.range = {(uintptr_t)probe->map, probe->bytes},
					.mode = UFFDIO_REGISTER_MODE_MISSING};

	probe->uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
	return probe->uffd >= 0 && ioctl(probe->uffd, UFFDIO_API, &api) == 0 &&
	       ioctl(probe->uffd, UFFDIO_REGISTER, &range) == 0;
}

/* Maps [start, end) of the file. FALSE: the pages cannot be probed. */
static gboolean probe_open(HugeProbe *probe, int fd, uint64_t start, uint64_t end, uint64_t page)
{
	void *map;

	probe->page = page;
	probe->start = start - start % page;
	probe->bytes = (end - probe->start + page - 1) / page * page;
	map = mmap(NULL, probe->bytes, PROT_READ, MAP_SHARED | MAP_NORESERVE, fd,
		   (off_t)probe->start);
	if (map == MAP_FAILED)
		return FALSE;
	probe->map = map;
	return register_missing(probe);
}

static gboolean is_allocated(const HugeProbe *probe, uint64_t offset)
{
	int code;

	do
		code = madvise(probe->map + offset, probe->page, MADV_POPULATE_READ) == 0 ? 0
											  : errno;
	while (code == EINTR);
	return code != EFAULT;
}

/* The first page at or after `offset` whose state is `allocated`; the end if there is none. */
static uint64_t find(const HugeProbe *probe, uint64_t offset, gboolean allocated)
{
	while (offset < probe->bytes && is_allocated(probe, offset) != allocated)
		offset += probe->page;
	return offset;
}

/* *ret has the range to search. */
static gboolean next_huge(int fd, uint64_t base, uint64_t page, PrExtent *ret)
{
	g_auto(HugeProbe) probe = {.uffd = -1};
	uint64_t from = base + ret->start, end = base + ret->end;

	if (!probe_open(&probe, fd, from, end, page))
		return TRUE;
	uint64_t start = find(&probe, 0, /* allocated= */ TRUE);
	uint64_t stop = find(&probe, start, /* allocated= */ FALSE);
	ret->start = MAX(from, probe.start + start) - base;
	ret->end = MIN(end, probe.start + stop) - base;
	return start < probe.bytes;
}

static gboolean next_small(int fd, uint64_t base, PrExtent *ret)
{
	uint64_t mask = (uint64_t)sysconf(_SC_PAGESIZE) - 1, end = ret->end;
	off_t data = lseek(fd, (off_t)(base + ret->start), SEEK_DATA);

	/* ENXIO: a hole up to the end. */
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
	/* All is data, which hugetlbfs reports for every file. */
	if (ret->start > from || ret->end < end || !is_huge(fd, &page))
		return TRUE;
	if (fstat(fd, &st) == 0 && (st.st_blocks == 0 || is_all_allocated(&st)))
		return st.st_blocks > 0;
	return next_huge(fd, base, page, ret);
}

gboolean pr_file_is_preallocated(int fd)
{
	struct stat st;
	uint64_t page;

	return is_huge(fd, &page) || (fstat(fd, &st) == 0 && is_all_allocated(&st));
}
