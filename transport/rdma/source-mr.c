/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Theory of operation: the source's memory
 *
 * Goal: the destination can READ what it needs, and nothing else of this process. Memory is
 * registered for remote READ only, in the path's own protection domain, and its registration ends
 * with the path. Registering pins pages, and pinning fills holes. So only extents that hold data
 * (SEEK_DATA) are registered, in pieces of up to CHUNK bytes, by up to MAX_THREADS threads.
 *
 * The guest may still run while connect() registers. Until it has stopped, two things can happen:
 *  - A hole becomes data: a new extent.
 *  - The guest gives memory back (a balloon, free page reporting), which punches a hole into the
 *    memfd, and perhaps uses it again. Then the pinned page is no longer the guest's: the page
 *    was replaced. A READ would bring bytes that the guest has given up.
 *
 * Noticing replaced pages. Punching a hole takes the page out of all mappings of the memfd. So
 * each piece has a presence mapping, which has no other use. It is filled before the piece is
 * pinned, and never touched again. A page that is not present there (/proc/self/pagemap) may have
 * been replaced. The presence mapping belongs to one piece, because filling a mapping also brings
 * in neighbouring pages of the same mapping. It is not the mapping that is registered, because
 * pinning brings pages in as well.
 *
 * Invariant: a READ never meets a replaced page. Nothing is granted before the guest has stopped,
 * and the memfd does not change after that. Then pr_verbs_source_mr_within() looks at a range,
 * page by page; the caller chooses the ranges and their order.
 *  - A page that is present in its piece's presence mapping has been there since before it was
 *    pinned. So the pinned page is the guest's page, and stays it: the page is granted.
 *  - Any other page is looked up in the memfd with SEEK_DATA. A hole is not granted; the engine
 *    reports it as zero. Data are registered anew and granted with the new key.
 * So this may go on while READs are under way: they use only what was granted, which is right for
 * good. A piece with replaced pages stays registered until the path ends, but no grant gives its
 * key for these pages. If the kernel takes a page out of a presence mapping for other reasons,
 * the page is only registered once more.
 *
 * Limits. A device has a limited count of memory regions, and each costs a system call. If there
 * are more extents than EXTENTS_MAX, or than half of the device's limit, extents with small holes
 * in between are joined, and these holes get filled.
 *
 * Kernels before 6.2 pin for writing whatever the access is. A read-only shared mapping does not
 * permit that (EFAULT). Then this file makes a writable mapping of the same memfd for the pinning
 * alone; the peer still gets REMOTE_READ only.
 *
 * Not handled: memory that is unregistered before the path ends.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "transport/extents.h"
#include "transport/rdma/path.h"

#define CHUNK	      (1024ull * 1024 * 1024) /* bytes */
#define EXTENTS_MAX   8192
#define SMALLEST_HOLE (64ull * 1024) /* bytes; where joining extents begins */
#define MAX_THREADS   4
#define PAGES_AT_ONCE 8192 /* entries of pagemap that one pread() reads */

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 /* Linux 5.14 */
#endif

static uint64_t page_size(void)
{
	return (uint64_t)sysconf(_SC_PAGESIZE);
}

/* Finds the next data in [from, end). A region without a memfd is all data. */
static gboolean next_data(const PrRegion *region, uint64_t from, uint64_t end, PrExtent *ret)
{
	end = MIN(end, region->size);
	*ret = (PrExtent){from, end};
	return region->memfd < 0
		       ? from < end
		       : pr_extent_next(region->memfd, region->memfd_offset, from, end, ret);
}

uint64_t pr_verbs_source_mr_bytes(const PrRegion *regions, guint n)
{
	uint64_t bytes = 0;

	for (guint i = 0; i < n; i++) {
		PrExtent extent = {0};

		while (next_data(&regions[i], extent.end, regions[i].size, &extent))
			bytes += extent.end - extent.start;
	}
	return bytes;
}

static int compare(gconstpointer a, gconstpointer b)
{
	const PrVerbsSourceMr *x = a, *y = b;

	if (x->block != y->block)
		return x->block < y->block ? -1 : 1;
	return x->offset < y->offset ? -1 : x->offset > y->offset;
}

static void add_chunks(const PrVerbsPath *path, GArray *todo, uint32_t block, uint64_t start,
		       uint64_t end)
{
	uint64_t chunk_bytes = MIN(CHUNK, path->device.caps.max_mr_size & ~(page_size() - 1));

	for (uint64_t at = start; at < end; at += chunk_bytes) {
		PrVerbsSourceMr chunk = {
			.block = block, .offset = at, .length = MIN(chunk_bytes, end - at)};

		g_array_append_val(todo, chunk);
	}
}

/* Appends the parts of an extent that no piece of the block covers. Pieces are sorted; *next is the
 * first one that may overlap. */
static void add_missing(PrVerbsPath *path, GArray *todo, uint32_t block, const PrExtent *extent,
			guint *next)
{
	uint64_t at = extent->start;

	for (; *next < path->source_mrs->len && at < extent->end; (*next)++) {
		const PrVerbsSourceMr *have =
			&g_array_index(path->source_mrs, PrVerbsSourceMr, *next);

		if (have->block > block || have->offset >= extent->end)
			break;
		if (have->block < block || have->offset + have->length <= at)
			continue;
		if (have->offset > at)
			add_chunks(path, todo, block, at, have->offset);
		at = have->offset + have->length;
		if (at > extent->end)
			break;
	}
	if (at < extent->end)
		add_chunks(path, todo, block, at, extent->end);
}

static void scan_region(PrVerbsPath *path, GArray *todo, uint32_t block, uint64_t smallest_hole)
{
	const PrRegion *region = &path->regions[block];
	PrExtent extent = {0}, next;
	guint have = 0;

	if (!next_data(region, 0, region->size, &extent))
		return;
	while (next_data(region, extent.end, region->size, &next)) {
		if (next.start - extent.end < smallest_hole) {
			extent.end = next.end;
			continue;
		}
		add_missing(path, todo, block, &extent, &have);
		extent = next;
	}
	add_missing(path, todo, block, &extent, &have);
}

static GArray *scan(PrVerbsPath *path)
{
	GArray *todo = g_array_new(FALSE, FALSE, sizeof(PrVerbsSourceMr));
	/* Leaves half of the memory regions of a device that has few to others. */
	guint max = MIN(EXTENTS_MAX, (guint)path->device.caps.max_mr / 2);

	for (uint64_t hole = 0;; hole = MAX(hole * 4, SMALLEST_HOLE)) {
		g_array_set_size(todo, 0);
		for (guint i = 0; i < path->n_regions; i++)
			scan_region(path, todo, i, hole);
		if (todo->len <= max || hole >= CHUNK)
			return todo;
	}
}

static uint8_t *host(const PrVerbsPath *path, uint32_t block)
{
	void *writable = path->writable[block].addr;

	return writable ? writable : path->regions[block].addr;
}

/* ---- presence mappings ---- */

static uint8_t *presence_of(const PrVerbsSourceMr *piece)
{
	return (uint8_t *)piece->presence.addr + piece->presence_at;
}

/* Makes and fills the presence mapping of a piece. If that fails, the piece is registered once
 * more than necessary. */
static void map_presence(const PrRegion *region, PrVerbsSourceMr *piece)
{
	off_t from = (off_t)(region->memfd_offset + piece->offset);
	struct stat st;
	uint64_t size;
	void *room;

	if (region->memfd < 0 || fstat(region->memfd, &st) < 0)
		return;
	/* Reserves room for aligning the mapping as huge pages need it, and for a gap behind it:
	 * without the gap the kernel might join it with a neighbour. */
	size = piece->length + 2 * (uint64_t)st.st_blksize;
	room = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (room == MAP_FAILED)
		return;
	piece->presence = (PrVerbsMapping){room, size};
	piece->presence_at = -(uintptr_t)room & ((uintptr_t)st.st_blksize - 1);
	if (mmap(presence_of(piece), piece->length, PROT_READ,
		 MAP_SHARED | MAP_NORESERVE | MAP_FIXED, region->memfd, from) == MAP_FAILED)
		return;
	(void)madvise(presence_of(piece), piece->length, MADV_DONTDUMP);
	(void)madvise(presence_of(piece), piece->length, MADV_POPULATE_READ);
}

static void unmap_presence(PrVerbsSourceMr *piece)
{
	if (piece->presence.addr)
		munmap(piece->presence.addr, piece->presence.size);
	piece->presence = (PrVerbsMapping){NULL, 0};
}

static void deregister(PrVerbsSourceMr *piece)
{
	ibv_dereg_mr(piece->mr);
	unmap_presence(piece);
}

/* ---- registering ---- */

typedef struct Job {
	PrVerbsPath *path;
	GArray *todo;
	GCancellable *cancel;
	gint next;  /* index of the next piece in todo; atomic */
	gint error; /* errno of a failure, 0: none; atomic */
} Job;

static struct ibv_mr *register_range(PrVerbsPath *path, uint32_t block, uint64_t offset,
				     uint64_t length)
{
	return ibv_reg_mr(path->device.pd, host(path, block) + offset, length,
			  IBV_ACCESS_REMOTE_READ);
}

static gpointer register_thread(gpointer opaque)
{
	Job *job = opaque;

	while (!g_atomic_int_get(&job->error) && !g_cancellable_is_cancelled(job->cancel)) {
		guint i = (guint)g_atomic_int_add(&job->next, 1);
		PrVerbsSourceMr *piece;

		if (i >= job->todo->len)
			break;
		piece = &g_array_index(job->todo, PrVerbsSourceMr, i);
		map_presence(&job->path->regions[piece->block], piece);
		piece->mr = register_range(job->path, piece->block, piece->offset, piece->length);
		if (!piece->mr)
			g_atomic_int_set(&job->error, errno ? errno : EIO);
	}
	return NULL;
}

static void run_job(Job *job)
{
	GThread *threads[MAX_THREADS];
	guint n = MIN(MAX_THREADS, job->todo->len);

	/* If a thread cannot begin, the others do its work. */
	for (guint i = 1; i < n; i++)
		threads[i] = g_thread_try_new("pr-rdma-register", register_thread, job, NULL);
	register_thread(job);
	for (guint i = 1; i < n; i++)
		if (threads[i])
			g_thread_join(threads[i]);
}

/* Whether the kernel refuses to pin a read-only mapping, tried with one page. */
static gboolean needs_writable(PrVerbsPath *path, const PrVerbsSourceMr *sample)
{
	struct ibv_mr *mr;

	if (path->regions[sample->block].memfd < 0 || path->writable[sample->block].addr)
		return FALSE;
	mr = register_range(path, sample->block, sample->offset, page_size());
	if (!mr)
		return errno == EFAULT;
	ibv_dereg_mr(mr);
	return FALSE;
}

static gboolean map_writable(PrVerbsPath *path, GError **error)
{
	for (guint i = 0; i < path->n_regions; i++) {
		const PrRegion *region = &path->regions[i];
		void *map;

		if (path->writable[i].addr || region->memfd < 0 || !region->size)
			continue;
		map = mmap(NULL, region->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE,
			   region->memfd, (off_t)region->memfd_offset);
		if (map == MAP_FAILED)
			return pr_verbs_error(path->uri,
					      "this kernel pins memory only for writing, and guest "
					      "memory cannot be mapped for that",
					      errno, error);
		(void)madvise(map, region->size, MADV_DONTDUMP);
		path->writable[i] = (PrVerbsMapping){map, region->size};
	}
	return TRUE;
}

static gboolean register_all(PrVerbsPath *path, GArray *todo, GCancellable *cancel, GError **error)
{
	Job job = {.path = path, .todo = todo, .cancel = cancel};

	if (!todo->len)
		return TRUE;
	if (needs_writable(path, &g_array_index(todo, PrVerbsSourceMr, 0)) &&
	    !map_writable(path, error))
		return FALSE;
	run_job(&job);
	/* Keeps the pieces that are registered, even if others failed, so that they are freed. */
	for (guint i = 0; i < todo->len; i++) {
		PrVerbsSourceMr *piece = &g_array_index(todo, PrVerbsSourceMr, i);

		if (piece->mr)
			g_array_append_val(path->source_mrs, *piece);
		else
			unmap_presence(piece);
	}
	g_array_sort(path->source_mrs, compare);
	if (g_cancellable_set_error_if_cancelled(cancel, error))
		return FALSE;
	if (job.error)
		return pr_verbs_error(path->uri, "cannot register guest memory", job.error, error);
	return TRUE;
}

gboolean pr_verbs_source_mr_new(PrVerbsPath *path, GCancellable *cancel, GError **error)
{
	g_autoptr(GArray) todo = scan(path);

	return register_all(path, todo, cancel, error);
}

/* ---- grants, after the guest has stopped ---- */

static PrGrant grant_of(const PrVerbsSourceMr *piece, uint64_t start, uint64_t end)
{
	return (PrGrant){
		.block = piece->block,
		.offset = start,
		.length = end - start,
		.addr = (uintptr_t)piece->mr->addr + (start - piece->offset),
		.key = piece->mr->rkey,
	};
}

/* Appends grants of the pages in [start, end) that are still present in the piece's presence
 * mapping. If the kernel does not tell, appends none. */
static void add_kept_runs(GArray *kept, int pagemap, const PrVerbsSourceMr *piece, uint64_t start,
			  uint64_t end)
{
	const uint64_t present = 1ull << 63, bytes = page_size();
	g_autofree uint64_t *entries = g_new(uint64_t, PAGES_AT_ONCE);
	uint64_t run = end; /* where the current run begins; `end`: no run */

	for (uint64_t at = start; at < end;) {
		uint64_t n = MIN((end - at) / bytes, PAGES_AT_ONCE);
		ssize_t size = (ssize_t)(n * sizeof(*entries));
		uint64_t first = ((uintptr_t)presence_of(piece) + at - piece->offset) / bytes;

		if (pread(pagemap, entries, (size_t)size, (off_t)(first * sizeof(*entries))) !=
		    size)
			memset(entries, 0, (size_t)size);
		for (uint64_t i = 0; i < n; i++, at += bytes) {
			gboolean here = (entries[i] & present) != 0;

			if (here && run == end)
				run = at;
			if (here || run == end)
				continue;
			g_array_append_vals(kept, &(PrGrant[]){grant_of(piece, run, at)}, 1);
			run = end;
		}
	}
	if (run < end)
		g_array_append_vals(kept, &(PrGrant[]){grant_of(piece, run, end)}, 1);
}

static int by_offset(gconstpointer a, gconstpointer b)
{
	const PrGrant *x = a, *y = b;

	return x->offset < y->offset ? -1 : x->offset > y->offset;
}

/* Grants of the pages of a range that are registered and not replaced, sorted. */
static GArray *find_kept(PrVerbsPath *path, uint32_t block, uint64_t start, uint64_t end)
{
	GArray *kept = g_array_new(FALSE, FALSE, sizeof(PrGrant));
	int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);

	for (guint i = 0; i < path->source_mrs->len; i++) {
		const PrVerbsSourceMr *piece = &g_array_index(path->source_mrs, PrVerbsSourceMr, i);
		uint64_t from = MAX(start, piece->offset);
		uint64_t to = MIN(end, piece->offset + piece->length);

		if (piece->block != block || from >= to)
			continue;
		if (path->regions[block].memfd < 0)
			g_array_append_vals(kept, &(PrGrant[]){grant_of(piece, from, to)}, 1);
		else if (piece->presence.addr)
			add_kept_runs(kept, pagemap, piece, from, to);
	}
	if (pagemap >= 0)
		close(pagemap);
	g_array_sort(kept, by_offset);
	return kept;
}

static void add_data(const PrRegion *region, GArray *fresh, uint64_t start, uint64_t end)
{
	PrExtent extent = {.end = start};

	while (next_data(region, extent.end, end, &extent))
		g_array_append_val(fresh, extent);
}

/* Extents of data in the parts of the range that `kept` does not cover, sorted. */
static GArray *find_fresh(const PrRegion *region, const GArray *kept, uint64_t start, uint64_t end)
{
	GArray *fresh = g_array_new(FALSE, FALSE, sizeof(PrExtent));
	uint64_t at = start;

	for (guint i = 0; i < kept->len; i++) {
		const PrGrant *run = &g_array_index(kept, PrGrant, i);

		if (run->offset > at)
			add_data(region, fresh, at, run->offset);
		at = MAX(at, run->offset + run->length);
	}
	if (at < end)
		add_data(region, fresh, at, end);
	return fresh;
}

/* Joins extents with less than `gap` in between. Holes there get filled, kept pages are
 * registered twice. */
static void join(GArray *extents, uint64_t gap)
{
	guint n = 0;

	for (guint i = 0; i < extents->len; i++) {
		PrExtent next = g_array_index(extents, PrExtent, i);
		PrExtent *last = n > 0 ? &g_array_index(extents, PrExtent, n - 1) : NULL;

		if (last && next.start - last->end < gap)
			last->end = next.end;
		else
			g_array_index(extents, PrExtent, n++) = next;
	}
	g_array_set_size(extents, n);
}

/* How many of the remaining memory regions a range of so many bytes may use. */
static guint share(const PrVerbsPath *path, uint64_t bytes)
{
	guint max = MIN(EXTENTS_MAX, (guint)path->device.caps.max_mr / 2);
	guint left = max - MIN(max, path->source_mrs->len);
	uint64_t all = 0;

	for (guint i = 0; i < path->n_regions; i++)
		all += path->regions[i].size;
	return MAX(4, (guint)((double)left * (double)bytes / (double)all));
}

/* Appends the found grants in order, each byte once; adjacent grants become one. */
static void merge_grants(GArray *found, GArray *ret)
{
	uint64_t at = 0;
	PrGrant *last = NULL;

	g_array_sort(found, by_offset);
	for (guint i = 0; i < found->len; i++) {
		PrGrant next = g_array_index(found, PrGrant, i);
		uint64_t end = next.offset + next.length;
		uint64_t cut = at > next.offset ? at - next.offset : 0;

		if (cut >= next.length)
			continue;
		next.offset += cut;
		next.addr += cut;
		next.length -= cut;
		at = end;
		if (last && last->key == next.key && last->offset + last->length == next.offset &&
		    last->addr + last->length == next.addr) {
			last->length += next.length;
			continue;
		}
		g_array_append_val(ret, next);
		last = &g_array_index(ret, PrGrant, ret->len - 1);
	}
}

gboolean pr_verbs_source_mr_within(PrVerbsPath *path, uint32_t block, uint64_t offset,
				   uint64_t length, GArray *ret, GError **error)
{
	g_autoptr(GArray) found = find_kept(path, block, offset, offset + length);
	g_autoptr(GArray) fresh = find_fresh(&path->regions[block], found, offset, offset + length);
	g_autoptr(GArray) todo = g_array_new(FALSE, FALSE, sizeof(PrVerbsSourceMr));
	guint most = share(path, length);

	for (uint64_t gap = SMALLEST_HOLE; fresh->len > most; gap *= 4)
		join(fresh, gap);
	for (guint i = 0; i < fresh->len; i++) {
		const PrExtent *extent = &g_array_index(fresh, PrExtent, i);

		add_chunks(path, todo, block, extent->start, extent->end);
	}
	if (!register_all(path, todo, NULL, error))
		return FALSE;
	for (guint i = 0; i < todo->len; i++) {
		const PrVerbsSourceMr *piece = &g_array_index(todo, PrVerbsSourceMr, i);
		PrGrant grant = grant_of(piece, piece->offset, piece->offset + piece->length);

		g_array_append_val(found, grant);
	}
	merge_grants(found, ret);
	return TRUE;
}

void pr_verbs_source_mr_free(PrVerbsPath *path)
{
	for (guint i = 0; path->source_mrs && i < path->source_mrs->len; i++)
		deregister(&g_array_index(path->source_mrs, PrVerbsSourceMr, i));
	g_clear_pointer(&path->source_mrs, g_array_unref);
	for (guint i = 0; path->writable && i < path->n_regions; i++)
		if (path->writable[i].addr)
			munmap(path->writable[i].addr, path->writable[i].size);
	g_clear_pointer(&path->writable, g_free);
}
