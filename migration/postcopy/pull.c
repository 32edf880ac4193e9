/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Theory of operation
 *
 * One thread for each path that pulls: the first over the path in use, another one (a stripe) for each
 * standby that pulls along. A thread keeps a window of READs outstanding on its path's bulk lane, each of so many
 * bytes as the window says (bulk-window.h), up to bulk-read-size, of neighbouring pages that are neither in place nor covered by another READ. All
 * share one walk through the blocks, from the beginning and around: so each rail takes as much as it can
 * carry, and no page is planned for a rail that may die. When a fault thread leaves a hint (the page it read
 * last) the walk goes on right behind it, because guests touch neighbours next.
 *
 * What to read next is decided by one thread at a time, under PrPull.lock: else two would claim the pages of one
 * run by turns and read them in crumbs. The same lock makes max-postcopy-bandwidth, which limits what is posted
 * here and nothing else, a limit of all threads together.
 *
 * A fault on a page that one of our READs covers waits for that READ, so read size times window of one thread
 * bounds what a fault can wait for; if the READ's path dies, until that path is fenced. The first thread rests while the fault
 * threads read a huge page, which can use all of the path. The window follows what
 * the rail carries (bulk-window.h), up to bulk-window.
 *
 * When a READ is in: the pages are marked received, exposed in one call, and if a fault waits in
 * their midst the fault threads are told (fault.c).
 *
 * Every READ's claim is in its thread's list from before it is posted until its data is in place. A READ that is
 * lost leaves its claim there, because data may still land. Once the path is fenced exactly these are forgotten:
 *  - a standby's that died: pr_pull_reclaim_rail(). The others have gone on meanwhile, and now they, or the
 *    fault threads, claim the pages again.
 *  - those of the path in use, and the fault threads': pr_pull_reclaim_inflight(), which spares the stripes' claims.
 *    Their paths are alive, and their READs may land at any time, as those of a running migration do.
 * While no path is in use stripes post nothing. What they have posted lands as ever: it is claimed, so nobody
 * else reads or zeroes the page, and a page that comes in after its bitmap was sent to the source is only one
 * that the source does not know of.
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

/* Of all pull threads. */
struct PrPull {
	PrRam *ram;
	int uffd;
	const PrParams *params;
	PrFaultService *faults;
	PrPullHooks hooks;
	PrPullThread *first; /* over the path in use; set before any stripe comes */

	int refs; /* atomic */

	GMutex lock;	    /* protects what follows; taken last */
	GCond idle;	    /* a resting thread's last READ has come back */
	GPtrArray *threads; /* PrPullThread*; changed by callers who come one at a time (pull.h) */
	const PrTransportOps *kind; /* of the path in use; NULL: there is none */
	guint last_id;
	guint block; /* where the walk stands */
	uint64_t page;
	uint64_t hint;	   /* the last one followed */
	uint64_t rate;	   /* the limiter's, bytes a second; 0: none */
	gint64 allowed_us; /* the limiter lets the next READ go at this time */
	gboolean broken;   /* the hook was told */
};

struct PrPullThread {
	PrPull *pull;
	guint id;	 /* 0: the first; constant */
	uint64_t *bytes; /* atomic: what a stripe has pulled is added here */
	PrWorker worker;

	/* PrPull.lock; only the thread changes them, and reads them without it */
	guint outstanding; /* READs on the current path */
	GArray *claims;	   /* Claim: READs that have not brought their pages (yet) */
	PrWindow window;
	gboolean held;	 /* there was nothing to post, or it was not to be */
	gint64 moved_us; /* the last completion, or the first READ after none */

	/* PrPull.lock */
	gboolean resting; /* it is to post no more */
	gboolean ended;	  /* only its claims are left */

	/* the thread's own */
	gboolean path_dead; /* it refused a READ: wait to be detached */
	gint64 allowed_us;  /* the limiter's word, as last heard */
	gint64 reported_us; /* the last progress hook */
	PrWatch *watch;
};

static const PrWatchPoint pulling = {"pulling pages", 500};

static gboolean is_rail(const PrPullThread *self)
{
	return self->id != 0;
}

static void note_broken(PrPull *pull, const GError *error)
{
	g_mutex_lock(&pull->lock);
	gboolean news = !pull->broken;
	pull->broken = TRUE;
	g_mutex_unlock(&pull->lock);
	if (news)
		pull->hooks.broken(error, pull->hooks.opaque);
}

static void place(PrPullThread *self, uint64_t token)
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

/* With the lock held. FALSE: there is none. */
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

/* READs in flight at most. */
static guint max_window(const PrPullThread *self)
{
	PrDataPath *path = self->worker.current;

	return MIN((guint)pr_param(self->pull->params, PR_PARAM_BULK_WINDOW),
		   path->ops->max_reads(path, PR_LANE_BULK));
}

/* A READ has brought its pages. With the lock held. */
static void note_read(PrPullThread *self, uint64_t token, gint64 now)
{
	uint64_t page, n, most = pr_param(self->pull->params, PR_PARAM_BULK_READ_SIZE);
	gint64 posted;
	guint index;

	if (!drop_claim(self, token, &posted))
		return;
	pr_token_unpack(token, &index, &page, &n);
	pr_window_completed(&self->window, n * self->pull->ram->blocks[index].page_size,
			    now - posted, most, max_window(self), now);
}

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

/* Only the first thread may call the hook: the connection in use, which the hook needs, outlives its path there. */
static void tell_complete(PrPullThread *self)
{
	PrPull *pull = self->pull;

	if (is_rail(self))
		pr_worker_kick(&pull->first->worker);
	else if (self->worker.current)
		pull->hooks.complete(pull->hooks.opaque);
}

static guint take_completions(PrPullThread *self)
{
	PrCompletion done[BATCH];
	PrDataPath *path = self->worker.current;

	if (self->outstanding == 0)
		return 0;
	guint n = path->ops->poll(path, PR_LANE_BULK, done, BATCH);
	for (guint i = 0; i < n; i++)
		if (done[i].ok)
			place(self, done[i].token);
	if (n > 0)
		account(self, done, n);
	if (n > 0 && pr_ram_complete(self->pull->ram))
		tell_complete(self);
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

/* Claims the next run of pages, walking around all blocks once; 0: there is none. */
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

/* A new rate counts from now on; what the old one still owed is forgiven. */
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

/* Whether a stripe over such a path is of use. */
static gboolean wants(const PrPull *pull, const PrTransportOps *ops)
{
	return pull->kind == ops && pr_capability(pull->params, PR_CAP_MULTI_RAIL);
}

static gboolean may_post(const PrPullThread *self, gint64 now)
{
	const PrPull *pull = self->pull;
	PrDataPath *path = self->worker.current;

	if (is_rail(self) && (self->resting || !wants(pull, path->ops)))
		return FALSE;
	if (pull->ram->verify && !pr_verify_has_room(pull->ram->verify))
		return FALSE;
	if (!is_rail(self) && __atomic_load_n(&pull->ram->huge_reads, __ATOMIC_SEQ_CST) > 0)
		return FALSE;
	return !self->path_dead && now >= pull->allowed_us &&
	       self->outstanding < MIN(self->window.reads, max_window(self));
}

/* ---- the thread ---- */

/* The next READ, which counts as outstanding from now on; 0: none may go, or there is none. */
static uint64_t next_read(PrPullThread *self, gint64 now)
{
	PrPull *pull = self->pull;
	uint64_t page, n, token = 0;
	guint index;

	g_mutex_lock(&pull->lock);
	follow_rate(pull, now);
	if (may_post(self, now))
		token = claim_next(self);
	/* The window is not full, and that is not its fault: nothing can be learned from that. */
	if (!token && self->outstanding < MIN(self->window.reads, max_window(self)))
		self->held = TRUE;
	if (token) {
		if (self->held)
			pr_window_resume(&self->window, now);
		self->held = FALSE;
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

/* FALSE: the path refuses it; the claim stays until the fence. */
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
		pr_verify_want(self->pull->ram->verify, token, /* urgent= */ FALSE);
	return path->ops->post_read(path, PR_LANE_BULK, index, page * page_size,
				    (uint32_t)(n * page_size), token);
}

static guint post_some(PrPullThread *self, gint64 now)
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

static void report(PrPullThread *self, gint64 now)
{
	if (now - self->reported_us < PROGRESS_US)
		return;
	self->reported_us = now;
	if (!is_rail(self))
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
		{.fd = self->worker.wake_fd, .events = POLLIN},
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

/* FALSE: the thread is to end. */
static gboolean obey(PrPullThread *self)
{
	gboolean switched;
	gboolean go_on = pr_worker_obey(&self->worker, &switched);

	if (switched) {
		g_mutex_lock(&self->pull->lock);
		self->outstanding = 0;
		pr_window_init(&self->window, g_get_monotonic_time());
		g_mutex_unlock(&self->pull->lock);
		self->path_dead = FALSE;
	}
	/* Perhaps by a stripe that brought the last page. */
	if (!is_rail(self) && pr_ram_complete(self->pull->ram))
		tell_complete(self);
	return go_on;
}

static gpointer pull_thread(gpointer opaque)
{
	PrPullThread *self = opaque;
	g_autoptr(PrWatch) watch =
		pr_watch_new(self->pull->hooks.watchdog, is_rail(self) ? "stripe" : "pull");

	self->watch = watch;
	for (;;) {
		gint64 now = g_get_monotonic_time();
		pr_watch_enter_at(watch, &pulling, now);
		if (pr_worker_was_kicked(&self->worker) && !obey(self))
			return NULL;
		guint work = 0;
		if (self->worker.current) {
			work = take_completions(self);
			work += post_some(self, now);
			report(self, now);
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
	if (!pr_worker_start(&self->worker, id == 0 ? "pull" : "stripe", pull_thread, self,
			     error)) {
		thread_free(self);
		return NULL;
	}
	/* From now on it may be kicked. */
	g_mutex_lock(&pull->lock);
	g_ptr_array_add(pull->threads, self);
	g_mutex_unlock(&pull->lock);
	return self;
}

/* Ends the thread; its claims stay. */
static void end(PrPullThread *self)
{
	g_mutex_lock(&self->pull->lock);
	gboolean already = self->ended;
	self->ended = TRUE; /* nobody kicks it any more */
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

/* With the lock held: there may be something to do for them. */
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

	/* No stripe claims anything meanwhile, nor drops a claim. */
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
	/* The stripes first: they kick the first one. */
	for (guint i = pull->threads->len; i > 0; i--)
		end(pull->threads->pdata[i - 1]);
	/* Whoever waits for a stripe finds that it is gone. */
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

/* ---- stripes ---- */

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
	gboolean wanted = wants(pull, path->ops);
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
	/* It may be gone after each wait. */
	while ((self = find_rail(pull, id)) != NULL) {
		self->resting = TRUE;
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
		end(self);
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
