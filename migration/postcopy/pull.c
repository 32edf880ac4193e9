/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Theory of operation
 *
 * Goal: every page that no fault asks for comes in as fast as the rails carry, and no fault waits
 * long because of it.
 *
 * Threads. One thread pulls over the path in use: the first. Another thread pulls over each standby
 * that is a rail. A thread keeps a window of READs in flight on its path's bulk lane. Each READ
 * covers neighbouring pages that are neither received nor claimed. How many READs are in flight,
 * and how long each is, follows what the rail carries (bulk-window.h), within bulk-window and
 * bulk-read-size.
 *
 * The walk. All threads share one walk through the blocks, from the beginning and around. So each
 * rail takes as much as it can carry, and no page is planned for a rail that may die. A fault
 * thread leaves a hint, the page that it read last. The walk then goes on behind that page, because
 * guests touch neighbours next.
 *
 * One thread at a time decides what to read next, under PrPull.lock. Otherwise two threads would
 * claim the pages of one run in turns, and read them in many short READs. The same lock lets
 * max-postcopy-bandwidth limit all pull threads together. It limits what is posted here, and
 * nothing else.
 *
 * Faults. A fault on a page that a bulk READ covers waits for that READ. So the bytes that one
 * thread has in flight bound that wait; if the READ's path dies, the fault waits until that path is
 * fenced. While fault threads read a huge page, which may use all of the path, the first thread
 * posts nothing. When a bulk READ has landed, its pages are placed by one call, and if a fault
 * waits for one of them, the fault threads are notified (place.h).
 *
 * Claims. The claim of a READ is in its thread's list from before it is posted until its pages are
 * placed. The claim of a lost READ stays in the list, because its data may still land. When the
 * READ's path is fenced, exactly these claims are ended:
 *  - The path of a standby has died: pr_pull_reclaim_rail(). All other paths have gone on; they
 *    claim the pages again.
 *  - The path in use was lost: pr_pull_reclaim_inflight() ends the claims of the first thread and
 *    of the fault threads, and leaves those of the other rails. The paths of these are alive, so
 *    their READs may land at any time.
 * While no path is in use the other rails post nothing. What they have posted lands as ever: the
 * page is claimed, so nobody else reads it or marks it zero. If it lands after the received bitmap
 * was sent to the source, the source does not know of that page, which is harmless.
 *
 * Not handled here: which standbys pull (destination/rails.c), and fencing.
 */
#include "migration/postcopy/pull.h"

#include <poll.h>
#include <unistd.h>

#include "migration/postcopy/allocate.h"
#include "migration/memory/bitmap.h"
#include "migration/memory/invariants.h"
#include "migration/postcopy/place.h"
#include "migration/postcopy/verify.h"
#include "migration/postcopy/bulk-window.h"
#include "migration/postcopy/worker.h"

#define BATCH		 32
#define PROGRESS_US	 (100 * 1000)
#define LIMITER_BURST_US (20 * 1000)

typedef struct PrPullThread PrPullThread;

typedef struct Claim {
	uint64_t token;
	gint64 posted_us;
} Claim;

struct PrPull {
	PrRam *ram;
	int uffd;
	const PrParams *params;
	PrFaultService *faults;
	PrPullHooks hooks;
	PrPullThread *first; /* over the path in use; set before a rail is added */

	int refs; /* atomic */

	GMutex lock;	    /* protects what follows; taken last */
	GCond idle;	    /* the last READ of a thread has completed */
	GPtrArray *threads; /* PrPullThread*; changed by callers who come one at a time (pull.h) */
	const PrTransportOps *kind; /* of the path in use; NULL: no path is in use */
	guint last_id;
	guint block; /* where the walk is, with page */
	uint64_t page;
	uint64_t hint;	   /* the last hint that the walk has followed */
	uint64_t rate;	   /* limit, bytes/s; 0: no limit */
	gint64 allowed_us; /* when the limit allows the next READ */
	gboolean broken;   /* the hook was called */
};

struct PrPullThread {
	PrPull *pull;
	guint id;	 /* constant; 0: the first thread */
	uint64_t *bytes; /* atomic: counts what the rail has pulled; NULL for the first thread */
	PrWorker worker;

	/* PrPull.lock; only the thread writes them, and it reads them without the lock */
	guint outstanding; /* READs on the current path */
	GArray *claims;	   /* Claim: READs whose pages are not placed */
	PrBulkWindow window;
	gboolean starved; /* the window was not full, for lack of READs to post */
	gint64 moved_us;  /* time of the last completion, or of the first READ after an idle time */

	/* PrPull.lock */
	gboolean draining; /* it must not post any more */
	gboolean ended;	   /* the thread has ended; its claims remain */

	/* the thread's own */
	gboolean path_dead; /* the path has refused a READ; it is about to be detached */
	gint64 allowed_us;  /* copy of PrPull.allowed_us */
	gint64 reported_us; /* when the progress hook was called last */
	PrWatch *watch;
};

static const PrWatchPoint pulling = {"pulling pages", 500};

/* Whether the thread pulls over the path in use, not over a standby. */
static gboolean is_first(const PrPullThread *self)
{
	return self->id == 0;
}

static void note_broken(PrPull *pull, const GError *error)
{
	g_mutex_lock(&pull->lock);
	gboolean first = !pull->broken;
	pull->broken = TRUE;
	g_mutex_unlock(&pull->lock);
	if (first)
		pull->hooks.broken(error, pull->hooks.opaque);
}

/* A READ has landed. */
static void handle_landed(PrPullThread *self, uint64_t token)
{
	PrPull *pull = self->pull;
	g_autoptr(GError) error = NULL;
	guint index;
	uint64_t page, n, waiters;

	pr_token_unpack(token, &index, &page, &n);
	PrRamBlock *block = &pull->ram->blocks[index];
	if (self->bytes)
		__atomic_fetch_add(self->bytes, n * block->page_size, __ATOMIC_RELAXED);
	pr_place_landed(block, page, n, "a bulk READ has landed");
	if (pull->ram->verify) {
		pr_verify_landed(pull->ram->verify, token, self->id);
		return;
	}
	if (!pr_place(pull->ram, pull->uffd, block, page, n, &waiters, &error))
		note_broken(pull, error);
	if (waiters > 0)
		pr_fault_notify(pull->faults);
}

/* With the lock held. FALSE: the thread has no such claim any more. */
static gboolean drop_claim(PrPullThread *self, uint64_t token, gint64 *ret_posted_us)
{
	for (guint i = 0; i < self->claims->len; i++) {
		Claim claim = g_array_index(self->claims, Claim, i);

		if (claim.token != token)
			continue;
		g_array_remove_index_fast(self->claims, i);
		*ret_posted_us = claim.posted_us;
		return TRUE;
	}
	return FALSE;
}

/* How many READs may be in flight. */
static guint max_window(const PrPullThread *self)
{
	PrDataPath *path = self->worker.current;

	return MIN((guint)pr_param(self->pull->params, PR_PARAM_BULK_WINDOW),
		   path->ops->max_reads(path, PR_LANE_BULK));
}

/* The pages of a READ are placed. With the lock held. */
static void note_read(PrPullThread *self, uint64_t token, gint64 now)
{
	uint64_t page, n, most = pr_param(self->pull->params, PR_PARAM_BULK_READ_SIZE);
	gint64 posted;
	guint index;

	if (!drop_claim(self, token, &posted))
		return;
	pr_token_unpack(token, &index, &page, &n);
	pr_bulk_window_completed(&self->window, n * self->pull->ram->blocks[index].page_size,
				 now - posted, most, max_window(self), now);
}

/* n READs are no longer in flight. */
static void account(PrPullThread *self, const PrCompletion *done, guint n)
{
	PrPull *pull = self->pull;
	gint64 now = g_get_monotonic_time();

	g_mutex_lock(&pull->lock);
	for (guint i = 0; i < n; i++)
		if (done[i].ok)
			note_read(self, done[i].token, now);
	self->outstanding -= n;
	self->moved_us = now;
	if (self->outstanding == 0)
		g_cond_broadcast(&pull->idle);
	g_mutex_unlock(&pull->lock);
}

/* Every page is received. Only the first thread may call the hook: the hook needs the connection in
 * use, which stays alive until this thread is detached. */
static void report_complete(PrPullThread *self)
{
	PrPull *pull = self->pull;

	if (!is_first(self))
		pr_worker_kick(&pull->first->worker);
	else if (self->worker.current)
		pull->hooks.complete(pull->hooks.opaque);
}

static guint poll_completions(PrPullThread *self)
{
	PrCompletion done[BATCH];
	PrDataPath *path = self->worker.current;

	if (self->outstanding == 0)
		return 0;
	guint n = path->ops->poll(path, PR_LANE_BULK, done, BATCH);
	for (guint i = 0; i < n; i++)
		if (done[i].ok)
			handle_landed(self, done[i].token);
	if (n > 0)
		account(self, done, n);
	if (n > 0 && pr_ram_complete(self->pull->ram))
		report_complete(self);
	return n;
}

/* ---- what to read next: with the lock held ---- */

static void follow_hint(PrPull *pull)
{
	uint64_t n, hint = __atomic_load_n(&pull->ram->pull_hint, __ATOMIC_RELAXED);

	if (hint == pull->hint)
		return;
	pull->hint = hint;
	pr_token_unpack(hint, &pull->block, &pull->page, &n);
}

/* Claims the next run of pages, and walks around all blocks once for it. 0: no page is left to
 * claim. */
static uint64_t claim_next(const PrPullThread *self)
{
	PrPull *pull = self->pull;
	uint64_t bytes =
		MIN(pr_param(pull->params, PR_PARAM_BULK_READ_SIZE), self->window.read_bytes);

	follow_hint(pull);
	for (guint tried = 0; tried <= pull->ram->n_blocks; tried++) {
		PrRamBlock *block = &pull->ram->blocks[pull->block];
		uint64_t max = MAX(1, bytes / block->page_size);
		uint64_t page, n = pr_ram_claim_run(block, pull->page, max, &page);
		if (n > 0) {
			pull->page = page + n;
			return pr_token_pack(pull->block, page, n);
		}
		pull->block = (pull->block + 1) % pull->ram->n_blocks;
		pull->page = 0;
	}
	return 0;
}

/* A changed rate counts from now on; a delay that the old rate has caused is dropped. */
static void follow_rate(PrPull *pull, gint64 now)
{
	uint64_t rate = pr_param(pull->params, PR_PARAM_MAX_POSTCOPY_BANDWIDTH);

	if (rate == pull->rate)
		return;
	pull->rate = rate;
	pull->allowed_us = now;
}

static void charge_limiter(PrPull *pull, uint64_t bytes, gint64 now)
{
	if (pull->rate == 0)
		return;
	pull->allowed_us = MAX(pull->allowed_us, now - LIMITER_BURST_US) +
			   (gint64)((double)bytes * G_USEC_PER_SEC / (double)pull->rate);
}

/* Whether a path of this transport may be a rail now. With the lock held. */
static gboolean wants_rail(const PrPull *pull, const PrTransportOps *ops)
{
	return pull->kind == ops && pr_capability(pull->params, PR_CAP_MULTI_RAIL);
}

static gboolean may_post(const PrPullThread *self, gint64 now)
{
	const PrPull *pull = self->pull;
	PrDataPath *path = self->worker.current;

	if (!is_first(self) && (self->draining || !wants_rail(pull, path->ops)))
		return FALSE;
	if (pull->ram->verify && !pr_verify_has_room(pull->ram->verify))
		return FALSE;
	if (is_first(self) && __atomic_load_n(&pull->ram->huge_reads, __ATOMIC_SEQ_CST) > 0)
		return FALSE;
	return !self->path_dead && now >= pull->allowed_us &&
	       self->outstanding < MIN(self->window.reads, max_window(self));
}

/* ---- the thread ---- */

/* Returns the token of the next READ, which counts as outstanding from now on. 0: no READ may be
 * posted, or no page is left to claim. */
static uint64_t next_read(PrPullThread *self, gint64 now)
{
	PrPull *pull = self->pull;
	uint64_t page, n, token = 0;
	guint index;

	g_mutex_lock(&pull->lock);
	follow_rate(pull, now);
	if (may_post(self, now))
		token = claim_next(self);
	/* The window is not full, so what completes now says nothing about the rail. */
	if (!token && self->outstanding < MIN(self->window.reads, max_window(self)))
		self->starved = TRUE;
	if (token) {
		if (self->starved)
			pr_bulk_window_resume(&self->window, now);
		self->starved = FALSE;
		pr_token_unpack(token, &index, &page, &n);
		charge_limiter(pull, n * pull->ram->blocks[index].page_size, now);
		g_array_append_val(self->claims, ((Claim){token, now}));
		if (self->outstanding++ == 0)
			self->moved_us = now;
	}
	self->allowed_us = pull->allowed_us;
	g_mutex_unlock(&pull->lock);
	return token;
}

/* FALSE: the path has refused the READ; its claim stays until the path is fenced. */
static gboolean post(PrPullThread *self, uint64_t token)
{
	PrDataPath *path = self->worker.current;
	uint64_t page, n;
	guint index;

	pr_token_unpack(token, &index, &page, &n);
	uint32_t page_size = self->pull->ram->blocks[index].page_size;
	pr_invariant_claimed(&self->pull->ram->blocks[index], page, n, "a bulk READ is posted");
	if (!pr_allocate(self->pull->ram->allocate, index, page, n, /* bulk= */ TRUE))
		return FALSE;
	if (self->pull->ram->verify)
		pr_verify_posted(self->pull->ram->verify, token, /* urgent= */ FALSE);
	return path->ops->post_read(path, PR_LANE_BULK, index, page * page_size,
				    (uint32_t)(n * page_size), token);
}

static guint fill_window(PrPullThread *self, gint64 now)
{
	guint posted = 0;
	uint64_t token;

	while ((token = next_read(self, now)) != 0) {
		if (post(self, token)) {
			posted++;
			continue;
		}
		self->path_dead = TRUE;
		account(self, &(PrCompletion){.token = token, .ok = FALSE}, 1);
	}
	return posted;
}

static void report_progress(PrPullThread *self, gint64 now)
{
	if (now - self->reported_us < PROGRESS_US)
		return;
	self->reported_us = now;
	if (is_first(self))
		self->pull->hooks.progress(self->pull->hooks.opaque);
}

static int sleep_ms(const PrPullThread *self, gint64 now)
{
	if (!self->worker.current)
		return -1;
	if (self->pull->ram->verify && !pr_verify_has_room(self->pull->ram->verify))
		return 1;
	gint64 until = self->reported_us + PROGRESS_US;
	if (self->allowed_us > now)
		until = MIN(until, self->allowed_us);
	return (int)CLAMP((until - now + 999) / 1000, 1, 1000);
}

static void sleep_until_event(PrPullThread *self, gint64 now)
{
	PrDataPath *path = self->worker.current;
	struct pollfd fds[2] = {
		{.fd = pr_waker_fd(&self->worker.waker), .events = POLLIN},
		{.fd = -1, .events = POLLIN},
	};

	if (path && !self->path_dead) {
		fds[1].fd = path->ops->wait_fd(path, PR_LANE_BULK);
		if (!path->ops->arm(path, PR_LANE_BULK))
			return;
	}
	pr_watch_idle(self->watch);
	poll(fds, G_N_ELEMENTS(fds), sleep_ms(self, now));
}

/* FALSE: the thread has to end. */
static gboolean apply_commands(PrPullThread *self)
{
	gboolean switched;
	gboolean go_on = pr_worker_apply(&self->worker, &switched);

	if (switched) {
		g_mutex_lock(&self->pull->lock);
		self->outstanding = 0;
		pr_bulk_window_init(&self->window, g_get_monotonic_time());
		g_mutex_unlock(&self->pull->lock);
		self->path_dead = FALSE;
	}
	/* A rail that has placed the last page kicks this thread. */
	if (is_first(self) && pr_ram_complete(self->pull->ram))
		report_complete(self);
	return go_on;
}

static gpointer pull_thread(gpointer opaque)
{
	PrPullThread *self = opaque;
	g_autoptr(PrWatch) watch =
		pr_watch_new(self->pull->hooks.watchdog, is_first(self) ? "pull" : "rail");

	self->watch = watch;
	for (;;) {
		gint64 now = g_get_monotonic_time();
		pr_watch_enter_at(watch, &pulling, now);
		if (pr_worker_was_kicked(&self->worker) && !apply_commands(self))
			return NULL;
		guint work = 0;
		if (self->worker.current) {
			work = poll_completions(self);
			work += fill_window(self, now);
			report_progress(self, now);
		}
		if (work == 0)
			sleep_until_event(self, now);
	}
}

static void thread_free(gpointer opaque)
{
	PrPullThread *self = opaque;

	g_array_unref(self->claims);
	g_free(self);
}

static PrPullThread *thread_new(PrPull *pull, guint id, uint64_t *bytes, GError **error)
{
	PrPullThread *self = g_new0(PrPullThread, 1);

	self->pull = pull;
	self->id = id;
	self->bytes = bytes;
	self->claims = g_array_new(FALSE, FALSE, sizeof(Claim));
	if (!pr_worker_start(&self->worker, id == 0 ? "pull" : "rail", pull_thread, self, error)) {
		thread_free(self);
		return NULL;
	}
	/* From now on other threads may kick it. */
	g_mutex_lock(&pull->lock);
	g_ptr_array_add(pull->threads, self);
	g_mutex_unlock(&pull->lock);
	return self;
}

/* Ends the thread and keeps its claims. */
static void end_thread(PrPullThread *self)
{
	g_mutex_lock(&self->pull->lock);
	gboolean already = self->ended;
	self->ended = TRUE; /* kick_all() leaves it out from now on */
	g_mutex_unlock(&self->pull->lock);
	if (!already)
		pr_worker_stop(&self->worker);
}

PrPull *pr_pull_start(PrRam *ram, int uffd, const PrParams *params, PrFaultService *faults,
		      const PrPullHooks *hooks, GError **error)
{
	PrPull *pull = g_new0(PrPull, 1);

	pull->refs = 1;
	pull->ram = ram;
	pull->uffd = uffd;
	pull->params = params;
	pull->faults = faults;
	pull->hooks = *hooks;
	g_mutex_init(&pull->lock);
	g_cond_init(&pull->idle);
	pull->threads = g_ptr_array_new_with_free_func(thread_free);
	pull->first = thread_new(pull, 0, NULL, error);
	if (pull->first)
		return pull;
	pr_pull_unref(pull);
	return NULL;
}

/* With the lock held. */
static void kick_all(PrPull *pull)
{
	for (guint i = 0; i < pull->threads->len; i++) {
		PrPullThread *self = pull->threads->pdata[i];
		if (!self->ended)
			pr_worker_kick(&self->worker);
	}
}

static void set_kind(PrPull *pull, const PrTransportOps *kind)
{
	g_mutex_lock(&pull->lock);
	pull->kind = kind;
	kick_all(pull);
	g_mutex_unlock(&pull->lock);
}

void pr_pull_attach(PrPull *pull, PrDataPath *path)
{
	pr_allocate_walk(pull->ram->allocate);
	pr_worker_set_path(&pull->first->worker, path);
	set_kind(pull, path->ops);
}

void pr_pull_detach(PrPull *pull)
{
	set_kind(pull, NULL);
	pr_worker_set_path(&pull->first->worker, NULL);
}

void pr_pull_notify(PrPull *pull)
{
	g_mutex_lock(&pull->lock);
	kick_all(pull);
	g_mutex_unlock(&pull->lock);
}

void pr_pull_reclaim_inflight(PrPull *pull)
{
	g_autoptr(GArray) kept = g_array_new(FALSE, FALSE, sizeof(uint64_t));

	/* Under the lock no rail adds or drops a claim. */
	g_mutex_lock(&pull->lock);
	g_array_set_size(pull->first->claims, 0);
	for (guint i = 1; i < pull->threads->len; i++) {
		const GArray *claims = ((PrPullThread *)pull->threads->pdata[i])->claims;
		for (guint j = 0; j < claims->len; j++)
			g_array_append_val(kept, g_array_index(claims, Claim, j).token);
	}
	if (pull->ram->verify)
		pr_verify_add_landed(pull->ram->verify, kept);
	pr_ram_forget_inflight(pull->ram, (const uint64_t *)kept->data, kept->len);
	g_mutex_unlock(&pull->lock);
}

void pr_pull_stop(PrPull *pull)
{
	if (!pull)
		return;
	/* The first thread ends last, because the rails kick it. */
	for (guint i = pull->threads->len; i > 0; i--)
		end_thread(pull->threads->pdata[i - 1]);
	/* pr_pull_drain_rail() may still wait for a rail, and has to find that it is gone. */
	g_mutex_lock(&pull->lock);
	g_ptr_array_set_size(pull->threads, 0);
	g_cond_broadcast(&pull->idle);
	g_mutex_unlock(&pull->lock);
	pr_pull_unref(pull);
}

PrPull *pr_pull_ref(PrPull *pull)
{
	__atomic_fetch_add(&pull->refs, 1, __ATOMIC_RELAXED);
	return pull;
}

void pr_pull_unref(PrPull *pull)
{
	if (!pull || __atomic_sub_fetch(&pull->refs, 1, __ATOMIC_ACQ_REL) > 0)
		return;
	g_ptr_array_unref(pull->threads);
	g_mutex_clear(&pull->lock);
	g_cond_clear(&pull->idle);
	g_free(pull);
}

/* ---- rails ---- */

static PrPullThread *find_rail(PrPull *pull, guint id)
{
	for (guint i = 1; i < pull->threads->len; i++) {
		PrPullThread *self = pull->threads->pdata[i];
		if (self->id == id)
			return self;
	}
	return NULL;
}

gboolean pr_pull_wants_rail(PrPull *pull, PrDataPath *path)
{
	g_mutex_lock(&pull->lock);
	gboolean wanted = wants_rail(pull, path->ops);
	g_mutex_unlock(&pull->lock);
	return wanted;
}

guint pr_pull_add_rail(PrPull *pull, PrDataPath *path, uint64_t *bytes, GError **error)
{
	PrPullThread *self = thread_new(pull, ++pull->last_id, bytes, error);

	if (!self)
		return 0;
	pr_worker_set_path(&self->worker, path);
	return self->id;
}

gboolean pr_pull_rail_moves(PrPull *pull, guint id, gint64 within_us)
{
	PrPullThread *self = find_rail(pull, id);

	if (!self)
		return TRUE;
	g_mutex_lock(&pull->lock);
	gboolean moves =
		self->outstanding == 0 || g_get_monotonic_time() - self->moved_us <= within_us;
	g_mutex_unlock(&pull->lock);
	return moves;
}

gboolean pr_pull_drain_rail(PrPull *pull, guint id, gint64 deadline)
{
	PrPullThread *self;
	gboolean in_time = TRUE;

	g_mutex_lock(&pull->lock);
	/* The rail may be removed during each wait. */
	while ((self = find_rail(pull, id)) != NULL) {
		self->draining = TRUE;
		if (self->outstanding == 0 || !in_time)
			break;
		in_time = g_cond_wait_until(&pull->idle, &pull->lock, deadline);
	}
	gboolean at_rest = !self || (self->outstanding == 0 && self->claims->len == 0);
	g_mutex_unlock(&pull->lock);
	return at_rest;
}

void pr_pull_end_rail(PrPull *pull, guint id)
{
	PrPullThread *self = find_rail(pull, id);

	if (self)
		end_thread(self);
}

void pr_pull_reclaim_rail(PrPull *pull, guint id)
{
	PrPullThread *self = find_rail(pull, id);

	if (!self)
		return;
	g_mutex_lock(&pull->lock);
	for (guint i = 0; i < self->claims->len; i++) {
		uint64_t token = g_array_index(self->claims, Claim, i).token;

		if (pull->ram->verify)
			pr_verify_drop(pull->ram->verify, token);
		pr_ram_forget(pull->ram, token);
	}
	g_ptr_array_remove(pull->threads, self);
	kick_all(pull);
	g_mutex_unlock(&pull->lock);
	pr_fault_notify(pull->faults);
}
