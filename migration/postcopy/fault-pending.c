/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The waits of the guest's threads, from the fault to the page. Theory in fault.c. */
#include "migration/postcopy/fault-thread.h"

#include <string.h>

#include "migration/memory/bitmap.h"
#include "migration/memory/invariants.h"
#include "migration/memory/uffd.h"
#include "migration/postcopy/allocate.h"
#include "migration/postcopy/fault-stats.h"
#include "migration/postcopy/verify.h"

/* Called before a waiting bit is set for the last entry, so that whoever clears the bit sees
 * n_pending. */
static void set_n_pending(PrFaultThread *self, guint n)
{
	__atomic_store_n(&self->n_pending, n, __ATOMIC_SEQ_CST);
}

/* The guest's thread was woken: its entry goes, the last entry takes the place. */
static void complete_wait(PrFaultThread *self, PrPending *entry)
{
	int64_t now = pr_fault_now_ns();

	pr_fault_count_latency(&self->stats, now - entry->wait.since_ns);
	pr_fault_lock_stats(self->service);
	pr_blocktime_woken(self->service->times, &entry->wait, now);
	pr_fault_unlock_stats(self->service);
	*entry = self->pending[self->n_pending - 1];
	set_n_pending(self, self->n_pending - 1);
}

/* Whether the entry waits for a host page of these n pages that is whole now. */
static gboolean is_ended_by(const PrFaultThread *self, const PrPending *entry, guint index,
			    uint64_t page, uint64_t n)
{
	const PrRamBlock *block = &self->ram->blocks[index];
	guint waits_in;
	uint64_t first, one;

	pr_token_unpack(entry->token, &waits_in, &first, &one);
	return waits_in == index && first >= pr_ram_host_start(block, page) && first < page + n &&
	       pr_ram_is_whole(block, first);
}

void pr_pending_placed(PrFaultThread *self, guint index, uint64_t page, uint64_t n)
{
	for (guint i = 0; i < self->n_pending;)
		if (is_ended_by(self, &self->pending[i], index, page, n))
			complete_wait(self, &self->pending[i]);
		else
			i++;
}

void pr_pending_resolve(PrFaultThread *self, PrRamBlock *block, uint64_t page)
{
	GError *error = NULL;

	if (!pr_uffd_resolve(self->uffd, block, page, &error))
		pr_fault_note_broken(self->service, error);
}

/* ---- READs ---- */

gboolean pr_fault_may_post(const PrFaultThread *self)
{
	PrDataPath *path = self->worker.current;

	return path && !self->path_dead &&
	       self->outstanding < path->ops->max_reads(path, self->lane);
}

gboolean pr_fault_post(PrFaultThread *self, guint index, uint64_t page, uint64_t n, uint64_t flag)
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
		pr_verify_posted(self->ram->verify, pr_token_pack(index, page, n),
				 /* urgent= */ TRUE);
	return TRUE;
}

static gboolean post_for_fault(PrFaultThread *self, guint index, uint64_t page, uint64_t n)
{
	if (!pr_fault_post(self, index, page, n, 0))
		return FALSE;
	pr_fault_count(&self->stats.requests, 1);
	if (self->ram->blocks[index].per_host > 1) {
		self->huge_reads++;
		__atomic_add_fetch(&self->ram->huge_reads, 1, __ATOMIC_SEQ_CST);
	}
	__atomic_store_n(&self->ram->pull_hint, pr_token_pack(index, page, 1), __ATOMIC_RELAXED);
	return TRUE;
}

/* Posts READs of what nobody has claimed of the host page, which begins with this page. */
static void post_unclaimed(PrFaultThread *self, PrPending *entry, guint index, uint64_t page)
{
	PrRamBlock *block = &self->ram->blocks[index];
	uint64_t end = page + block->per_host, most = PR_READ_MAX / block->page_size, n;

	while (!entry->posted && pr_fault_may_post(self) &&
	       (n = pr_ram_claim_within(block, page, end, most, &page)) > 0) {
		entry->posted = block->per_host == 1;
		if (!post_for_fault(self, index, page, n))
			return;
		page += n;
	}
}

/* Asks the source for the grant of an ungranted page, once for each entry and path. */
static void request_grant(PrFaultThread *self, PrPending *entry, guint index, uint64_t page)
{
	const PrRamBlock *block = &self->ram->blocks[index];

	if (entry->grant_requested || !self->worker.current ||
	    !pr_bitmap_any(block->ungranted, page, block->per_host))
		return;
	entry->grant_requested = TRUE;
	self->service->hooks.request_grant(index, page, self->service->hooks.opaque);
}

/* Whether the verify thread has rejected the page and ended our claim. */
static gboolean was_rejected(const PrRamBlock *block, uint64_t page)
{
	return !pr_bitmap_test(block->inflight, page) && !pr_bitmap_test(block->received, page);
}

/* ---- entries ---- */

/* Does for an entry what can be done now. TRUE: its wait has ended, and the entry is gone. */
static gboolean advance(PrFaultThread *self, PrPending *entry)
{
	guint index;
	uint64_t page, n;

	pr_token_unpack(entry->token, &index, &page, &n);
	PrRamBlock *block = &self->ram->blocks[index];
	if (entry->posted && was_rejected(block, page))
		entry->posted = FALSE;
	post_unclaimed(self, entry, index, page);
	if (!entry->posted && !pr_ram_is_whole(block, page)) {
		pr_bitmap_test_and_set(block->waiting, page);
		/* A claim that ended before the bit was set has notified nobody. */
		post_unclaimed(self, entry, index, page);
		request_grant(self, entry, index, page);
	}
	if (!pr_ram_is_whole(block, page))
		return FALSE;
	pr_pending_resolve(self, block, page);
	complete_wait(self, entry);
	return TRUE;
}

void pr_pending_advance_all(PrFaultThread *self)
{
	for (guint i = 0; i < self->n_pending;)
		if (!advance(self, &self->pending[i]))
			i++;
}

gboolean pr_pending_add(PrFaultThread *self, guint index, uint64_t page, uint32_t tid)
{
	uint64_t token = pr_token_pack(index, page, 1);
	gboolean posted = FALSE, grant_requested = FALSE;

	for (guint i = 0; i < self->n_pending; i++) {
		const PrPending *other = &self->pending[i];

		if (other->token != token)
			continue;
		/* A signal ends the wait inside the kernel, and the thread faults on the page
		 * again. */
		if (other->wait.tid == tid)
			return FALSE;
		posted = posted || other->posted;
		grant_requested = grant_requested || other->grant_requested;
	}
	PrPending *entry = &self->pending[self->n_pending];
	*entry = (PrPending){.token = token, .posted = posted, .grant_requested = grant_requested};
	pr_fault_lock_stats(self->service);
	pr_blocktime_blocked(self->service->times, tid, pr_fault_now_ns(), &entry->wait);
	pr_fault_unlock_stats(self->service);
	set_n_pending(self, self->n_pending + 1);
	advance(self, entry);
	return TRUE;
}

/* ---- from a helper to the first thread ---- */

void pr_pending_hand_off(PrFaultThread *self)
{
	PrFaultService *service = self->service;

	g_mutex_lock(&service->lock);
	g_array_append_vals(service->handed_off, self->pending, self->n_pending);
	__atomic_store_n(&service->n_handed_off, service->handed_off->len, __ATOMIC_RELEASE);
	g_mutex_unlock(&service->lock);
	set_n_pending(self, 0);
	pr_worker_kick(&service->threads[0].worker);
}

gboolean pr_pending_may_adopt(const PrFaultThread *self)
{
	return self->index == 0 && self->n_pending < PR_PENDING_MAX &&
	       __atomic_load_n(&self->service->n_handed_off, __ATOMIC_ACQUIRE) > 0;
}

void pr_pending_adopt(PrFaultThread *self)
{
	PrFaultService *service = self->service;

	g_mutex_lock(&service->lock);
	guint n = MIN(service->handed_off->len, PR_PENDING_MAX - self->n_pending);
	memcpy(self->pending + self->n_pending, service->handed_off->data, n * sizeof(PrPending));
	set_n_pending(self, self->n_pending + n);
	g_array_remove_range(service->handed_off, 0, n);
	__atomic_store_n(&service->n_handed_off, service->handed_off->len, __ATOMIC_RELEASE);
	g_mutex_unlock(&service->lock);
	pr_pending_advance_all(self);
}
