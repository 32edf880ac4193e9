/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Theory of operation
 *
 * One thread keeps a window of READs outstanding on the bulk lane, each of up to bulk-read-size bytes of
 * neighbouring pages that are neither in place nor covered by another READ. It walks the blocks from
 * the beginning and around; when the fault thread leaves a hint (the page it read last) the walk goes
 * on right behind it, because guests touch neighbours next.
 *
 * A fault on a page that one of our READs covers waits for that READ, so read size times window bounds
 * what a fault can wait for. max-postcopy-bandwidth limits what is posted here and nothing else.
 *
 * When a READ is in: the pages are marked received, exposed in one call, and if a fault waits in
 * their midst the fault thread is told (fault.c).
 */
#include "migration/pull.h"

#include <poll.h>
#include <unistd.h>

#include "migration/bitmap.h"
#include "migration/place.h"
#include "migration/worker.h"

#define BATCH		 32
#define PROGRESS_US	 (100 * 1000)
#define LIMITER_BURST_US (20 * 1000)

struct PrPullThread {
	PrRam *ram;
	int uffd;
	const PrParams *params;
	PrFaultThread *faults;
	PrPullHooks hooks;
	PrWorker worker;

	/* the pull thread's own */
	guint outstanding;  /* READs on the current path */
	gboolean path_dead; /* it refused a READ: wait to be detached */
	guint block;	    /* where the walk stands */
	uint64_t page;
	uint64_t hint;	    /* the last one followed */
	uint64_t rate;	    /* the limiter's, bytes a second; 0: none */
	gint64 allowed_us;  /* the limiter lets the next READ go at this time */
	gint64 reported_us; /* the last progress hook */
	gboolean broken;
};

static void place(PrPullThread *self, uint64_t token)
{
	g_autoptr(GError) error = NULL;
	guint index;
	uint64_t page, n;

	pr_token_unpack(token, &index, &page, &n);
	PrRamBlock *block = &self->ram->blocks[index];
	pr_ram_received(self->ram, block, page, n, /* travelled= */ TRUE);
	if (!pr_place_expose(self->uffd, block, page, n, &error) && !self->broken) {
		self->broken = TRUE;
		self->hooks.broken(error, self->hooks.opaque);
	}
	if (pr_bitmap_any(block->waiting, page, n)) {
		pr_bitmap_clear(block->waiting, page, n);
		pr_fault_notify(self->faults);
	}
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
	self->outstanding -= n;
	if (n > 0 && pr_ram_complete(self->ram))
		self->hooks.complete(self->hooks.opaque);
	return n;
}

static void follow_hint(PrPullThread *self)
{
	uint64_t n, hint = __atomic_load_n(&self->ram->pull_hint, __ATOMIC_RELAXED);

	if (hint == self->hint)
		return;
	self->hint = hint;
	pr_token_unpack(hint, &self->block, &self->page, &n);
}

/* Claims the next run of pages, walking around all blocks once. */
static gboolean claim_next(PrPullThread *self, guint *ret_block, uint64_t *ret_page,
			   uint64_t *ret_n)
{
	uint64_t bytes = pr_param(self->params, PR_PARAM_BULK_READ_SIZE);

	follow_hint(self);
	for (guint tried = 0; tried <= self->ram->n_blocks; tried++) {
		PrRamBlock *block = &self->ram->blocks[self->block];
		uint64_t max = MAX(1, bytes / block->page_size);
		uint64_t n = pr_ram_claim_run(block, self->page, max, ret_page);
		if (n > 0) {
			*ret_block = self->block;
			*ret_n = n;
			self->page = *ret_page + n;
			return TRUE;
		}
		self->block = (self->block + 1) % self->ram->n_blocks;
		self->page = 0;
	}
	return FALSE;
}

/* A new rate counts from now on; what the old one still owed is forgiven. */
static void follow_rate(PrPullThread *self, gint64 now)
{
	uint64_t rate = pr_param(self->params, PR_PARAM_MAX_POSTCOPY_BANDWIDTH);

	if (rate == self->rate)
		return;
	self->rate = rate;
	self->allowed_us = now;
}

static void charge_limiter(PrPullThread *self, uint64_t bytes, gint64 now)
{
	if (self->rate == 0)
		return;
	self->allowed_us = MAX(self->allowed_us, now - LIMITER_BURST_US) +
			   (gint64)((double)bytes * G_USEC_PER_SEC / (double)self->rate);
}

static guint post_some(PrPullThread *self, gint64 now)
{
	PrDataPath *path = self->worker.current;
	guint window = (guint)pr_param(self->params, PR_PARAM_BULK_WINDOW);
	guint posted = 0;

	follow_rate(self, now);
	window = MIN(window, path->ops->max_reads(path, PR_LANE_BULK));
	while (!self->path_dead && self->outstanding < window && now >= self->allowed_us) {
		guint index;
		uint64_t page, n;
		if (!claim_next(self, &index, &page, &n))
			break;
		uint32_t page_size = self->ram->blocks[index].page_size;
		/* When the path refuses it, the claim stays until the fence. */
		self->path_dead = !path->ops->post_read(path, PR_LANE_BULK, index, page * page_size,
							(uint32_t)(n * page_size),
							pr_token_pack(index, page, n));
		if (self->path_dead)
			break;
		self->outstanding++;
		posted++;
		charge_limiter(self, n * page_size, now);
	}
	return posted;
}

static void report(PrPullThread *self, gint64 now)
{
	if (now - self->reported_us < PROGRESS_US)
		return;
	self->reported_us = now;
	self->hooks.progress(self->hooks.opaque);
}

static int sleep_ms(const PrPullThread *self, gint64 now)
{
	if (!self->worker.current)
		return -1;
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
	poll(fds, G_N_ELEMENTS(fds), sleep_ms(self, now));
}

/* FALSE: the thread is to end. */
static gboolean obey(PrPullThread *self)
{
	gboolean switched;
	gboolean go_on = pr_worker_obey(&self->worker, &switched);

	if (switched) {
		self->outstanding = 0;
		self->path_dead = FALSE;
	}
	return go_on;
}

static gpointer pull_thread(gpointer opaque)
{
	PrPullThread *self = opaque;

	for (;;) {
		if (pr_worker_was_kicked(&self->worker) && !obey(self))
			return NULL;
		gint64 now = g_get_monotonic_time();
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

PrPullThread *pr_pull_start(PrRam *ram, int uffd, const PrParams *params, PrFaultThread *faults,
			    const PrPullHooks *hooks)
{
	PrPullThread *self = g_new0(PrPullThread, 1);

	self->ram = ram;
	self->uffd = uffd;
	self->params = params;
	self->faults = faults;
	self->hooks = *hooks;
	pr_worker_start(&self->worker, "pull", pull_thread, self);
	return self;
}

void pr_pull_attach(PrPullThread *self, PrDataPath *path)
{
	pr_worker_set_path(&self->worker, path);
}

void pr_pull_detach(PrPullThread *self)
{
	pr_worker_set_path(&self->worker, NULL);
}

void pr_pull_stop(PrPullThread *self)
{
	if (!self)
		return;
	pr_worker_stop(&self->worker);
	g_free(self);
}
