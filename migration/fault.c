/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Theory of operation
 *
 * One thread reads faults from the guest's userfaultfd and posts READs of the missing pages on the
 * urgent lane; it also takes their completions, so that nothing stands between a page's arrival and
 * waking the vCPU that waits for it.
 *
 * A fault is one of three:
 *  - on a page that is in place (received bit set): resolved here at once, path or no path. So the
 *    guest runs on with what it has while the migration is paused, zero pages included.
 *  - on a page that nobody reads yet: claimed, posted, kept in `pending` until it lands.
 *  - on a page that a bulk READ covers: kept in `pending`, its `waiting` bit is set. The pull thread
 *    exposes the page, which wakes the vCPU, and notifies us so that we take the time. Both sides use
 *    sequentially consistent bit operations: either we see `received` after we set `waiting`, or the
 *    pull thread sees `waiting` after it set `received`.
 *
 * Read-ahead: where a thread's faults show a pattern (readahead.h), up to fault-readahead further pages
 * are read on the urgent lane. Never before a fault: its READ is posted first, and the rest only when no
 * fault is unread and half of the lane is free. They are claimed and placed as any other page; a fault that
 * comes for one meanwhile is like one on a bulk READ's page, except that we take the completion.
 *
 * A path may go and another one come at any time (attach, detach). READs of a lost path leave their
 * claims behind, because data may still land; the destination clears them once the path is fenced
 * (pr_ram_forget_inflight). `pending` survives: on attach every entry is looked at again.
 *
 * `pending` has an entry for each thread that waits: several may wait for one page, and each one's time
 * counts (blocktime.h). Thread ids serve the statistics and nothing else.
 *
 * `pending` is bounded; when it is full, faults stay unread in the kernel, and their vCPUs asleep,
 * until there is room. The fault path allocates nothing and takes no lock.
 *
 * The thread polls without sleeping for fault-spin microseconds after the last event: a page is about to
 * come in, or the vCPU that was just woken is about to fault again.
 */
#include "migration/fault.h"

#include <linux/userfaultfd.h>
#include <poll.h>
#include <sched.h>
#include <string.h>
#include <unistd.h>

#include "migration/bitmap.h"
#include "migration/invariants.h"
#include "migration/killpoint.h"
#include "migration/place.h"
#include "migration/readahead.h"
#include "migration/verify.h"
#include "migration/worker.h"

#define MAX_PENDING 4096
#define BATCH	    32
#define MAX_PLANS   8
#define AHEAD	    (1ull << 55) /* marks the token of a READ ahead; the number of pages stays below */
G_STATIC_ASSERT(PR_READ_MAX / 4096 < AHEAD >> 40);

typedef struct Pending {
	uint64_t token;
	PrPageWait wait;
	gboolean posted; /* by us: its page is covered by our READ */
} Pending;

struct PrFaultThread {
	PrRam *ram;
	int uffd;
	PrBlocktime *times;
	const PrParams *params;
	PrFaultHooks hooks;
	PrWorker worker;

	/* the fault thread's own */
	Pending pending[MAX_PENDING];
	guint n_pending;
	guint outstanding; /* READs on the current path */
	PrReadahead readahead;
	PrReadaheadRun plans[MAX_PLANS]; /* to be read ahead, oldest first */
	guint n_plans;
	uint64_t ahead_pages; /* on their way */
	gboolean uffd_dead;
	gboolean broken;

	PrFaultStats stats; /* written by the thread, atomic */
};

static gint64 now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000000000ll + ts.tv_nsec;
}

static void add(uint64_t *counter, uint64_t value)
{
	__atomic_fetch_add(counter, value, __ATOMIC_RELAXED);
}

static void note_broken(PrFaultThread *self, GError *error)
{
	if (!self->broken)
		self->hooks.broken(error, self->hooks.opaque);
	self->broken = TRUE;
	g_error_free(error);
}

static void note_latency(PrFaultThread *self, gint64 ns)
{
	uint64_t us = (uint64_t)ns / 1000;
	guint bucket = us == 0 ? 0 : 63 - (guint)__builtin_clzll(us);

	add(&self->stats.resolved, 1);
	add(&self->stats.total_ns, (uint64_t)ns);
	add(&self->stats.dist[MIN(bucket, PR_LATENCY_BUCKETS - 1)], 1);
	if ((uint64_t)ns > self->stats.max_ns)
		__atomic_store_n(&self->stats.max_ns, (uint64_t)ns, __ATOMIC_RELAXED);
}

/* The thread was woken: the entry goes, the last one takes its place. */
static void settle(PrFaultThread *self, Pending *entry)
{
	gint64 now = now_ns();

	note_latency(self, now - entry->wait.since_ns);
	pr_blocktime_woken(self->times, &entry->wait, now);
	*entry = self->pending[--self->n_pending];
}

static gboolean lies_in(uint64_t token, guint index, uint64_t first, uint64_t n)
{
	guint block;
	uint64_t page, one;

	pr_token_unpack(token, &block, &page, &one);
	return block == index && page >= first && page - first < n;
}

static void settle_all(PrFaultThread *self, guint index, uint64_t page, uint64_t n)
{
	for (guint i = 0; i < self->n_pending;)
		if (lies_in(self->pending[i].token, index, page, n))
			settle(self, &self->pending[i]);
		else
			i++;
}

static void resolve(PrFaultThread *self, PrRamBlock *block, uint64_t page)
{
	GError *error = NULL;

	if (!pr_place_resolve(self->uffd, block, page, &error))
		note_broken(self, error);
}

/* Posts the READ of claimed pages. When the path refuses it, the claim stays until the fence. */
static gboolean post(PrFaultThread *self, guint index, uint64_t page, uint64_t n, uint64_t flag)
{
	uint64_t page_size = self->ram->blocks[index].page_size;
	PrDataPath *path = self->worker.current;

	pr_invariant_claimed(&self->ram->blocks[index], page, n, "a READ is posted for a fault");
	if (!path->ops->post_read(path, PR_LANE_URGENT, index, page * page_size,
				  (uint32_t)(n * page_size), pr_token_pack(index, page, n) | flag))
		return FALSE;
	self->outstanding++;
	if (self->ram->verify)
		pr_verify_want(self->ram->verify, pr_token_pack(index, page, n),
			       /* urgent= */ TRUE);
	return TRUE;
}

static void post_faulting(PrFaultThread *self, guint index, uint64_t page)
{
	if (!post(self, index, page, 1, 0))
		return;
	add(&self->stats.requests, 1);
	__atomic_store_n(&self->ram->pull_hint, pr_token_pack(index, page, 1), __ATOMIC_RELAXED);
}

static gboolean may_post(const PrFaultThread *self)
{
	PrDataPath *path = self->worker.current;

	return path && self->outstanding < path->ops->max_reads(path, PR_LANE_URGENT);
}

/* Where pages are verified, one that came in wrong is given up by the verify thread. */
static gboolean was_given_up(const PrRamBlock *block, uint64_t page)
{
	return !pr_bitmap_test(block->inflight, page) && !pr_bitmap_test(block->received, page);
}

static void try_post(PrFaultThread *self, Pending *entry, guint index, uint64_t page)
{
	if (entry->posted || !may_post(self) || !pr_ram_claim(&self->ram->blocks[index], page))
		return;
	entry->posted = TRUE;
	post_faulting(self, index, page);
}

/* Does for an entry what can be done now. TRUE: it is settled and gone. */
static gboolean advance(PrFaultThread *self, Pending *entry)
{
	guint index;
	uint64_t page, n;

	pr_token_unpack(entry->token, &index, &page, &n);
	PrRamBlock *block = &self->ram->blocks[index];
	if (entry->posted && was_given_up(block, page))
		entry->posted = FALSE;
	try_post(self, entry, index, page);
	if (!entry->posted && !pr_bitmap_test(block->received, page)) {
		pr_bitmap_test_and_set(block->waiting, page);
		/* Whoever gave it up before that has not seen us. */
		try_post(self, entry, index, page);
	}
	if (!pr_bitmap_test(block->received, page))
		return FALSE;
	resolve(self, block, page);
	settle(self, entry);
	return TRUE;
}

static void advance_all(PrFaultThread *self)
{
	for (guint i = 0; i < self->n_pending;)
		if (!advance(self, &self->pending[i]))
			i++;
}

static gboolean locate(PrFaultThread *self, uint64_t address, uint64_t *ret_token)
{
	for (guint i = 0; i < self->ram->n_blocks; i++) {
		const PrRamBlock *block = &self->ram->blocks[i];
		if (address >= block->base && address - block->base < block->size) {
			*ret_token =
				pr_token_pack(i, (address - block->base) / block->page_size, 1);
			return TRUE;
		}
	}
	return FALSE;
}

/* FALSE: it is known already. A thread may fault twice on the page that it waits for: a signal lets it
 * go in between. */
static gboolean add_pending(PrFaultThread *self, uint64_t token, uint32_t tid)
{
	gboolean posted = FALSE;

	for (guint i = 0; i < self->n_pending; i++) {
		const Pending *other = &self->pending[i];

		if (other->token != token)
			continue;
		if (other->wait.tid == tid)
			return FALSE;
		posted = posted || other->posted;
	}
	Pending *entry = &self->pending[self->n_pending++];
	*entry = (Pending){.token = token, .posted = posted};
	pr_blocktime_blocked(self->times, tid, now_ns(), &entry->wait);
	return TRUE;
}

/* Beside MAX_PLANS newer ones a plan is too old to be of use. */
static void plan_ahead(PrFaultThread *self, uint32_t tid, guint index, uint64_t page)
{
	guint limit = (guint)pr_param(self->params, PR_PARAM_FAULT_READAHEAD);
	PrReadaheadRun run;

	pr_readahead_fault(&self->readahead, tid, index, page, self->ram->blocks[index].n_pages,
			   limit, &run);
	if (run.n == 0)
		return;
	if (self->n_plans == MAX_PLANS)
		memmove(self->plans, self->plans + 1, --self->n_plans * sizeof(run));
	self->plans[self->n_plans++] = run;
}

static void take_fault(PrFaultThread *self, const struct uffd_msg *msg)
{
	uint64_t token, page, n;
	guint index;

	if (msg->event != UFFD_EVENT_PAGEFAULT)
		return;
	if (!locate(self, msg->arg.pagefault.address, &token)) {
		note_broken(self, g_error_new(PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_SYSTEM,
					      "a fault at 0x%llx, outside of all RAM blocks",
					      msg->arg.pagefault.address));
		return;
	}
	pr_token_unpack(token, &index, &page, &n);
	plan_ahead(self, msg->arg.pagefault.feat.ptid, index, page);
	if (pr_bitmap_test(self->ram->blocks[index].received, page)) {
		resolve(self, &self->ram->blocks[index], page);
		return;
	}
	if (add_pending(self, token, msg->arg.pagefault.feat.ptid))
		advance(self, &self->pending[self->n_pending - 1]);
}

static gboolean has_room(const PrFaultThread *self)
{
	return self->n_pending + BATCH <= MAX_PENDING;
}

static guint take_faults(PrFaultThread *self)
{
	struct uffd_msg msgs[BATCH];

	if (self->uffd_dead || !has_room(self))
		return 0;
	ssize_t got = read(self->uffd, msgs, sizeof(msgs));
	if (got <= 0)
		return 0;
	guint n = (guint)((gsize)got / sizeof(msgs[0]));
	for (guint i = 0; i < n; i++)
		take_fault(self, &msgs[i]);
	return n;
}

/* Claims the next pages of a plan that one READ can cover. Returns how many (0: none is left), the first in
 * *ret_page. */
static uint64_t claim_ahead(PrRamBlock *block, PrReadaheadRun *plan, uint64_t max,
			    uint64_t *ret_page)
{
	uint64_t n = 0;

	while (plan->n > 0 && n < max) {
		uint64_t page = plan->page;
		gboolean mine = pr_ram_claim(block, page);

		if (!mine && n > 0)
			break;
		plan->page += (uint64_t)plan->stride;
		plan->n--;
		if (!mine)
			continue;
		if (n == 0 || plan->stride < 0)
			*ret_page = page;
		n++;
		if (plan->stride != 1 && plan->stride != -1)
			break;
	}
	return n;
}

/* How many pages may be read ahead now: half of the lane is kept for faults. */
static uint64_t room_ahead(const PrFaultThread *self)
{
	PrDataPath *path = self->worker.current;
	uint64_t limit = pr_param(self->params, PR_PARAM_FAULT_READAHEAD);

	if (!path || self->outstanding >= path->ops->max_reads(path, PR_LANE_URGENT) / 2)
		return 0;
	return limit - MIN(limit, self->ahead_pages);
}

/* The newest plan first: its thread is the one that comes next. What has no room now stays planned. */
static void read_ahead(PrFaultThread *self)
{
	uint64_t room, n, page = 0;

	while (self->n_plans > 0 && (room = room_ahead(self)) > 0) {
		PrReadaheadRun *plan = &self->plans[self->n_plans - 1];
		PrRamBlock *block = &self->ram->blocks[plan->block];
		uint64_t most = MAX(1, PR_READ_MAX / block->page_size);

		n = claim_ahead(block, plan, MIN(room, most), &page);
		if (n == 0) {
			self->n_plans--;
			continue;
		}
		if (!post(self, plan->block, page, n, AHEAD))
			return;
		self->ahead_pages += n;
		add(&self->stats.ahead_pages, n);
	}
}

static void take_page(PrFaultThread *self, uint64_t token)
{
	GError *error = NULL;
	guint index;
	uint64_t page, n;

	if (self->ram->verify) {
		pr_verify_landed(self->ram->verify, token & ~AHEAD, /* stripe= */ 0);
		return;
	}
	pr_token_unpack(token & ~AHEAD, &index, &page, &n);
	PrRamBlock *block = &self->ram->blocks[index];
	pr_invariant_claimed(block, page, n, "an urgent READ has landed");
	pr_kill_point(PR_KILL_DESTINATION_PAGE_LANDED);
	pr_ram_received(self->ram, block, page, n, /* travelled= */ TRUE);
	pr_kill_point(PR_KILL_DESTINATION_PAGE_RECEIVED);
	if (!pr_place_expose(self->uffd, block, page, n, &error))
		note_broken(self, error);
	uint64_t waited = pr_bitmap_clear(block->waiting, page, n);
	if (token & AHEAD)
		add(&self->stats.ahead_waited, waited);
	settle_all(self, index, page, n);
}

static guint take_completions(PrFaultThread *self)
{
	PrCompletion done[BATCH];
	PrDataPath *path = self->worker.current;

	if (!path || self->outstanding == 0)
		return 0;
	guint n = path->ops->poll(path, PR_LANE_URGENT, done, BATCH);
	for (guint i = 0; i < n; i++) {
		if (done[i].token & AHEAD)
			self->ahead_pages -= (done[i].token & ~AHEAD) >> 40 & 0xffff;
		if (done[i].ok)
			take_page(self, done[i].token);
	}
	self->outstanding -= n;
	if (n > 0 && self->n_pending > 0)
		advance_all(self);
	if (n > 0 && pr_ram_complete(self->ram))
		self->hooks.complete(self->hooks.opaque);
	return n;
}

static void sleep_until_event(PrFaultThread *self)
{
	PrDataPath *path = self->worker.current;
	struct pollfd fds[3] = {
		{.fd = self->worker.wake_fd, .events = POLLIN},
		{.fd = self->uffd_dead || !has_room(self) ? -1 : self->uffd, .events = POLLIN},
		{.fd = path ? path->ops->wait_fd(path, PR_LANE_URGENT) : -1, .events = POLLIN},
	};

	if (path && !path->ops->arm(path, PR_LANE_URGENT))
		return;
	if (poll(fds, G_N_ELEMENTS(fds), -1) < 0)
		return;
	/* Without POLLIN it can only be the end of the guest's address space. */
	if ((fds[1].revents & (POLLERR | POLLHUP | POLLNVAL)) && !(fds[1].revents & POLLIN))
		self->uffd_dead = TRUE;
}

/* The path has changed: whatever was posted on the old one is to be asked for again. */
static void restart(PrFaultThread *self)
{
	self->outstanding = 0;
	self->ahead_pages = 0;
	self->n_plans = 0;
	for (guint i = 0; i < self->n_pending; i++)
		self->pending[i].posted = FALSE;
}

/* FALSE: the thread is to end. */
static gboolean obey(PrFaultThread *self)
{
	gboolean switched;
	gboolean go_on = pr_worker_obey(&self->worker, &switched);

	if (switched)
		restart(self);
	advance_all(self);
	return go_on;
}

static gpointer fault_thread(gpointer opaque)
{
	PrFaultThread *self = opaque;
	gint64 busy_ns = now_ns();

	for (;;) {
		if (pr_worker_was_kicked(&self->worker) && !obey(self))
			return NULL;
		guint completions = take_completions(self), faults = take_faults(self);
		guint work = completions + faults;
		/* A short batch was all that there was to read. */
		if (faults < BATCH && self->n_plans > 0)
			read_ahead(self);
		gint64 now = now_ns();
		if (work > 0)
			busy_ns = now;
		gint64 spin_ns = (gint64)pr_param(self->params, PR_PARAM_FAULT_SPIN) * 1000;
		if (work == 0 && now - busy_ns > spin_ns)
			sleep_until_event(self);
		else if (work == 0)
			sched_yield(); /* to a vCPU or a source on the same core */
	}
}

PrFaultThread *pr_fault_start(PrRam *ram, int uffd, PrBlocktime *times, const PrParams *params,
			      const PrFaultHooks *hooks)
{
	PrFaultThread *self = g_new0(PrFaultThread, 1);

	self->ram = ram;
	self->uffd = uffd;
	self->times = times;
	self->params = params;
	self->hooks = *hooks;
	pr_worker_start(&self->worker, "fault", fault_thread, self);
	return self;
}

void pr_fault_attach(PrFaultThread *self, PrDataPath *path)
{
	pr_worker_set_path(&self->worker, path);
}

void pr_fault_detach(PrFaultThread *self)
{
	pr_worker_set_path(&self->worker, NULL);
}

void pr_fault_notify(PrFaultThread *self)
{
	pr_worker_kick(&self->worker);
}

void pr_fault_stop(PrFaultThread *self)
{
	if (!self)
		return;
	pr_worker_stop(&self->worker);
	pr_blocktime_close(self->times, now_ns());
	g_free(self);
}

void pr_fault_stats(const PrFaultThread *self, PrFaultStats *ret)
{
	const PrFaultStats *from = &self->stats;

	ret->requests = __atomic_load_n(&from->requests, __ATOMIC_RELAXED);
	ret->resolved = __atomic_load_n(&from->resolved, __ATOMIC_RELAXED);
	ret->total_ns = __atomic_load_n(&from->total_ns, __ATOMIC_RELAXED);
	ret->ahead_pages = __atomic_load_n(&from->ahead_pages, __ATOMIC_RELAXED);
	ret->ahead_waited = __atomic_load_n(&from->ahead_waited, __ATOMIC_RELAXED);
	ret->max_ns = __atomic_load_n(&from->max_ns, __ATOMIC_RELAXED);
	for (guint i = 0; i < PR_LATENCY_BUCKETS; i++)
		ret->dist[i] = __atomic_load_n(&from->dist[i], __ATOMIC_RELAXED);
}
