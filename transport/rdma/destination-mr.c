/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Theory of operation: the destination's memory
 *
 * READs land in our own mapping of the guest's memfd. That mapping has to be registered, and
 * registering fills holes with pages. Goal: register as little as possible, as late as possible.
 *  - Nothing is registered before the first READ. The engine empties the memfds after accept(); a
 *    page that was pinned before that would no longer be the guest's.
 *  - Only ranges that the source has granted are registered, in chunks of CHUNK bytes, when the
 *    first bulk READ of a chunk is posted. So a chunk stays a hole if the source never had it, or
 *    has only zero pages in it. The price: in a chunk of which something is read, zero pages get
 *    memory too.
 *  - An urgent READ of a chunk that is not registered yet registers its own pages alone. A vCPU
 *    waits for it, and filling a chunk takes much longer than a READ.
 * A chunk stays registered as long as the path lives.
 *
 * Grants may arrive while the lanes read. One thread adds to the lists of the chunks, the lanes
 * search them without a lock, and no thread waits for another.
 *
 * Not handled: a guest that gives a page back before the page was read (a balloon). Then the
 * pinned page is no longer the guest's, and the READ lands in no page of the guest. The engine
 * resolves the guest's next access with a zero page, which is all that such a guest may expect.
 */
#include <errno.h>

#include "transport/rdma/path.h"

#define CHUNK (2ull * 1024 * 1024)

static guint64 n_chunks(const PrRegion *region)
{
	return (region->size + CHUNK - 1) / CHUNK;
}

/* Appends to the list of the chunk: of ranges that overlap, the first one is used. */
static void add_range(PrVerbsPath *path, const PrVerbsDestinationMr *range)
{
	PrVerbsDestinationMr **at = &path->destination_mrs[range->block][range->offset / CHUNK];

	while (*at)
		at = &(*at)->next;
	/* Lanes may be searching the list: they must find the range complete. */
	g_atomic_pointer_set(at, g_memdup2(range, sizeof(*range)));
}

static void add_grant(PrVerbsPath *path, const PrGrant *grant)
{
	uint64_t end = grant->offset + grant->length;

	for (uint64_t from = grant->offset; from < end;) {
		uint64_t length = MIN(end, (from / CHUNK + 1) * CHUNK) - from;
		PrVerbsDestinationMr range = {
			.block = grant->block,
			.rkey = (uint32_t)grant->key,
			.offset = from,
			.length = length,
			.remote = grant->addr + (from - grant->offset),
		};

		add_range(path, &range);
		from += length;
	}
}

void pr_verbs_destination_mr_add(PrVerbsPath *path, const PrGrant *grants, guint n)
{
	for (guint i = 0; i < n; i++)
		add_grant(path, &grants[i]);
	if (n && !g_atomic_int_get(&path->probe_key))
		g_atomic_int_set(&path->probe_key, (gint)grants[0].key);
}

void pr_verbs_destination_mr_set(PrVerbsPath *path, const PrGrant *grants, guint n)
{
	pr_verbs_destination_mr_free(path);
	path->destination_mrs = g_new0(PrVerbsDestinationMr **, path->n_regions);
	for (guint i = 0; i < path->n_regions; i++)
		path->destination_mrs[i] =
			g_new0(PrVerbsDestinationMr *, n_chunks(&path->regions[i]));
	g_atomic_int_set(&path->probe_key, 0);
	pr_verbs_destination_mr_add(path, grants, n);
}

PrVerbsDestinationMr *pr_verbs_destination_mr_find(PrVerbsPath *path, uint32_t block,
						   uint64_t offset)
{
	PrVerbsDestinationMr *range = NULL;

	if (path->destination_mrs)
		range = g_atomic_pointer_get(&path->destination_mrs[block][offset / CHUNK]);
	while (range && (offset < range->offset || offset - range->offset >= range->length))
		range = g_atomic_pointer_get(&range->next);
	return range;
}

static struct ibv_mr *register_range(PrVerbsPath *path, uint32_t block, uint64_t offset,
				     uint64_t length)
{
	uint8_t *at = (uint8_t *)path->regions[block].addr + offset;
	g_autoptr(GError) error = NULL;
	struct ibv_mr *mr;
	int number;

	/* Registering allocates all missing pages of the range, zero pages too. */
	if (path->allocate && !path->allocate(block, offset, length, path->allocate_opaque))
		return NULL;
	mr = ibv_reg_mr(path->device.pd, at, length, IBV_ACCESS_LOCAL_WRITE);
	number = errno;

	if (mr)
		return mr;
	if (pr_verbs_check_memlock(length, &error))
		pr_verbs_error(path->uri, "cannot register guest memory", number, &error);
	pr_verbs_fail(path, "%s", error->message);
	return NULL;
}

static struct ibv_mr *register_whole(PrVerbsPath *path, PrVerbsDestinationMr *range)
{
	struct ibv_mr *mr;

	g_mutex_lock(&path->mr_lock);
	mr = g_atomic_pointer_get(&range->mr);
	if (!mr) {
		mr = register_range(path, range->block, range->offset, range->length);
		g_atomic_pointer_set(&range->mr, mr);
	}
	g_mutex_unlock(&path->mr_lock);
	return mr;
}

gboolean pr_verbs_destination_mr_key(PrVerbsPath *path, PrVerbsDestinationMr *range, gboolean alone,
				     uint64_t offset, uint32_t length, uint32_t *ret_key,
				     struct ibv_mr **ret_own)
{
	struct ibv_mr *mr = g_atomic_pointer_get(&range->mr);

	if (!mr && alone)
		mr = *ret_own = register_range(path, range->block, offset, length);
	else if (!mr)
		mr = register_whole(path, range);
	if (mr)
		*ret_key = mr->lkey;
	return mr != NULL;
}

static void free_list(PrVerbsDestinationMr *range)
{
	while (range) {
		PrVerbsDestinationMr *next = range->next;

		if (range->mr)
			ibv_dereg_mr(range->mr);
		g_free(range);
		range = next;
	}
}

void pr_verbs_destination_mr_free(PrVerbsPath *path)
{
	for (guint i = 0; path->destination_mrs && i < path->n_regions; i++) {
		for (guint64 j = 0; j < n_chunks(&path->regions[i]); j++)
			free_list(path->destination_mrs[i][j]);
		g_free(path->destination_mrs[i]);
	}
	g_clear_pointer(&path->destination_mrs, g_free);
}
