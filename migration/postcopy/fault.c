/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Theory of operation
 *
 * Goal: a vCPU that touches a missing page waits for one round trip of the network and as little
 * more as possible.
 *
 * A fault thread reads faults from the guest's userfaultfd and posts READs of the missing pages on
 * its urgent lane. It also takes their completions, so that no other thread stands between a page's
 * arrival and the waking of the vCPU.
 *
 * Threads. The first fault thread always waits for faults. The others are its helpers. A helper
 * sleeps until some thread has read more than one fault at once: then vCPUs wait for a thread, not
 * for pages. From then on the helper reads faults, too, and each fault is served by the thread that
 * has read it. The helper sleeps again after fault-spin microseconds without work. So faults that
 * come one at a time cost what they cost with one thread. Each helper needs an urgent lane of its
 * own. If the path has fewer lanes, or there is no path, the helper stops and hands its pending
 * entries to the first thread. The threads share the statistics and the read-ahead under
 * stats_lock, and otherwise only what they share with the pull threads: the bitmaps.
 *
 * Faults. There are four kinds:
 *  - The page is received: the thread resolves the fault at once, with or without a path. So the
 *    guest runs on with the pages that it has while the migration is paused; zero pages are among
 *    them.
 *  - Nobody reads the page yet: the thread claims it, posts a READ, and keeps an entry in `pending`
 *    until it lands.
 *  - The page is ungranted (ram.h): the source has not yet said whether it may be read. The thread
 *    asks the source to scan there first. From then on the page is like one of the next kind: who
 *    grants it notifies the fault threads.
 *  - A READ of another thread covers the page: the fault thread keeps an entry in `pending` and
 *    sets the page's `waiting` bit. The other thread places the page, which wakes the vCPU, and
 *    notifies the fault threads, which then count the time (place.h says why no wait is lost). It
 *    notifies only threads with pending entries, and a thread's n_pending counts an entry before
 *    its waiting bit is set.
 *
 * Huge pages. A fault on a huge page is one for all its 4 KiB pages (ram.h). The thread claims and
 * posts those that nobody reads, as far as the lane has room; for the others it waits as above. The
 * wait ends with the last of them, whoever placed it. While such READs are in flight, the bulk pull
 * over the same path pauses.
 *
 * Read-ahead. Where the faults of one guest thread show a pattern (readahead.h), up to
 * fault-readahead further pages are read on the urgent lane. Faults go first: pages are read ahead
 * only when no fault is unread and half of the lane is free. They are claimed and placed as any
 * other page. A fault on such a page is like one on a page of a bulk READ, but its completion comes
 * to a fault thread.
 *
 * Paths. A path may be detached and another one attached at any time. READs of a lost path keep
 * their claims, because their data may still land. The destination ends these claims after it has
 * fenced the path (pr_pull_reclaim_inflight). The entries in `pending` survive; when a path is
 * attached, each is advanced again.
 *
 * Entries. There is one for each guest thread that waits: several may wait for one page, and the
 * time of each counts (blocktime.h). Thread ids serve statistics and read-ahead only. `pending`
 * holds PR_PENDING_MAX entries. While it has no room for a batch, faults stay unread in the kernel,
 * and their vCPUs sleep.
 *
 * Cost. The fault path allocates nothing. It takes no lock but stats_lock, and that only with
 * several threads. Two cases take more: a request for an ungranted page, and the hook that says
 * that no huge page is being read any more. A thread polls without sleeping for fault-spin
 * microseconds after the last event, because a page is about to land, or the vCPU that was just
 * woken is about to fault again. A fault that is reported again while it is pending is no event.
 * After many of these in a row the first thread rests (repeats.h); completions and kicks end the
 * rest.
 *
 * Not handled here: READs that never complete (the path's watchdog and the heartbeat end the path),
 * fencing, and the end of the guest's process, which ends the reading of faults.
 */
#include "migration/postcopy/fault.h"

#include <linux/userfaultfd.h>
#include <poll.h>
#include <sched.h>
#include <string.h>
#include <unistd.h>

#include "migration/core/types.h"
#include "migration/memory/bitmap.h"
#include "migration/memory/uffd.h"
#include "migration/postcopy/fault-stats.h"
#include "migration/postcopy/fault-thread.h"
#include "migration/postcopy/place.h"
#include "migration/postcopy/verify.h"

#define BATCH 64 /* faults or completions that are taken at once */

static const PrWatchPoint serving = {"serving faults", 500};

/* ---- faults ---- */

/* Drops the oldest plan if there are too many: its pages have most likely been touched since. */
static void plan_ahead(PrFaultThread *self, uint32_t tid, guint index, uint64_t page)
{
	guint limit = (guint)pr_param(self->params, PR_PARAM_FAULT_READAHEAD);
	PrReadaheadRun run;

	/* A huge page is larger than any read-ahead. */
	if (limit == 0 || self->ram->blocks[index].per_host > 1)
		return;
	pr_fault_lock_stats(self->service);
	if (pr_blocktime_is_other(self->service->times, tid))
		tid = PR_READAHEAD_NO_THREAD;
	pr_readahead_fault(&self->service->readahead, tid, index, page,
			   self->ram->blocks[index].n_pages, limit, &run);
	pr_fault_unlock_stats(self->service);
	if (run.n == 0)
		return;
	if (self->n_plans == PR_FAULT_PLANS_MAX)
		memmove(self->plans, self->plans + 1, --self->n_plans * sizeof(run));
	self->plans[self->n_plans++] = run;
}

/* FALSE: the fault is pending already. */
static gboolean handle_fault(PrFaultThread *self, const struct uffd_msg *msg)
{
	uint64_t page;
	guint index;

	if (msg->event != UFFD_EVENT_PAGEFAULT)
		return TRUE;
	if (!pr_ram_locate(self->ram, msg->arg.pagefault.address, &index, &page)) {
		pr_fault_note_broken(self->service,
				     g_error_new(PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_SYSTEM,
						 "a fault at 0x%llx, outside of all RAM blocks",
						 msg->arg.pagefault.address));
		return TRUE;
	}
	page = pr_ram_host_start(&self->ram->blocks[index], page);
	plan_ahead(self, msg->arg.pagefault.feat.ptid, index, page);
	if (pr_ram_is_whole(&self->ram->blocks[index], page)) {
		pr_pending_resolve(self, &self->ram->blocks[index], page);
		return TRUE;
	}
	return pr_pending_add(self, index, page, msg->arg.pagefault.feat.ptid);
}

static gboolean has_room(const PrFaultThread *self)
{
	return self->n_pending + BATCH <= PR_PENDING_MAX;
}

static gboolean may_read_faults(const PrFaultThread *self)
{
	return self->index == 0 || self->worker.current;
}

/* Wakes one sleeping helper, which in its turn wakes the next one. */
static void wake_helper(PrFaultThread *self)
{
	PrFaultService *service = self->service;

	for (guint i = 1; i < service->n_threads; i++) {
		PrFaultThread *helper = &service->threads[i];

		if (__atomic_load_n(&helper->asleep, __ATOMIC_RELAXED) &&
		    __atomic_exchange_n(&helper->asleep, FALSE, __ATOMIC_ACQ_REL)) {
			pr_worker_kick(&helper->worker);
			return;
		}
	}
}

/* How many faults a thread reads at once. With several threads, none takes them all. */
static guint fault_batch(const PrFaultThread *self)
{
	return BATCH / self->service->n_threads;
}

static guint read_faults(PrFaultThread *self, guint *ret_fresh)
{
	struct uffd_msg msgs[BATCH];

	*ret_fresh = 0;
	if (self->uffd_dead || !has_room(self) || !may_read_faults(self))
		return 0;
	ssize_t got = read(self->uffd, msgs, fault_batch(self) * sizeof(msgs[0]));
	if (got <= 0)
		return 0;
	guint n = (guint)((gsize)got / sizeof(msgs[0]));
	if (self->index > 0)
		pr_fault_count(&self->stats.helped, n);
	if (n > 1 && self->repeats.row == 0)
		wake_helper(self);
	for (guint i = 0; i < n; i++)
		*ret_fresh += handle_fault(self, &msgs[i]) ? 1 : 0;
	if (*ret_fresh < n || self->repeats.row > 0) {
		pr_fault_count(&self->stats.repeats, n - *ret_fresh);
		pr_repeats_note(&self->repeats, n, *ret_fresh, pr_fault_now_ns());
	}
	return n;
}

/* ---- read-ahead ---- */

/* How many pages may be read ahead now. Half of the lane is kept for faults. */
static uint64_t room_ahead(const PrFaultThread *self)
{
	PrDataPath *path = self->worker.current;
	uint64_t limit = pr_param(self->params, PR_PARAM_FAULT_READAHEAD);

	if (!pr_fault_may_post(self) ||
	    self->outstanding >= path->ops->max_reads(path, self->lane) / 2)
		return 0;
	return limit - MIN(limit, self->ahead_pages);
}

/* Reads ahead what the lane has room for. The newest plan goes first: its guest thread faults
 * next. */
static void read_ahead(PrFaultThread *self)
{
	uint64_t room, n, page = 0;

	while (self->n_plans > 0 && (room = room_ahead(self)) > 0) {
		PrReadaheadRun *plan = &self->plans[self->n_plans - 1];
		PrRamBlock *block = &self->ram->blocks[plan->block];
		uint64_t most = MAX(1, PR_READ_MAX / block->page_size);

		n = pr_readahead_claim(plan, block, MIN(room, most), &page);
		if (n == 0) {
			self->n_plans--;
			continue;
		}
		if (!pr_fault_post(self, plan->block, page, n, PR_FAULT_AHEAD))
			return;
		self->ahead_pages += n;
		pr_fault_count(&self->stats.ahead_pages, n);
	}
}

/* ---- completions ---- */

static void notify_others(PrFaultService *service, const PrFaultThread *but)
{
	for (guint i = 0; i < service->n_threads; i++) {
		PrFaultThread *self = &service->threads[i];

		if (self != but && __atomic_load_n(&self->n_pending, __ATOMIC_SEQ_CST) > 0)
			pr_worker_kick(&self->worker);
	}
}

/* Neighbouring pages that have landed and are to be placed by one call. */
typedef struct Landed {
	guint index; /* of the block */
	uint64_t page, n;
} Landed;

static void place(PrFaultThread *self, Landed *run)
{
	GError *error = NULL;
	uint64_t waiters;

	if (run->n == 0)
		return;
	if (!pr_place(self->ram, self->uffd, &self->ram->blocks[run->index], run->page, run->n,
		      &waiters, &error))
		pr_fault_note_broken(self->service, error);
	pr_pending_placed(self, run->index, run->page, run->n);
	if (waiters > 0)
		notify_others(self->service, self);
	*run = (Landed){0};
}

/* Pages that were read ahead have landed: counts those that a fault waits for. */
static void count_ahead_waited(PrFaultThread *self, const PrRamBlock *block, uint64_t page,
			       uint64_t n)
{
	for (uint64_t i = page; i < page + n; i++)
		if (pr_bitmap_test(block->waiting, i))
			pr_fault_count(&self->stats.ahead_waited, 1);
}

/* A READ has landed. Places the pages before it, unless they are neighbours of its pages. */
static void handle_landed(PrFaultThread *self, uint64_t token, Landed *run)
{
	guint index;
	uint64_t page, n;

	pr_token_unpack(token & ~PR_FAULT_AHEAD, &index, &page, &n);
	PrRamBlock *block = &self->ram->blocks[index];
	pr_place_landed(block, page, n, "an urgent READ has landed");
	if (token & PR_FAULT_AHEAD)
		count_ahead_waited(self, block, page, n);
	if (self->ram->verify) {
		pr_verify_landed(self->ram->verify, token & ~PR_FAULT_AHEAD, /* rail= */ 0);
		return;
	}
	if (index != run->index || page != run->page + run->n)
		place(self, run);
	if (run->n == 0)
		*run = (Landed){.index = index, .page = page};
	run->n += n;
}

/* n READs for faults on huge pages are no longer in flight. */
static void end_huge_reads(PrFaultThread *self, guint n)
{
	const PrFaultHooks *hooks = &self->service->hooks;

	self->huge_reads -= n;
	if (n > 0 && __atomic_sub_fetch(&self->ram->huge_reads, n, __ATOMIC_SEQ_CST) == 0)
		hooks->no_huge_read(hooks->opaque);
}

static guint poll_completions(PrFaultThread *self)
{
	PrCompletion done[BATCH];
	Landed run = {0};
	guint huge = 0;
	PrDataPath *path = self->worker.current;

	if (!path || self->outstanding == 0)
		return 0;
	guint n = path->ops->poll(path, self->lane, done, BATCH);
	for (guint i = 0; i < n; i++) {
		if (done[i].token & PR_FAULT_AHEAD)
			self->ahead_pages -= (done[i].token & ~PR_FAULT_AHEAD) >> 40 & 0xffff;
		huge += self->ram->blocks[done[i].token >> 56].per_host > 1;
		if (done[i].ok)
			handle_landed(self, done[i].token, &run);
	}
	place(self, &run);
	self->outstanding -= n;
	end_huge_reads(self, huge);
	if (n > 0 && self->n_pending > 0)
		pr_pending_advance_all(self);
	if (n > 0 && pr_ram_complete(self->ram))
		self->service->hooks.complete(self->service->hooks.opaque);
	return n;
}

/* ---- the thread ---- */

/* A helper does not wait for faults: another thread wakes it. */
static void sleep_until_event(PrFaultThread *self)
{
	PrDataPath *path = self->worker.current;
	guint rest_us = pr_repeats_take_rest(&self->repeats);
	const struct timespec rest = {.tv_nsec = rest_us * 1000l};
	gboolean faults = self->index == 0 && !self->uffd_dead && has_room(self) && rest_us == 0;
	struct pollfd fds[3] = {
		{.fd = pr_waker_fd(&self->worker.waker), .events = POLLIN},
		{.fd = faults ? self->uffd : -1, .events = POLLIN},
		{.fd = path ? path->ops->wait_fd(path, self->lane) : -1, .events = POLLIN},
	};

	if (path && !path->ops->arm(path, self->lane))
		return;
	pr_watch_idle(self->watch);
	__atomic_store_n(&self->asleep, self->index > 0 && path, __ATOMIC_RELEASE);
	/* Ended by a fault, a completion or a kick, or when the rest is over. */
	int ready = ppoll(fds, G_N_ELEMENTS(fds), rest_us > 0 ? &rest : NULL, NULL);
	__atomic_store_n(&self->asleep, FALSE, __ATOMIC_RELAXED);
	if (ready < 0)
		return;
	/* Without POLLIN this means that the guest's address space has ended. */
	if ((fds[1].revents & (POLLERR | POLLHUP | POLLNVAL)) && !(fds[1].revents & POLLIN))
		self->uffd_dead = TRUE;
}

/* The path has changed: what was requested over the old one has to be requested again. */
static void reset_path_state(PrFaultThread *self)
{
	end_huge_reads(self, self->huge_reads);
	self->path_dead = FALSE;
	self->outstanding = 0;
	self->ahead_pages = 0;
	self->n_plans = 0;
	for (guint i = 0; i < self->n_pending; i++)
		self->pending[i].posted = self->pending[i].grant_requested = FALSE;
}

/* FALSE: the thread has to end. */
static gboolean apply_commands(PrFaultThread *self)
{
	gboolean switched;
	gboolean go_on = pr_worker_apply(&self->worker, &switched);

	if (switched)
		reset_path_state(self);
	if (self->index > 0 && !self->worker.current && self->n_pending > 0)
		pr_pending_hand_off(self);
	pr_pending_advance_all(self);
	return go_on;
}

static gpointer fault_thread(gpointer opaque)
{
	PrFaultThread *self = opaque;
	gint64 busy_ns = pr_fault_now_ns();
	g_autoptr(PrWatch) watch = pr_watch_new(self->service->hooks.watchdog, "fault");

	self->watch = watch;
	for (gint64 now = busy_ns;;) {
		gboolean kicked = pr_worker_was_kicked(&self->worker);
		pr_watch_enter_at(watch, &serving, now / 1000);
		if (kicked && !apply_commands(self))
			return NULL;
		if (pr_pending_may_adopt(self))
			pr_pending_adopt(self);
		guint fresh, completions = poll_completions(self);
		guint faults = read_faults(self, &fresh), work = completions + fresh;
		/* After a short batch no fault is unread. */
		if (faults < fault_batch(self) && self->n_plans > 0)
			read_ahead(self);
		now = pr_fault_now_ns();
		/* A helper that was woken polls for a while, even if other threads have read the
		 * faults. */
		if (work > 0 || (kicked && self->index > 0))
			busy_ns = now;
		gint64 spin_ns = (gint64)pr_param(self->params, PR_PARAM_FAULT_SPIN) * 1000;
		if (work == 0 && now - busy_ns > spin_ns)
			sleep_until_event(self), now = pr_fault_now_ns();
		else if (work == 0)
			sched_yield(); /* a vCPU or a source may need this core */
	}
}

/* ---- the service ---- */

static gboolean thread_start(PrFaultService *service, guint index, GError **error)
{
	PrFaultThread *self = &service->threads[index];

	self->service = service;
	self->index = index;
	self->lane = pr_lane_urgent(index);
	self->ram = service->ram;
	self->uffd = service->uffd;
	self->params = service->params;
	return pr_worker_start(&self->worker, "fault", fault_thread, self, error);
}

/* Ends the threads from `first` on, and frees the service. */
static void service_free(PrFaultService *service, guint first)
{
	/* All threads end before any is cleared, because they kick each other. */
	for (guint i = first; i < service->n_threads; i++)
		pr_worker_end(&service->threads[i].worker);
	for (guint i = first; i < service->n_threads; i++)
		pr_worker_clear(&service->threads[i].worker);
	g_array_unref(service->handed_off);
	g_mutex_clear(&service->lock);
	g_mutex_clear(&service->stats_lock);
	g_free(service->threads);
	g_free(service);
}

PrFaultService *pr_fault_start(PrRam *ram, int uffd, PrBlocktime *times, const PrParams *params,
			       const PrFaultHooks *hooks, GError **error)
{
	PrFaultService *service = g_new0(PrFaultService, 1);

	service->ram = ram;
	service->uffd = uffd;
	service->times = times;
	service->params = params;
	service->hooks = *hooks;
	service->n_threads = pr_params_fault_threads(params);
	service->threads = g_new0(PrFaultThread, service->n_threads);
	service->handed_off = g_array_new(FALSE, FALSE, sizeof(PrPending));
	g_mutex_init(&service->lock);
	g_mutex_init(&service->stats_lock);
	/* The helpers start first, since the first thread wakes and notifies them. */
	for (guint i = service->n_threads; i > 0; i--)
		if (!thread_start(service, i - 1, error)) {
			service_free(service, i);
			return NULL;
		}
	return service;
}

void pr_fault_attach(PrFaultService *service, PrDataPath *path)
{
	/* Faults that could not be resolved are lost; so all that wait have to fault again. */
	if (__atomic_exchange_n(&service->broken, FALSE, __ATOMIC_RELAXED))
		pr_uffd_wake_all(service->uffd, service->ram, NULL);
	for (guint i = 0; i < service->n_threads; i++)
		if (service->threads[i].lane < path->n_lanes)
			pr_worker_set_path(&service->threads[i].worker, path);
}

void pr_fault_detach(PrFaultService *service)
{
	for (guint i = service->n_threads; i > 0; i--)
		pr_worker_set_path(&service->threads[i - 1].worker, NULL);
}

void pr_fault_notify(PrFaultService *service)
{
	notify_others(service, /* but= */ NULL);
}

void pr_fault_stop(PrFaultService *service)
{
	if (!service)
		return;
	PrBlocktime *times = service->times;
	service_free(service, 0);
	pr_blocktime_close(times, pr_fault_now_ns());
}

void pr_fault_stats(const PrFaultService *service, PrFaultStats *ret)
{
	*ret = (PrFaultStats){0};
	for (guint i = 0; i < service->n_threads; i++)
		pr_fault_stats_sum(ret, &service->threads[i].stats);
}
