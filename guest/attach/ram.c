/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The memory of the process that other processes can map: MAP_SHARED mappings of files in memory
 * (memfd, tmpfs, hugetlbfs) that the process still has open. The engine knows which of them are the
 * guest's RAM (CHOOSE).
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "guest/attach/internal.h"

#define SPANS_MAX  256 /* shared mappings of any kind */
#define LINE_BYTES 512 /* of /proc/PID/maps; the rest of a longer line does not matter */

/* A part of a file that is mapped in one piece. The kernel may have split it into several
 * mappings. */
typedef struct Span {
	uint64_t start, end, offset, inode;
	dev_t device;
	int fd; /* -1: none found */
} Span;

typedef struct Search {
	const AttachTarget *target;
	Span spans[SPANS_MAX];
	unsigned n;
	bool overflow;
} Search;

static bool parse_line(const char *line, Span *ret)
{
	unsigned long start, end, offset, inode;
	unsigned major, minor;
	char access[5];

	if (sscanf(line, "%lx-%lx %4s %lx %x:%x %lu", &start, &end, access, &offset, &major, &minor,
		   &inode) != 7 ||
	    strncmp(access, "rw", 2) != 0 || access[3] != 's' || !inode ||
	    strstr(line, " anon_inode:"))
		return false;
	*ret = (Span){.start = start,
		      .end = end,
		      .offset = offset,
		      .inode = inode,
		      .device = makedev(major, minor),
		      .fd = -1};
	return true;
}

static void add_span(Search *search, const Span *span)
{
	Span *last = search->n ? &search->spans[search->n - 1] : NULL;

	if (last && last->end == span->start && last->inode == span->inode &&
	    last->device == span->device &&
	    last->offset + (last->end - last->start) == span->offset) {
		last->end = span->end;
	} else if (search->n < SPANS_MAX) {
		search->spans[search->n++] = *span;
	} else {
		search->overflow = true;
	}
}

static void read_line(Search *search, const char *line)
{
	Span span;

	if (parse_line(line, &span))
		add_span(search, &span);
}

static bool read_maps(Search *search)
{
	char buffer[4096], line[LINE_BYTES];
	int fd = openat(search->target->proc_fd, "maps", O_RDONLY | O_CLOEXEC);
	size_t used = 0;
	ssize_t n;

	if (fd < 0)
		return false;
	while ((n = read(fd, buffer, sizeof(buffer))) > 0) {
		for (ssize_t i = 0; i < n; i++) {
			if (buffer[i] == '\n') {
				line[used] = '\0';
				read_line(search, line);
				used = 0;
			} else if (used + 1 < sizeof(line)) {
				line[used++] = buffer[i];
			}
		}
	}
	close(fd);
	return n == 0;
}

static bool is_memory(int fd, uint32_t *ret_page_size)
{
	struct statfs fs;

	if (fstatfs(fd, &fs) < 0)
		return false;
	*ret_page_size = fs.f_type == HUGETLBFS_MAGIC ? fs.f_bsize : sysconf(_SC_PAGESIZE);
	return fs.f_type == HUGETLBFS_MAGIC || fs.f_type == TMPFS_MAGIC;
}

/* Finds the mappings of the file that this descriptor is open for. The first writable descriptor of
 * a file is duplicated. */
static bool match_fd(int number, void *opaque)
{
	Search *search = opaque;
	char name[32];
	struct stat st;

	snprintf(name, sizeof(name), "fd/%d", number);
	if (fstatat(search->target->proc_fd, name, &st, 0) < 0 || !S_ISREG(st.st_mode))
		return true;
	for (unsigned i = 0; i < search->n; i++) {
		Span *span = &search->spans[i];

		if (span->fd >= 0 || span->inode != st.st_ino || span->device != st.st_dev)
			continue;
		span->fd = attach_target_fd(search->target, number);
		if (span->fd >= 0 && (fcntl(span->fd, F_GETFL) & O_ACCMODE) != O_RDWR)
			agent_close_fd(&span->fd);
	}
	return true;
}

/* Whether an engine could map it and serve its faults. */
static bool is_region(const Span *span, uint32_t *ret_page_size)
{
	uint64_t size = span->end - span->start;
	struct stat st;

	return span->fd >= 0 && is_memory(span->fd, ret_page_size) &&
	       !(span->start % *ret_page_size) && !(span->offset % *ret_page_size) &&
	       !(size % *ret_page_size) && fstat(span->fd, &st) == 0 &&
	       (uint64_t)st.st_size >= span->offset + size;
}

static bool add_region(AttachRam *ram, Span *span, uint32_t page_size)
{
	AttachRegion *region;

	if (ram->n == PR_AGENT_REGIONS_MAX)
		return false;
	region = &ram->regions[ram->n++];
	*region = (AttachRegion){.fd = span->fd};
	region->wire.base = span->start;
	region->wire.size = span->end - span->start;
	region->wire.offset = span->offset;
	region->wire.page_size = page_size;
	span->fd = -1;
	return true;
}

static bool add_regions(AttachRam *ram, Search *search, AgentResult *result)
{
	bool fits = !search->overflow;

	for (unsigned i = 0; i < search->n; i++) {
		uint32_t page_size;

		if (is_region(&search->spans[i], &page_size))
			fits = add_region(ram, &search->spans[i], page_size) && fits;
		agent_close_fd(&search->spans[i].fd);
	}
	return fits ||
	       agent_fail(result, PR_AGENT_UNSUPPORTED,
			  "process %d has more mappings of shared memory than can be looked at (%d "
			  "of RAM at most); give the guest its RAM in fewer memory backends",
			  (int)search->target->pid, PR_AGENT_REGIONS_MAX);
}

void attach_ram_clear(AttachRam *ram)
{
	for (unsigned i = 0; i < ram->n; i++)
		agent_close_fd(&ram->regions[i].fd);
	ram->n = 0;
	ram->chosen = false;
}

bool attach_ram_find(AttachRam *ram, const AttachTarget *target, AgentResult *result)
{
	Search search;

	search.target = target;
	search.n = 0;
	search.overflow = false;
	attach_ram_clear(ram);
	if (!read_maps(&search))
		return attach_fail_access(target, result, "the list of mappings");
	if (!attach_each_fd(target, match_fd, &search)) {
		for (unsigned i = 0; i < search.n; i++)
			agent_close_fd(&search.spans[i].fd);
		return attach_fail_access(target, result, "the list of open files");
	}
	return add_regions(ram, &search, result);
}

static bool choose_one(AttachRam *ram, uint64_t base)
{
	for (unsigned i = 0; i < ram->n; i++) {
		if (ram->regions[i].wire.base == base) {
			ram->regions[i].chosen = true;
			return true;
		}
	}
	return false;
}

bool attach_ram_choose(AttachRam *ram, const uint64_t *bases, unsigned n, AgentResult *result)
{
	for (unsigned i = 0; i < ram->n; i++)
		ram->regions[i].chosen = false;
	ram->chosen = false;
	for (unsigned i = 0; i < n; i++) {
		if (!choose_one(ram, bases[i]))
			return agent_fail(result, PR_AGENT_FAILED,
					  "there is no shared memory at 0x%llx any more",
					  (unsigned long long)bases[i]);
	}
	ram->chosen = true;
	return true;
}
