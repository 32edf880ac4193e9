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
 * A guest that gives a page back before it was read (a balloon) leaves us pinning a page that is no longer
 * its. The READ then lands nowhere, and the engine resolves the guest's next access with a zero page, which
 * is all that such a guest may expect.
 */
#include <errno.h>
#include <string.h>

#include "transport/verbs.h"

#define CHUNK (2ull * 1024 * 1024)

static int compare(gconstpointer a, gconstpointer b)
{
	const PrGrant *x = a, *y = b;

	if (x->block != y->block)
		return x->block < y->block ? -1 : 1;
	return x->offset < y->offset ? -1 : x->offset > y->offset;
}

static void add_grant(GArray *imports, const PrGrant *grant, uint64_t from)
{
	uint64_t end = grant->offset + grant->length;

	while (from < end) {
		uint64_t length = MIN(end, (from / CHUNK + 1) * CHUNK) - from;
		PrVerbsImport import = {
			.block = grant->block,
			.rkey = (uint32_t)grant->key,
			.offset = from,
			.length = length,
			.remote = grant->addr + (from - grant->offset),
		};

		g_array_append_val(imports, import);
		from += length;
	}
}

void pr_verbs_import_set(PrVerbsPath *path, const PrGrant *grants, guint n)
{
	g_autofree PrGrant *sorted = g_memdup2(grants, n * sizeof(*grants));
	GArray *imports = g_array_new(FALSE, FALSE, sizeof(PrVerbsImport));
	uint64_t done = 0;

	pr_verbs_import_free(path);
	if (n)
		qsort(sorted, n, sizeof(*sorted), compare);
	for (guint i = 0; i < n; i++) {
		const PrGrant *grant = &sorted[i];

		if (i && grant->block != sorted[i - 1].block)
			done = 0;
		/* Of ranges that overlap, the first one counts. */
		add_grant(imports, grant, MAX(grant->offset, done));
		done = MAX(done, grant->offset + grant->length);
	}
	g_atomic_int_set(&path->probe_key, imports->len ? (gint)sorted[0].key : 0);
	path->n_imports = imports->len;
	path->imports = (PrVerbsImport *)(gpointer)g_array_free(imports, FALSE);
}

static gboolean has(const PrVerbsImport *import, uint32_t block, uint64_t offset)
{
	return import->block == block && offset >= import->offset &&
	       offset - import->offset < import->length;
}

PrVerbsImport *pr_verbs_import_find(PrVerbsPath *path, PrVerbsLane *lane, uint32_t block,
				    uint64_t offset)
{
	guint low = 0, high = path->n_imports;

	if (lane->import_hint < high && has(&path->imports[lane->import_hint], block, offset))
		return &path->imports[lane->import_hint];
	while (low < high) {
		guint middle = low + (high - low) / 2;
		PrVerbsImport *import = &path->imports[middle];

		if (has(import, block, offset)) {
			lane->import_hint = middle;
			return import;
		}
		if (import->block < block || (import->block == block && import->offset < offset))
			low = middle + 1;
		else
			high = middle;
	}
	return NULL;
}

static struct ibv_mr *register_range(PrVerbsPath *path, uint32_t block, uint64_t offset,
				     uint64_t length)
{
	uint8_t *at = (uint8_t *)path->regions[block].addr + offset;
	struct ibv_mr *mr = ibv_reg_mr(path->rail.pd, at, length, IBV_ACCESS_LOCAL_WRITE);
	int number = errno;
	g_autoptr(GError) error = NULL;

	if (mr)
		return mr;
	if (pr_verbs_check_memlock(length, &error))
		pr_verbs_error(path->uri, "cannot register guest memory", number, &error);
	pr_verbs_fail(path, "rail %s: %s", pr_verbs_rail_name(&path->rail), error->message);
	return NULL;
}

static struct ibv_mr *register_import(PrVerbsPath *path, PrVerbsImport *import)
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

gboolean pr_verbs_import_key(PrVerbsPath *path, PrVerbsImport *import, gboolean alone,
			     uint64_t offset, uint32_t length, uint32_t *ret_key,
			     struct ibv_mr **ret_own)
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

void pr_verbs_import_free(PrVerbsPath *path)
{
	for (guint i = 0; i < path->n_imports; i++)
		if (path->imports[i].mr)
			ibv_dereg_mr(path->imports[i].mr);
	g_clear_pointer(&path->imports, g_free);
	path->n_imports = 0;
}
