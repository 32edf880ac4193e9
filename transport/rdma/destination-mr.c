/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Theory of operation: the destination's memory
 *
 * READs land in our own mapping of the guest's memfd, which has to be registered for that, and
 * registering fills holes. We register as little as we can, as late as we can:
 *  - nothing before the first READ: the engine empties the memfds after accept(), and a page that was pinned
 *    before that would no longer be the guest's.
 *  - only where the source has granted something, in chunks of at most CHUNK bytes when the first
 *    bulk READ comes to one. So a chunk that the source never had, or that holds only zero pages,
 *    stays a hole. The price: where something is read, zero pages in the same chunk get memory too.
 *  - an urgent READ into a chunk that is not registered yet registers its own page and nothing else: a
 *    vCPU waits for it, and filling a chunk takes much longer than a READ.
 * A chunk stays registered as long as the path lives.
 *
 * Grants may come while the lanes read already: one thread adds to the chunks' lists, the lanes look, nobody waits
 * for anybody.
 *
 * A guest that gives a page back before it was read (a balloon) leaves us pinning a page that is no longer
 * its. The READ then lands nowhere, and the engine resolves the guest's next access with a zero page, which
 * is all that such a guest may expect.
 */
#include <errno.h>

#include "transport/rdma/path.h"

#define CHUNK (2ull * 1024 * 1024)

static guint64 n_chunks(const PrRegion *region)
{
	return (region->size + CHUNK - 1) / CHUNK;
}

/* Behind what is there already: of ranges that overlap, the first one counts. */
static void add_import(PrVerbsPath *path, const PrVerbsDestinationMr *import)
{
	PrVerbsDestinationMr **at = &path->imports[import->block][import->offset / CHUNK];

	while (*at)
		at = &(*at)->next;
	/* Lanes may be looking: they find it whole. */
	g_atomic_pointer_set(at, g_memdup2(import, sizeof(*import)));
}

static void add_grant(PrVerbsPath *path, const PrGrant *grant)
{
	uint64_t end = grant->offset + grant->length;

	for (uint64_t from = grant->offset; from < end;) {
		uint64_t length = MIN(end, (from / CHUNK + 1) * CHUNK) - from;
		PrVerbsDestinationMr import = {
			.block = grant->block,
			.rkey = (uint32_t)grant->key,
			.offset = from,
			.length = length,
			.remote = grant->addr + (from - grant->offset),
		};

		add_import(path, &import);
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
	path->imports = g_new0(PrVerbsDestinationMr **, path->n_regions);
	for (guint i = 0; i < path->n_regions; i++)
		path->imports[i] = g_new0(PrVerbsDestinationMr *, n_chunks(&path->regions[i]));
	g_atomic_int_set(&path->probe_key, 0);
	pr_verbs_destination_mr_add(path, grants, n);
}

PrVerbsDestinationMr *pr_verbs_destination_mr_find(PrVerbsPath *path, uint32_t block,
						   uint64_t offset)
{
	PrVerbsDestinationMr *import = NULL;

	if (path->imports)
		import = g_atomic_pointer_get(&path->imports[block][offset / CHUNK]);
	while (import && (offset < import->offset || offset - import->offset >= import->length))
		import = g_atomic_pointer_get(&import->next);
	return import;
}

static struct ibv_mr *register_range(PrVerbsPath *path, uint32_t block, uint64_t offset,
				     uint64_t length)
{
	uint8_t *at = (uint8_t *)path->regions[block].addr + offset;
	g_autoptr(GError) error = NULL;
	struct ibv_mr *mr;
	int number;

	/* What is not, registering would allocate, zero pages too. */
	if (path->allocate && !path->allocate(block, offset, length, path->allocate_opaque))
		return NULL;
	mr = ibv_reg_mr(path->rail.pd, at, length, IBV_ACCESS_LOCAL_WRITE);
	number = errno;

	if (mr)
		return mr;
	if (pr_verbs_check_memlock(length, &error))
		pr_verbs_error(path->uri, "cannot register guest memory", number, &error);
	pr_verbs_fail(path, "rail %s: %s", pr_verbs_device_name(&path->rail), error->message);
	return NULL;
}

static struct ibv_mr *register_import(PrVerbsPath *path, PrVerbsDestinationMr *import)
{
	struct ibv_mr *mr;

	g_mutex_lock(&path->import_lock);
	mr = g_atomic_pointer_get(&import->mr);
	if (!mr) {
		mr = register_range(path, import->block, import->offset, import->length);
		g_atomic_pointer_set(&import->mr, mr);
	}
	g_mutex_unlock(&path->import_lock);
	return mr;
}

gboolean pr_verbs_destination_mr_key(PrVerbsPath *path, PrVerbsDestinationMr *import,
				     gboolean alone, uint64_t offset, uint32_t length,
				     uint32_t *ret_key, struct ibv_mr **ret_own)
{
	struct ibv_mr *mr = g_atomic_pointer_get(&import->mr);

	if (!mr && alone)
		mr = *ret_own = register_range(path, import->block, offset, length);
	else if (!mr)
		mr = register_import(path, import);
	if (mr)
		*ret_key = mr->lkey;
	return mr != NULL;
}

static void free_list(PrVerbsDestinationMr *import)
{
	while (import) {
		PrVerbsDestinationMr *next = import->next;

		if (import->mr)
			ibv_dereg_mr(import->mr);
		g_free(import);
		import = next;
	}
}

void pr_verbs_destination_mr_free(PrVerbsPath *path)
{
	for (guint i = 0; path->imports && i < path->n_regions; i++) {
		for (guint64 j = 0; j < n_chunks(&path->regions[i]); j++)
			free_list(path->imports[i][j]);
		g_free(path->imports[i]);
	}
	g_clear_pointer(&path->imports, g_free);
}
