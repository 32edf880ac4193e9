/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Theory of operation
 *
 * With capability `verify` on both sides no page is placed before its hash was compared with that of the source's page,
 * so that whatever a path does to the data in between, the guest never sees it.
 *
 * Whoever posts a READ says so (pr_verify_want), and this thread asks the source for the hashes of its pages, at once for
 * faults: the two are under way at the same time. When the data is there (pr_verify_landed), its claim is ours; when both are
 * there the pages are compared here, and those that are right are placed and exposed as ever. The claim of a wrong one is
 * given up: whoever wants the page, a fault or the bulk pull, reads it again. The same page wrong PR_VERIFY_STRIKES times
 * fails the path.
 *
 * A hash is of a page, and the source answers from its frozen RAM without
 * keeping anything. So after a recovery hashes are simply asked for again; data that had landed before is kept, and
 * its claim with it (pr_verify_add_landed), as only the hashes are missing. What has not landed is forgotten at the
 * detach, because its path is gone; but a stripe's may still land later, and is asked for then.
 *
 * The answers come through the control channel's reader (pr_control_set_early): the thread that takes the other messages
 * may be waiting for the guest to load its device state, and the guest for a page.
 *
 * Bulk ranges are asked for a few at a time, so that a fault's question finds no long queue at the source; and bulk READs
 * pause while much waits for its hashes, so that a fault on a page that has landed does not wait for long.
 *
 * Zero pages and holes do not travel, and are not verified. The source may still call a page zero that was read and came in
 * wrong; so a wrong page is emptied before its claim is given up.
 */
#include "migration/postcopy/verify.h"

#include <string.h>
#include <xxhash.h>

#include "migration/memory/bitmap.h"
#include "migration/memory/invariants.h"
#include "migration/postcopy/place.h"
#include "util/try-alloc.h"

#define ASKED_MAX 8  /* bulk ranges whose hashes are under way */
#define HELD_MAX  32 /* landed bulk ranges that may wait for their hashes before bulk READs pause */
#define ASK_BATCH 64 /* ranges in one question */

typedef struct Range {
	uint64_t token;
	guint stripe;
	gboolean urgent;
	gboolean asked;
	gboolean landed;
	uint64_t *hashes; /* NULL: not yet known */
	gboolean awaited; /* the verify thread's own: a fault waited for a page that was placed */
} Range;

struct PrVerify {
	PrRam *ram;
	int uffd;
	PrVerifyHooks hooks;
	GThread *thread;

	GMutex lock; /* protects what follows; taken last */
	GCond changed;
	GHashTable *ranges;    /* token -> Range: posted and not yet done with */
	GQueue urgent, bulk;   /* Range: to be asked for */
	GQueue ready;	       /* Range: landed, with hashes */
	guint n_asked, n_held; /* of the bulk */
	gboolean attached, stop;
	gboolean busy; /* the thread may be using the connection */

	GHashTable *strikes; /* token of a page -> how often it came in wrong; the thread's own */

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

static void note_asked(PrVerify *verify, Range *range, gboolean asked)
{
	if (range->asked == asked)
		return;
	range->asked = asked;
	if (!range->urgent)
		verify->n_asked += asked ? 1 : -1;
}

static gboolean is_held(const Range *range)
{
	return range->landed && !range->hashes && !range->urgent;
}

static GQueue *question_queue(PrVerify *verify, const Range *range)
{
	return range->urgent ? &verify->urgent : &verify->bulk;
}

static void remove_range(PrVerify *verify, Range *range)
{
	g_queue_remove(question_queue(verify, range), range);
	note_asked(verify, range, FALSE);
	verify->n_held -= is_held(range);
	g_hash_table_remove(verify->ranges, &range->token);
}

static void settle_if_ready(PrVerify *verify, Range *range)
{
	if (range->landed && range->hashes)
		g_queue_push_tail(&verify->ready, range);
	g_cond_broadcast(&verify->changed);
}

/* ---- the lanes' side ---- */

void pr_verify_want(PrVerify *verify, uint64_t token, gboolean urgent)
{
	g_mutex_lock(&verify->lock);
	Range *range = find_or_add(verify, token);
	if (verify->attached && !range->asked && !range->hashes) {
		g_queue_remove(question_queue(verify, range), range);
		range->urgent = urgent;
		g_queue_push_tail(question_queue(verify, range), range);
		g_cond_broadcast(&verify->changed);
	}
	g_mutex_unlock(&verify->lock);
}

void pr_verify_landed(PrVerify *verify, uint64_t token, guint stripe)
{
	g_mutex_lock(&verify->lock);
	gboolean known = g_hash_table_contains(verify->ranges, &token);
	Range *range = find_or_add(verify, token);
	g_assert(!range->landed);
	range->landed = TRUE;
	range->stripe = stripe;
	verify->n_held += is_held(range);
	if (!known && verify->attached)
		g_queue_push_tail(&verify->bulk, range);
	settle_if_ready(verify, range);
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
	if (range && range->asked && !range->hashes) {
		verify->n_held -= is_held(range);
		range->hashes = g_memdup2(hashes->hash, hashes->n * sizeof(hashes->hash[0]));
		note_asked(verify, range, FALSE);
		settle_if_ready(verify, range);
	}
	g_mutex_unlock(&verify->lock);
}

/* ---- asking ---- */

/* The next range to be asked for. With the lock held. */
static Range *next_question(PrVerify *verify)
{
	if (!g_queue_is_empty(&verify->urgent))
		return g_queue_pop_head(&verify->urgent);
	return verify->n_asked < ASKED_MAX ? g_queue_pop_head(&verify->bulk) : NULL;
}

/* Takes what may be asked for now; tokens, because a range may go at any time. With the lock held. */
static GArray *take_questions(PrVerify *verify)
{
	GArray *tokens = g_array_new(FALSE, FALSE, sizeof(uint64_t));
	Range *range;

	while (verify->attached && (range = next_question(verify)) != NULL) {
		note_asked(verify, range, TRUE);
		g_array_append_val(tokens, range->token);
	}
	return tokens;
}

static void ask(PrVerify *verify, const GArray *tokens)
{
	PrWireRange ranges[ASK_BATCH];
	guint n = 0, block = 0;

	for (guint i = 0; i < tokens->len; i++) {
		uint64_t page, pages;
		guint index;

		pr_token_unpack(g_array_index(tokens, uint64_t, i), &index, &page, &pages);
		uint64_t page_size = verify->ram->blocks[index].page_size;
		if (n > 0 && (index != block || n == ASK_BATCH)) {
			verify->hooks.ask(block, ranges, n, verify->hooks.opaque);
			n = 0;
		}
		block = index;
		ranges[n++] = (PrWireRange){page * page_size, pages * page_size};
	}
	if (n > 0)
		verify->hooks.ask(block, ranges, n, verify->hooks.opaque);
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

static void reject(PrVerify *verify, const Range *range, guint index, uint64_t page)
{
	uint64_t token = pr_token_pack(index, page, 1);
	guint strikes = 1 + GPOINTER_TO_UINT(g_hash_table_lookup(verify->strikes, &token));
	PrCorrupt corrupt = {index, page, range->stripe, strikes};

	__atomic_fetch_add(&verify->stats.corrupt, 1, __ATOMIC_RELAXED);
	/* The next path has as many tries. */
	if (strikes == PR_VERIFY_STRIKES)
		g_hash_table_remove(verify->strikes, &token);
	else
		g_hash_table_insert(verify->strikes, g_memdup2(&token, sizeof(token)),
				    GUINT_TO_POINTER(strikes));
	verify->hooks.corrupt(&corrupt, verify->hooks.opaque);
}

/* Places what is right, in runs. Returns the tokens of the wrong pages, whose claims are still ours. */
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

/* Nobody has seen it. It is zeros again, as before it was read: it may be marked so next (state-memfd.h). */
static void give_up(PrVerify *verify, uint64_t token)
{
	guint index;
	uint64_t page, n;

	pr_token_unpack(token, &index, &page, &n);
	const PrRamBlock *block = &verify->ram->blocks[index];
	memset(block->host + page * block->page_size, 0, n * block->page_size);
	pr_ram_forget(verify->ram, token);
}

/* The range stays in the table, as landed, until its pages are placed or given up; not longer, because then they may be
 * read again, and wanted under the same token. TRUE: a fault may be waiting. */
static gboolean finish_range(PrVerify *verify, Range *range)
{
	guint index;
	uint64_t page, n;

	pr_token_unpack(range->token, &index, &page, &n);
	PrRamBlock *block = &verify->ram->blocks[index];
	pr_invariant_claimed(block, page, n, "what is verified has landed");
	g_autoptr(GArray) wrong = compare(verify, range);
	gboolean awaited = range->urgent || range->awaited;
	g_mutex_lock(&verify->lock);
	remove_range(verify, range);
	for (guint i = 0; i < wrong->len; i++)
		give_up(verify, g_array_index(wrong, uint64_t, i));
	g_mutex_unlock(&verify->lock);
	/* After the placing: whoever begins to wait now sees that they are received, or free. */
	return pr_ram_take_waiting(block, page, n) > 0 || awaited;
}

/* ---- the thread ---- */

/* With the lock held. */
static gboolean has_work(PrVerify *verify)
{
	return !g_queue_is_empty(&verify->ready) ||
	       (verify->attached &&
		(!g_queue_is_empty(&verify->urgent) ||
		 (!g_queue_is_empty(&verify->bulk) && verify->n_asked < ASKED_MAX)));
}

static void work(PrVerify *verify, const GArray *questions, GQueue *ready, gboolean attached)
{
	gboolean awaited = FALSE, any = !g_queue_is_empty(ready);
	Range *range;

	ask(verify, questions);
	while ((range = g_queue_pop_head(ready)) != NULL)
		awaited |= finish_range(verify, range);
	if (awaited)
		verify->hooks.settled(verify->hooks.opaque);
	if (any && attached && pr_ram_complete(verify->ram))
		verify->hooks.complete(verify->hooks.opaque);
}

static gpointer verify_thread(gpointer opaque)
{
	PrVerify *verify = opaque;

	g_mutex_lock(&verify->lock);
	while (!verify->stop) {
		if (!has_work(verify)) {
			/* Ended by a READ, by hashes, or by the end of the service. */
			g_cond_wait(&verify->changed, &verify->lock);
			continue;
		}
		g_autoptr(GArray) questions = take_questions(verify);
		GQueue ready = verify->ready;
		gboolean attached = verify->attached;
		g_queue_init(&verify->ready);
		verify->busy = TRUE;
		g_mutex_unlock(&verify->lock);
		work(verify, questions, &ready, attached);
		g_mutex_lock(&verify->lock);
		verify->busy = FALSE;
		g_cond_broadcast(&verify->changed);
	}
	g_mutex_unlock(&verify->lock);
	return NULL;
}

/* ---- the owner's side ---- */

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
	/* What has landed in between, or before: the guest may wait for it. */
	g_hash_table_iter_init(&iter, verify->ranges);
	while (g_hash_table_iter_next(&iter, NULL, &opaque)) {
		Range *range = opaque;
		if (!range->hashes)
			g_queue_push_tail(question_queue(verify, range), range);
	}
	g_cond_broadcast(&verify->changed);
	g_mutex_unlock(&verify->lock);
}

/* With the lock held. Nothing that was asked is going to be answered, and what has not landed will not. */
static gboolean forget_lost(gpointer token, gpointer opaque, gpointer user_data)
{
	Range *range = opaque;

	note_asked(user_data, range, FALSE);
	return !range->landed;
}

void pr_verify_detach(PrVerify *verify)
{
	g_mutex_lock(&verify->lock);
	verify->attached = FALSE;
	/* Ended by its round; the connection that it may ask over was shut down before. */
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
