/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Theory of operation
 *
 * A thread reads faults from the guest's userfaultfd and posts READs of the missing pages on its
 * urgent lane; it also takes their completions, so that nothing stands between a page's arrival and
 * waking the vCPU that waits for it.
 *
 * There may be several such threads. The first one always looks for faults. The others are its helpers: they
 * sleep until a thread finds more than one fault unread (then vCPUs wait for a thread, not for pages), and from then
 * on look for faults, too, each served by whoever reads it, until there has been nothing to do for fault-spin
 * microseconds. So faults that come one at a time cost what they cost with one thread, and nobody is woken to find
 * that another thread was faster. Each helper has a lane of its own, or else it stays out: where the path
 * has fewer urgent lanes, and where there is no path, which is when the first one takes what a helper has pending.
 * The threads share a lock for the books (readahead.h, blocktime.h), and otherwise only what they share
 * with the pull threads: the bitmaps.
 *
 * A fault is one of four:
 *  - on a page that is in place (received bit set): resolved here at once, path or no path. So the
 *    guest runs on with what it has while the migration is paused, zero pages included.
 *  - on a page that nobody reads yet: claimed, posted, kept in `pending` until it lands.
 *  - on a page that is veiled: the source has not told yet what it is (pr_ram_mark_ungranted()). It is asked to look there first.
 *    From then on the page is like one of the next kind: whoever takes the veil off notifies us.
 *  - on a page that another thread's READ covers, a pull thread's or another fault thread's: kept in `pending`,
 *    its `waiting` bit is set. The other thread exposes the page, which wakes the vCPU, and notifies us so that we
 *    take the time. Both sides use sequentially consistent bit operations: either we see `received` after we set
 *    `waiting`, or the other thread sees `waiting` after it set `received`. It notifies those threads alone that
 *    have something pending, and there is something pending from before the bit is set.
 *
 * A fault on a huge page is one for all its pages (ram.h): whichever of them nobody reads yet are claimed and posted, as far
 * as the lane has room, the others are waited for as above. It is settled when the last of them is in, whoever brought it.
 * While such READs are on their way the bulk pull over the same path rests.
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
 * until there is room. The fault path allocates nothing, and takes no lock but, with several threads, the books' for a
 * moment, unless it has to ask about a veiled page, or to tell the pull that huge pages are in.
 *
 * A thread polls without sleeping for fault-spin microseconds after the last event: a page is about to
 * come in, or the vCPU that was just woken is about to fault again. A fault that is reported again while it is pending
 * is no event; of many, the first thread rests (repeats.h), which completions and kicks end.
 */
#include "migration/postcopy/fault.h"

#include <linux/userfaultfd.h>
#include <poll.h>
#include <sched.h>
#include <string.h>
#include <unistd.h>

#include "migration/postcopy/allocate.h"
#include "migration/memory/bitmap.h"
#include "migration/postcopy/fault-stats.h"
#include "migration/memory/invariants.h"
#include "migration/memory/uffd.h"
#include "migration/postcopy/place.h"
#include "migration/postcopy/readahead.h"
#include "migration/postcopy/repeats.h"
#include "migration/postcopy/verify.h"
#include "migration/postcopy/worker.h"

#define MAX_PENDING 4096
#define BATCH	    64
#define MAX_PLANS   8
#define AHEAD	    (1ull << 55) /* marks the token of a READ ahead; the number of pages stays below */
G_STATIC_ASSERT(PR_READ_MAX / 4096 < AHEAD >> 40);

typedef struct Pending {
	uint64_t token;
	PrPageWait wait;
	gboolean asked;	 /* the source was asked what the page is */
	gboolean posted; /* by us: its page is covered by our READ; never of a huge one */
} Pending;

typedef struct PrFaultThread {
	PrFaultService *service;
	guint index; /* constant, as is lane; 0: the first */
	PrLaneId lane;
	/* constant, as in PrFaultService */
	PrRam *ram;
	int uffd;
	const PrParams *params;
	PrWorker worker;
	int asleep; /* atomic: a helper that is to be woken when there are many faults */

	/* the thread's own */
	Pending pending[MAX_PENDING];
	guint n_pending;		 /* atomic: others look whether there are any */
	guint outstanding;		 /* READs on the current path */
	guint huge_reads;		 /* of these, for faults on huge pages */
	gboolean path_dead;		 /* it refused a READ: wait to be detached */
	PrReadaheadRun plans[MAX_PLANS]; /* to be read ahead, oldest first */
	guint n_plans;
	uint64_t ahead_pages; /* on their way */
	PrWatch *watch;
	gboolean uffd_dead;
	PrRepeats repeats;

	PrFaultStats stats; /* written by the thread, atomic */
} PrFaultThread;

struct PrFaultService {
	/* constant */
	PrRam *ram;
	int uffd;
	const PrParams *params;
	PrFaultHooks hooks;
	guint n_threads;
	PrFaultThread *threads;

	int broken; /* atomic: the hook was told */

	GMutex lock;  /* protects what follows; taken last */
	GArray *left; /* Pending, by helpers without a lane, for the first thread to take over */
	guint n_left; /* of them; atomic, written under the lock */

	GMutex books; /* protects what follows where there are several threads; taken last */
	PrBlocktime *times;
	PrReadahead readahead;
};

static const PrWatchPoint serving = {"serving faults", 500};

static gint64 now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000000000ll + ts.tv_nsec;
}

static void note_broken(PrFaultThread *self, GError *error)
{
	PrFaultService *service = self->service;

	if (!__atomic_exchange_n(&service->broken, TRUE, __ATOMIC_RELAXED))
		service->hooks.broken(error, service->hooks.opaque);
	g_error_free(error);
}

static void lock_books(PrFaultService *service)
{
	if (service->n_threads > 1)
		g_mutex_lock(&service->books);
}

static void unlock_books(PrFaultService *service)
{
	if (service->n_threads > 1)
		g_mutex_unlock(&service->books);
}

/* Before a waiting bit is set for the last entry. */
static void set_n_pending(PrFaultThread *self, guint n)
{
	__atomic_store_n(&self->n_pending, n, __ATOMIC_SEQ_CST);
}

/* The thread was woken: the entry goes, the last one takes its place. */
static void settle(PrFaultThread *self, Pending *entry)
{
	gint64 now = now_ns();

	pr_fault_count_latency(&self->stats, now - entry->wait.since_ns);
	lock_books(self->service);
	pr_blocktime_woken(self->service->times, &entry->wait, now);
	unlock_books(self->service);
	*entry = self->pending[self->n_pending - 1];
	set_n_pending(self, self->n_pending - 1);
}

/* Whether it waits for a host page of these n pages', and that is whole now. */
static gboolean has_come(const PrFaultThread *self, const Pending *entry, guint index,
			 uint64_t page, uint64_t n)
{
	const PrRamBlock *block = &self->ram->blocks[index];
	guint waits_in;
	uint64_t first, one;

	pr_token_unpack(entry->token, &waits_in, &first, &one);
	return waits_in == index && first >= pr_ram_host_start(block, page) && first < page + n &&
	       pr_ram_is_whole(block, first);
}

/* n pages have come in. */
static void settle_all(PrFaultThread *self, guint index, uint64_t page, uint64_t n)
{
	for (guint i = 0; i < self->n_pending;)
		if (has_come(self, &self->pending[i], index, page, n))
			settle(self, &self->pending[i]);
		else
			i++;
}

static void resolve(PrFaultThread *self, PrRamBlock *block, uint64_t page)
{
	GError *error = NULL;

	if (!pr_uffd_resolve(self->uffd, block, page, &error))
		note_broken(self, error);
}

/* Posts the READ of claimed pages. When the path refuses it, the claim stays until the fence. */
static gboolean post(PrFaultThread *self, guint index, uint64_t page, uint64_t n, uint64_t flag)
{
	uint64_t page_size = self->ram->blocks[index].page_size;
	PrDataPath *path = self->worker.current;

	pr_invariant_claimed(&self->ram->blocks[index], page, n, "a READ is posted for a fault");
	if (!pr_allocate(self->ram->allocate, index, page, n, /* bulk= */ FALSE) ||
	    !path->ops->post_read(path, self->lane, index, page * page_size,
				  (uint32_t)(n * page_size),
				  pr_token_pack(index, page, n) | flag)) {
		self->path_dead = TRUE;
		return FALSE;
	}
	self->outstanding++;
	if (self->ram->verify)
		pr_verify_want(self->ram->verify, pr_token_pack(index, page, n),
			       /* urgent= */ TRUE);
	return TRUE;
}

static gboolean post_faulting(PrFaultThread *self, guint index, uint64_t page, uint64_t n)
{
	if (!post(self, index, page, n, 0))
		return FALSE;
	pr_fault_count(&self->stats.requests, 1);
	if (self->ram->blocks[index].per_host > 1) {
		self->huge_reads++;
		__atomic_add_fetch(&self->ram->huge_reads, 1, __ATOMIC_SEQ_CST);
	}
	__atomic_store_n(&self->ram->pull_hint, pr_token_pack(index, page, 1), __ATOMIC_RELAXED);
	return TRUE;
}

static gboolean may_post(const PrFaultThread *self)
{
	PrDataPath *path = self->worker.current;

	return path && !self->path_dead &&
	       self->outstanding < path->ops->max_reads(path, self->lane);
}

/* Once for each page and path. */
static void ask(PrFaultThread *self, Pending *entry, guint index, uint64_t page)
{
	const PrRamBlock *block = &self->ram->blocks[index];

	if (entry->asked || !self->worker.current ||
	    !pr_bitmap_any(block->ungranted, page, block->per_host))
		return;
	entry->asked = TRUE;
	self->service->hooks.want(index, page, self->service->hooks.opaque);
}

/* Where pages are verified, one that came in wrong is given up by the verify thread. */
static gboolean was_given_up(const PrRamBlock *block, uint64_t page)
{
	return !pr_bitmap_test(block->inflight, page) && !pr_bitmap_test(block->received, page);
}

/* page: the first of a host page. */
static void try_post(PrFaultThread *self, Pending *entry, guint index, uint64_t page)
{
	PrRamBlock *block = &self->ram->blocks[index];
	uint64_t end = page + block->per_host, most = PR_READ_MAX / block->page_size, n;

	while (!entry->posted && may_post(self) &&
	       (n = pr_ram_claim_within(block, page, end, most, &page)) > 0) {
		entry->posted = block->per_host == 1;
		if (!post_faulting(self, index, page, n))
			return;
		page += n;
	}
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
	if (!entry->posted && !pr_ram_is_whole(block, page)) {
		pr_bitmap_test_and_set(block->waiting, page);
		/* Whoever gave it up before that has not seen us. */
		try_post(self, entry, index, page);
		ask(self, entry, index, page);
	}
	if (!pr_ram_is_whole(block, page))
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

/* FALSE: it is known already. A thread may fault twice on the page that it waits for: a signal lets it
 * go in between. */
static gboolean add_pending(PrFaultThread *self, uint64_t token, uint32_t tid)
{
	gboolean posted = FALSE, asked = FALSE;

	for (guint i = 0; i < self->n_pending; i++) {
		const Pending *other = &self->pending[i];

		if (other->token != token)
			continue;
		if (other->wait.tid == tid)
			return FALSE;
		posted = posted || other->posted;
		asked = asked || other->asked;
	}
	Pending *entry = &self->pending[self->n_pending];
	*entry = (Pending){.token = token, .posted = posted, .asked = asked};
	lock_books(self->service);
	pr_blocktime_blocked(self->service->times, tid, now_ns(), &entry->wait);
	unlock_books(self->service);
	set_n_pending(self, self->n_pending + 1);
	return TRUE;
}

/* Beside MAX_PLANS newer ones a plan is too old to be of use. */
static void plan_ahead(PrFaultThread *self, uint32_t tid, guint index, uint64_t page)
{
	guint limit = (guint)pr_param(self->params, PR_PARAM_FAULT_READAHEAD);
	PrReadaheadRun run;

	/* A huge page is as much as may be read ahead. */
	if (limit == 0 || self->ram->blocks[index].per_host > 1)
		return;
	lock_books(self->service);
	if (pr_blocktime_is_other(self->service->times, tid))
		tid = PR_READAHEAD_NO_THREAD;
	pr_readahead_fault(&self->service->readahead, tid, index, page,
			   self->ram->blocks[index].n_pages, limit, &run);
	unlock_books(self->service);
	if (run.n == 0)
		return;
	if (self->n_plans == MAX_PLANS)
		memmove(self->plans, self->plans + 1, --self->n_plans * sizeof(run));
	self->plans[self->n_plans++] = run;
}

/* FALSE: it is pending already. */
static gboolean take_fault(PrFaultThread *self, const struct uffd_msg *msg)
{
	uint64_t page;
	guint index;

	if (msg->event != UFFD_EVENT_PAGEFAULT)
		return TRUE;
	if (!pr_ram_locate(self->ram, msg->arg.pagefault.address, &index, &page)) {
		note_broken(self, g_error_new(PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_SYSTEM,
					      "a fault at 0x%llx, outside of all RAM blocks",
					      msg->arg.pagefault.address));
		return TRUE;
	}
	page = pr_ram_host_start(&self->ram->blocks[index], page);
	plan_ahead(self, msg->arg.pagefault.feat.ptid, index, page);
	if (pr_ram_is_whole(&self->ram->blocks[index], page)) {
		resolve(self, &self->ram->blocks[index], page);
		return TRUE;
	}
	if (!add_pending(self, pr_token_pack(index, page, 1), msg->arg.pagefault.feat.ptid))
		return FALSE;
	advance(self, &self->pending[self->n_pending - 1]);
	return TRUE;
}

static gboolean has_room(const PrFaultThread *self)
{
	return self->n_pending + BATCH <= MAX_PENDING;
}

static gboolean may_read_faults(const PrFaultThread *self)
{
	return self->index == 0 || self->worker.current;
}

/* The next one in the row, which does likewise. */
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

/* How many faults are read at a time: of several threads none takes them all. */
static guint fault_batch(const PrFaultThread *self)
{
	return BATCH / self->service->n_threads;
}

static guint take_faults(PrFaultThread *self, guint *ret_fresh)
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
		*ret_fresh += take_fault(self, &msgs[i]) ? 1 : 0;
	if (*ret_fresh < n || self->repeats.row > 0) {
		pr_fault_count(&self->stats.repeats, n - *ret_fresh);
		pr_repeats_note(&self->repeats, n, *ret_fresh, now_ns());
	}
	return n;
}

/* How many pages may be read ahead now: half of the lane is kept for faults. */
static uint64_t room_ahead(const PrFaultThread *self)
{
	PrDataPath *path = self->worker.current;
	uint64_t limit = pr_param(self->params, PR_PARAM_FAULT_READAHEAD);

	if (!may_post(self) || self->outstanding >= path->ops->max_reads(path, self->lane) / 2)
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

		n = pr_readahead_claim(plan, block, MIN(room, most), &page);
		if (n == 0) {
			self->n_plans--;
			continue;
		}
		if (!post(self, plan->block, page, n, AHEAD))
			return;
		self->ahead_pages += n;
		pr_fault_count(&self->stats.ahead_pages, n);
	}
}

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
		note_broken(self, error);
	settle_all(self, run->index, run->page, run->n);
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

	pr_token_unpack(token & ~AHEAD, &index, &page, &n);
	PrRamBlock *block = &self->ram->blocks[index];
	pr_place_landed(block, page, n, "an urgent READ has landed");
	if (token & AHEAD)
		count_ahead_waited(self, block, page, n);
	if (self->ram->verify) {
		pr_verify_landed(self->ram->verify, token & ~AHEAD, /* rail= */ 0);
		return;
	}
	if (index != run->index || page != run->page + run->n)
		place(self, run);
	if (run->n == 0)
		*run = (Landed){.index = index, .page = page};
	run->n += n;
}

static void end_huge_reads(PrFaultThread *self, guint n)
{
	const PrFaultHooks *hooks = &self->service->hooks;

	self->huge_reads -= n;
	if (n > 0 && __atomic_sub_fetch(&self->ram->huge_reads, n, __ATOMIC_SEQ_CST) == 0)
		hooks->no_huge_read(hooks->opaque);
}

static guint take_completions(PrFaultThread *self)
{
	PrCompletion done[BATCH];
	Landed run = {0};
	guint huge = 0;
	PrDataPath *path = self->worker.current;

	if (!path || self->outstanding == 0)
		return 0;
	guint n = path->ops->poll(path, self->lane, done, BATCH);
	for (guint i = 0; i < n; i++) {
		if (done[i].token & AHEAD)
			self->ahead_pages -= (done[i].token & ~AHEAD) >> 40 & 0xffff;
		huge += self->ram->blocks[done[i].token >> 56].per_host > 1;
		if (done[i].ok)
			handle_landed(self, done[i].token, &run);
	}
	place(self, &run);
	self->outstanding -= n;
	end_huge_reads(self, huge);
	if (n > 0 && self->n_pending > 0)
		advance_all(self);
	if (n > 0 && pr_ram_complete(self->ram))
		self->service->hooks.complete(self->service->hooks.opaque);
	return n;
}

/* Helpers do not wait for faults: see above. */
static void sleep_until_event(PrFaultThread *self)
{
	PrDataPath *path = self->worker.current;
	guint rest_us = pr_repeats_take_rest(&self->repeats);
	const struct timespec rest = {.tv_nsec = rest_us * 1000l};
	gboolean faults = self->index == 0 && !self->uffd_dead && has_room(self) && rest_us == 0;
	struct pollfd fds[3] = {
		{.fd = self->worker.wake_fd, .events = POLLIN},
		{.fd = faults ? self->uffd : -1, .events = POLLIN},
		{.fd = path ? path->ops->wait_fd(path, self->lane) : -1, .events = POLLIN},
	};

	if (path && !path->ops->arm(path, self->lane))
		return;
	pr_watch_idle(self->watch);
	__atomic_store_n(&self->asleep, self->index > 0 && path, __ATOMIC_RELEASE);
	/* Ended by a fault, a completion, or a kick; or by the rest that is due. */
	int ready = ppoll(fds, G_N_ELEMENTS(fds), rest_us > 0 ? &rest : NULL, NULL);
	__atomic_store_n(&self->asleep, FALSE, __ATOMIC_RELAXED);
	if (ready < 0)
		return;
	/* Without POLLIN it can only be the end of the guest's address space. */
	if ((fds[1].revents & (POLLERR | POLLHUP | POLLNVAL)) && !(fds[1].revents & POLLIN))
		self->uffd_dead = TRUE;
}

/* The path has changed: whatever was posted on the old one is to be asked for again. */
static void restart(PrFaultThread *self)
{
	end_huge_reads(self, self->huge_reads);
	self->path_dead = FALSE;
	self->outstanding = 0;
	self->ahead_pages = 0;
	self->n_plans = 0;
	for (guint i = 0; i < self->n_pending; i++)
		self->pending[i].posted = self->pending[i].asked = FALSE;
}

/* A helper has no lane any more, so the first thread has to see to what it has pending. */
static void leave_pending(PrFaultThread *self)
{
	PrFaultService *service = self->service;

	g_mutex_lock(&service->lock);
	g_array_append_vals(service->left, self->pending, self->n_pending);
	__atomic_store_n(&service->n_left, service->left->len, __ATOMIC_RELEASE);
	g_mutex_unlock(&service->lock);
	set_n_pending(self, 0);
	pr_worker_kick(&service->threads[0].worker);
}

/* As many as there is room for. */
static void take_over_pending(PrFaultThread *self)
{
	PrFaultService *service = self->service;

	g_mutex_lock(&service->lock);
	guint n = MIN(service->left->len, MAX_PENDING - self->n_pending);
	memcpy(self->pending + self->n_pending, service->left->data, n * sizeof(Pending));
	set_n_pending(self, self->n_pending + n);
	g_array_remove_range(service->left, 0, n);
	__atomic_store_n(&service->n_left, service->left->len, __ATOMIC_RELEASE);
	g_mutex_unlock(&service->lock);
	advance_all(self);
}

static gboolean may_take_over(const PrFaultThread *self)
{
	return self->index == 0 && self->n_pending < MAX_PENDING &&
	       __atomic_load_n(&self->service->n_left, __ATOMIC_ACQUIRE) > 0;
}

/* FALSE: the thread is to end. */
static gboolean obey(PrFaultThread *self)
{
	gboolean switched;
	gboolean go_on = pr_worker_obey(&self->worker, &switched);

	if (switched)
		restart(self);
	if (self->index > 0 && !self->worker.current && self->n_pending > 0)
		leave_pending(self);
	advance_all(self);
	return go_on;
}

static gpointer fault_thread(gpointer opaque)
{
	PrFaultThread *self = opaque;
	gint64 busy_ns = now_ns();
	g_autoptr(PrWatch) watch = pr_watch_new(self->service->hooks.watchdog, "fault");

	self->watch = watch;
	for (gint64 now = busy_ns;;) {
		gboolean kicked = pr_worker_was_kicked(&self->worker);
		pr_watch_enter_at(watch, &serving, now / 1000);
		if (kicked && !obey(self))
			return NULL;
		if (may_take_over(self))
			take_over_pending(self);
		guint fresh, completions = take_completions(self);
		guint faults = take_faults(self, &fresh), work = completions + fresh;
		/* A short batch was all that there was to read. */
		if (faults < fault_batch(self) && self->n_plans > 0)
			read_ahead(self);
		now = now_ns();
		/* A helper was not woken for nothing, even if others have read those faults. */
		if (work > 0 || (kicked && self->index > 0))
			busy_ns = now;
		gint64 spin_ns = (gint64)pr_param(self->params, PR_PARAM_FAULT_SPIN) * 1000;
		if (work == 0 && now - busy_ns > spin_ns)
			sleep_until_event(self), now = now_ns();
		else if (work == 0)
			sched_yield(); /* to a vCPU or a source on the same core */
	}
}

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

/* Ends those from `first` on, and all else. */
static void service_end(PrFaultService *service, guint first)
{
	/* They kick each other. */
	for (guint i = first; i < service->n_threads; i++)
		pr_worker_end(&service->threads[i].worker);
	for (guint i = first; i < service->n_threads; i++)
		pr_worker_clear(&service->threads[i].worker);
	g_array_unref(service->left);
	g_mutex_clear(&service->lock);
	g_mutex_clear(&service->books);
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
	service->left = g_array_new(FALSE, FALSE, sizeof(Pending));
	g_mutex_init(&service->lock);
	g_mutex_init(&service->books);
	/* The helpers first: nobody wakes or notifies one that is not there. */
	for (guint i = service->n_threads; i > 0; i--)
		if (!thread_start(service, i - 1, error)) {
			service_end(service, i);
			return NULL;
		}
	return service;
}

void pr_fault_attach(PrFaultService *service, PrDataPath *path)
{
	/* Faults that could not be resolved are lost: whoever waits is to fault again. */
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
	service_end(service, 0);
	pr_blocktime_close(times, now_ns());
}

void pr_fault_stats(const PrFaultService *service, PrFaultStats *ret)
{
	*ret = (PrFaultStats){0};
	for (guint i = 0; i < service->n_threads; i++)
		pr_fault_stats_sum(ret, &service->threads[i].stats);
}
