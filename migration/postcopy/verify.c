/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Theory of operation
 *
 * Goal: with capability `verify` on both sides, no page is placed before its hash was compared with
 * the hash of the source's page. So whatever a path does to the data on its way, the guest never
 * sees it.
 *
 * A page's way. The thread that posts a READ reports it (pr_verify_posted), and the verify thread
 * requests the hashes of its pages from the source; for faults at once, so that data and hashes
 * travel at the same time. When the data has landed (pr_verify_landed), the claim is the verify
 * thread's. When the hashes are there, too, it compares the pages, and places the right ones. It
 * ends the claim of a wrong page, so a fault thread or a pull thread reads the page again. The same
 * page wrong PR_VERIFY_STRIKES times in a row fails the path.
 *
 * Recovery. The source computes a hash from its frozen RAM and stores nothing, so after a recovery
 * hashes are simply requested again. Data that had landed is kept with its claim
 * (pr_verify_add_landed); only its hashes are missing. READs that had not landed are forgotten at
 * the detach, because their path is gone. A READ of another rail may still land later; its hashes
 * are requested then.
 *
 * Answers. They come through the reader of the control channel (pr_control_set_early). The thread
 * that handles the other messages may be waiting for the guest to load its device state, and the
 * guest may be waiting for a page.
 *
 * Bounds. Hashes for bulk READs are requested for REQUESTED_MAX ranges at a time, so that the
 * request of a fault finds no long queue at the source. Bulk READs pause while HELD_MAX landed
 * ranges wait for their hashes, so that a fault on a landed page does not wait for long.
 *
 * Invariant. Zero pages and holes do not travel and are not verified, and the source may yet call a
 * page zero whose READ was corrupt. So a wrong page is cleared to zeros before its claim ends.
 */
#include "migration/postcopy/verify.h"

#include <string.h>
#include <xxhash.h>

#include "migration/memory/bitmap.h"
#include "migration/memory/invariants.h"
#include "migration/postcopy/place.h"
#include "util/try-alloc.h"

#define REQUESTED_MAX 8	 /* bulk ranges whose hashes were requested and are not there */
#define HELD_MAX      32 /* landed bulk ranges without hashes from which on bulk READs pause */
#define REQUEST_BATCH 64 /* ranges in one request */

typedef struct Range {
	uint64_t token;
	guint rail;
	gboolean urgent;
	gboolean requested;
	gboolean landed;
	uint64_t *hashes; /* NULL: they have not come yet */
	gboolean awaited; /* the verify thread's own: a fault waited for a page that was placed */
} Range;

struct PrVerify {
	PrRam *ram;
	int uffd;
	PrVerifyHooks hooks;
	GThread *thread;

	GMutex lock; /* protects what follows; taken last */
	GCond changed;
	GHashTable *ranges;	   /* token -> Range: posted and not yet finished */
	GQueue urgent, bulk;	   /* Range: its hashes are to be requested */
	GQueue ready;		   /* Range: landed, with hashes */
	guint n_requested, n_held; /* bulk ranges */
	gboolean attached, stop;
	gboolean busy; /* the thread may be using the connection */

	GHashTable *
		strikes; /* token of a page -> times in a row that it was wrong; the thread's own */

	PrVerifyStats stats; /* atomic */
};

uint64_t pr_verify_hash(const void *data, gsize length)
{
	return XXH3_64bits(data, length);
}

static void range_free(gpointer opaque)
{
	Range *range = opaque;

	g_free(range->hashes);
	g_free(range);
}

/* ---- with the lock held ---- */

static Range *find_or_add(PrVerify *verify, uint64_t token)
{
	Range *range = g_hash_table_lookup(verify->ranges, &token);

	if (!range) {
		range = g_new0(Range, 1);
		range->token = token;
		g_hash_table_insert(verify->ranges, &range->token, range);
	}
	return range;
}

static void set_requested(PrVerify *verify, Range *range, gboolean requested)
{
	if (range->requested == requested)
		return;
	range->requested = requested;
	if (!range->urgent)
		verify->n_requested += requested ? 1 : -1;
}

static gboolean is_held(const Range *range)
{
	return range->landed && !range->hashes && !range->urgent;
}

static GQueue *request_queue(PrVerify *verify, const Range *range)
{
	return range->urgent ? &verify->urgent : &verify->bulk;
}

static void remove_range(PrVerify *verify, Range *range)
{
	g_queue_remove(request_queue(verify, range), range);
	set_requested(verify, range, FALSE);
	verify->n_held -= is_held(range);
	g_hash_table_remove(verify->ranges, &range->token);
}

static void queue_if_ready(PrVerify *verify, Range *range)
{
	if (range->landed && range->hashes)
		g_queue_push_tail(&verify->ready, range);
	g_cond_broadcast(&verify->changed);
}

/* ---- for the threads of the lanes ---- */

void pr_verify_posted(PrVerify *verify, uint64_t token, gboolean urgent)
{
	g_mutex_lock(&verify->lock);
	Range *range = find_or_add(verify, token);
	if (verify->attached && !range->requested && !range->hashes) {
		g_queue_remove(request_queue(verify, range), range);
		range->urgent = urgent;
		g_queue_push_tail(request_queue(verify, range), range);
		g_cond_broadcast(&verify->changed);
	}
	g_mutex_unlock(&verify->lock);
}

void pr_verify_landed(PrVerify *verify, uint64_t token, guint rail)
{
	g_mutex_lock(&verify->lock);
	gboolean known = g_hash_table_contains(verify->ranges, &token);
	Range *range = find_or_add(verify, token);
	g_assert(!range->landed);
	range->landed = TRUE;
	range->rail = rail;
	verify->n_held += is_held(range);
	if (!known && verify->attached)
		g_queue_push_tail(&verify->bulk, range);
	queue_if_ready(verify, range);
	g_mutex_unlock(&verify->lock);
}

void pr_verify_drop(PrVerify *verify, uint64_t token)
{
	g_mutex_lock(&verify->lock);
	Range *range = g_hash_table_lookup(verify->ranges, &token);
	if (range && !range->landed)
		remove_range(verify, range);
	g_mutex_unlock(&verify->lock);
}

gboolean pr_verify_has_room(PrVerify *verify)
{
	g_mutex_lock(&verify->lock);
	gboolean room = verify->n_held < HELD_MAX;
	g_mutex_unlock(&verify->lock);
	return room;
}

void pr_verify_add_landed(PrVerify *verify, GArray *tokens)
{
	GHashTableIter iter;
	gpointer range;

	g_mutex_lock(&verify->lock);
	g_hash_table_iter_init(&iter, verify->ranges);
	while (g_hash_table_iter_next(&iter, NULL, &range))
		if (((Range *)range)->landed)
			g_array_append_val(tokens, ((Range *)range)->token);
	g_mutex_unlock(&verify->lock);
}

void pr_verify_answer(PrVerify *verify, const PrHashes *hashes)
{
	if (hashes->block >= verify->ram->n_blocks)
		return;
	uint32_t page_size = verify->ram->blocks[hashes->block].page_size;
	uint64_t token = pr_token_pack(hashes->block, hashes->offset / page_size, hashes->n);

	g_mutex_lock(&verify->lock);
	Range *range = g_hash_table_lookup(verify->ranges, &token);
	if (range && range->requested && !range->hashes) {
		verify->n_held -= is_held(range);
		range->hashes = g_memdup2(hashes->hash, hashes->n * sizeof(hashes->hash[0]));
		set_requested(verify, range, FALSE);
		queue_if_ready(verify, range);
	}
	g_mutex_unlock(&verify->lock);
}

/* ---- requesting hashes ---- */

/* The next range whose hashes may be requested, or NULL. With the lock held. */
static Range *next_to_request(PrVerify *verify)
{
	if (!g_queue_is_empty(&verify->urgent))
		return g_queue_pop_head(&verify->urgent);
	return verify->n_requested < REQUESTED_MAX ? g_queue_pop_head(&verify->bulk) : NULL;
}

/* Takes the ranges whose hashes may be requested now. Returns tokens, because a range may be freed
 * at any time. With the lock held. */
static GArray *take_requests(PrVerify *verify)
{
	GArray *tokens = g_array_new(FALSE, FALSE, sizeof(uint64_t));
	Range *range;

	while (verify->attached && (range = next_to_request(verify)) != NULL) {
		set_requested(verify, range, TRUE);
		g_array_append_val(tokens, range->token);
	}
	return tokens;
}

static void request_hashes(PrVerify *verify, const GArray *tokens)
{
	PrWireRange ranges[REQUEST_BATCH];
	guint n = 0, block = 0;

	for (guint i = 0; i < tokens->len; i++) {
		uint64_t page, pages;
		guint index;

		pr_token_unpack(g_array_index(tokens, uint64_t, i), &index, &page, &pages);
		uint64_t page_size = verify->ram->blocks[index].page_size;
		if (n > 0 && (index != block || n == REQUEST_BATCH)) {
			verify->hooks.request_hashes(block, ranges, n, verify->hooks.opaque);
			n = 0;
		}
		block = index;
		ranges[n++] = (PrWireRange){page * page_size, pages * page_size};
	}
	if (n > 0)
		verify->hooks.request_hashes(block, ranges, n, verify->hooks.opaque);
}

/* ---- comparing ---- */

static void place(PrVerify *verify, Range *range, PrRamBlock *block, uint64_t page, uint64_t n)
{
	g_autoptr(GError) error = NULL;
	uint64_t waiters;

	if (!pr_place(verify->ram, verify->uffd, block, page, n, &waiters, &error))
		verify->hooks.broken(error, verify->hooks.opaque);
	range->awaited |= waiters > 0;
	__atomic_fetch_add(&verify->stats.pages, n, __ATOMIC_RELAXED);
}

/* A page is wrong. */
static void reject(PrVerify *verify, const Range *range, guint index, uint64_t page)
{
	uint64_t token = pr_token_pack(index, page, 1);
	guint strikes = 1 + GPOINTER_TO_UINT(g_hash_table_lookup(verify->strikes, &token));
	PrCorrupt corrupt = {index, page, range->rail, strikes};

	__atomic_fetch_add(&verify->stats.corrupt, 1, __ATOMIC_RELAXED);
	/* The next path has as many tries again. */
	if (strikes == PR_VERIFY_STRIKES)
		g_hash_table_remove(verify->strikes, &token);
	else
		g_hash_table_insert(verify->strikes, g_memdup2(&token, sizeof(token)),
				    GUINT_TO_POINTER(strikes));
	verify->hooks.corrupt(&corrupt, verify->hooks.opaque);
}

/* Places the right pages, in runs. Returns the tokens of the wrong ones, whose claims are still
 * held. */
static GArray *compare(PrVerify *verify, Range *range)
{
	GArray *wrong = g_array_new(FALSE, FALSE, sizeof(uint64_t));
	guint index;
	uint64_t page, n, right = 0;

	pr_token_unpack(range->token, &index, &page, &n);
	PrRamBlock *block = &verify->ram->blocks[index];
	for (uint64_t i = 0; i < n; i++) {
		const uint8_t *data = block->host + (page + i) * block->page_size;
		uint64_t token = pr_token_pack(index, page + i, 1);

		if (pr_verify_hash(data, block->page_size) == range->hashes[i]) {
			if (g_hash_table_size(verify->strikes) > 0)
				g_hash_table_remove(verify->strikes, &token);
			right++;
			continue;
		}
		if (right > 0)
			place(verify, range, block, page + i - right, right);
		right = 0;
		reject(verify, range, index, page + i);
		g_array_append_val(wrong, token);
	}
	if (right > 0)
		place(verify, range, block, page + n - right, right);
	return wrong;
}

/* Ends the claim of a wrong page. Nobody has seen its data. It is cleared to zeros, as it was
 * before the READ, because the source may call it zero next (state-memfd.h). */
static void release_wrong(PrVerify *verify, uint64_t token)
{
	guint index;
	uint64_t page, n;

	pr_token_unpack(token, &index, &page, &n);
	const PrRamBlock *block = &verify->ram->blocks[index];
	memset(block->host + page * block->page_size, 0, n * block->page_size);
	pr_ram_forget(verify->ram, token);
}

/* Compares a range. It stays in the table until its pages are placed or released. It has to go
 * then, because the pages may be read again under the same token. TRUE: a fault may wait for one of
 * them. */
static gboolean finish_range(PrVerify *verify, Range *range)
{
	guint index;
	uint64_t page, n;

	pr_token_unpack(range->token, &index, &page, &n);
	PrRamBlock *block = &verify->ram->blocks[index];
	pr_invariant_claimed(block, page, n, "a READ that has landed is verified");
	g_autoptr(GArray) wrong = compare(verify, range);
	gboolean awaited = range->urgent || range->awaited;
	g_mutex_lock(&verify->lock);
	remove_range(verify, range);
	for (guint i = 0; i < wrong->len; i++)
		release_wrong(verify, g_array_index(wrong, uint64_t, i));
	g_mutex_unlock(&verify->lock);
	/* Last: a fault thread that sets a waiting bit from now on sees that the page is received
	 * or free. */
	return pr_ram_take_waiting(block, page, n) > 0 || awaited;
}

/* ---- the thread ---- */

/* With the lock held. */
static gboolean has_work(PrVerify *verify)
{
	return !g_queue_is_empty(&verify->ready) ||
	       (verify->attached &&
		(!g_queue_is_empty(&verify->urgent) ||
		 (!g_queue_is_empty(&verify->bulk) && verify->n_requested < REQUESTED_MAX)));
}

static void work(PrVerify *verify, const GArray *requests, GQueue *ready, gboolean attached)
{
	gboolean awaited = FALSE, any = !g_queue_is_empty(ready);
	Range *range;

	request_hashes(verify, requests);
	while ((range = g_queue_pop_head(ready)) != NULL)
		awaited |= finish_range(verify, range);
	if (awaited)
		verify->hooks.unblocked(verify->hooks.opaque);
	if (any && attached && pr_ram_complete(verify->ram))
		verify->hooks.complete(verify->hooks.opaque);
}

static gpointer verify_thread(gpointer opaque)
{
	PrVerify *verify = opaque;

	g_mutex_lock(&verify->lock);
	while (!verify->stop) {
		if (!has_work(verify)) {
			/* Ended by a READ, by hashes, or by pr_verify_stop(). */
			g_cond_wait(&verify->changed, &verify->lock);
			continue;
		}
		g_autoptr(GArray) requests = take_requests(verify);
		GQueue ready = verify->ready;
		gboolean attached = verify->attached;
		g_queue_init(&verify->ready);
		verify->busy = TRUE;
		g_mutex_unlock(&verify->lock);
		work(verify, requests, &ready, attached);
		g_mutex_lock(&verify->lock);
		verify->busy = FALSE;
		g_cond_broadcast(&verify->changed);
	}
	g_mutex_unlock(&verify->lock);
	return NULL;
}

/* ---- for the owner ---- */

PrVerify *pr_verify_start(PrRam *ram, int uffd, const PrVerifyHooks *hooks, GError **error)
{
	PrVerify *verify = g_new0(PrVerify, 1);

	verify->ram = ram;
	verify->uffd = uffd;
	verify->hooks = *hooks;
	g_mutex_init(&verify->lock);
	g_cond_init(&verify->changed);
	g_queue_init(&verify->urgent);
	g_queue_init(&verify->bulk);
	g_queue_init(&verify->ready);
	verify->ranges = g_hash_table_new_full(g_int64_hash, g_int64_equal, NULL, range_free);
	verify->strikes = g_hash_table_new_full(g_int64_hash, g_int64_equal, g_free, NULL);
	verify->thread = pr_thread_try("verify", verify_thread, verify, error);
	if (!verify->thread)
		g_clear_pointer(&verify, pr_verify_free);
	return verify;
}

void pr_verify_attach(PrVerify *verify)
{
	GHashTableIter iter;
	gpointer opaque;

	g_mutex_lock(&verify->lock);
	verify->attached = TRUE;
	/* The guest may wait for what landed before or while no connection was attached. */
	g_hash_table_iter_init(&iter, verify->ranges);
	while (g_hash_table_iter_next(&iter, NULL, &opaque)) {
		Range *range = opaque;
		if (!range->hashes)
			g_queue_push_tail(request_queue(verify, range), range);
	}
	g_cond_broadcast(&verify->changed);
	g_mutex_unlock(&verify->lock);
}

/* With the lock held. The answers to former requests will not come, and READs that have not landed
 * are lost. */
static gboolean forget_lost(gpointer token, gpointer opaque, gpointer user_data)
{
	Range *range = opaque;

	set_requested(user_data, range, FALSE);
	return !range->landed;
}

void pr_verify_detach(PrVerify *verify)
{
	g_mutex_lock(&verify->lock);
	verify->attached = FALSE;
	/* Ended by the thread's round: the connection that it may be sending on was shut down
	 * before. */
	while (verify->busy)
		g_cond_wait(&verify->changed, &verify->lock);
	g_queue_clear(&verify->urgent);
	g_queue_clear(&verify->bulk);
	g_hash_table_foreach_remove(verify->ranges, forget_lost, verify);
	g_mutex_unlock(&verify->lock);
}

void pr_verify_stop(PrVerify *verify)
{
	if (!verify)
		return;
	g_mutex_lock(&verify->lock);
	verify->stop = TRUE;
	g_cond_broadcast(&verify->changed);
	g_mutex_unlock(&verify->lock);
	g_thread_join(verify->thread);
}

void pr_verify_free(PrVerify *verify)
{
	if (!verify)
		return;
	g_queue_clear(&verify->urgent);
	g_queue_clear(&verify->bulk);
	g_queue_clear(&verify->ready);
	g_hash_table_unref(verify->ranges);
	g_hash_table_unref(verify->strikes);
	g_mutex_clear(&verify->lock);
	g_cond_clear(&verify->changed);
	g_free(verify);
}

void pr_verify_stats(PrVerify *verify, PrVerifyStats *ret)
{
	ret->pages = __atomic_load_n(&verify->stats.pages, __ATOMIC_RELAXED);
	ret->corrupt = __atomic_load_n(&verify->stats.corrupt, __ATOMIC_RELAXED);
}
