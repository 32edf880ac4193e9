/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Fake fault and pull threads of the destination, and a fake userfaultfd. They check their caller:
 * one path at a time, no path after a stop, and no wake-up outside of a RAM block.
 */
#include "migration/postcopy/fault.h"
#include "migration/memory/uffd.h"
#include "migration/postcopy/pull.h"

#define PULLED_AT_ONCE 3

struct PrFaultService {
	PrDataPath *path;
};

struct PrPull {
	int refs;
	PrRam *ram;
	PrPullHooks hooks;
	PrDataPath *path;
};

PrFaultService *pr_fault_start(PrRam *ram, int uffd, PrBlocktime *times, const PrParams *params,
			       const PrFaultHooks *hooks, GError **error)
{
	g_assert(uffd >= 0 && times);
	return g_new0(PrFaultService, 1);
}

void pr_fault_attach(PrFaultService *self, PrDataPath *path)
{
	g_assert(!self->path && path);
	self->path = path;
}

void pr_fault_detach(PrFaultService *self)
{
	self->path = NULL;
}

void pr_fault_notify(PrFaultService *self)
{
}

void pr_fault_stop(PrFaultService *self)
{
	g_assert(!self || !self->path);
	g_free(self);
}

void pr_fault_stats(const PrFaultService *self, PrFaultStats *ret)
{
	*ret = (PrFaultStats){.requests = 1};
}

PrPull *pr_pull_start(PrRam *ram, int uffd, const PrParams *params, PrFaultService *faults,
		      const PrPullHooks *hooks, GError **error)
{
	PrPull *self = g_new0(PrPull, 1);

	g_assert(uffd >= 0);
	self->refs = 1;
	self->ram = ram;
	self->hooks = *hooks;
	return self;
}

/* A few pages arrive, and as many are requested. */
void pr_pull_attach(PrPull *self, PrDataPath *path)
{
	g_assert(!self->path && path);
	self->path = path;
	for (guint i = 0; i < self->ram->n_blocks; i++) {
		PrRamBlock *block = &self->ram->blocks[i];
		uint64_t page, n = pr_ram_claim_run(block, 0, PULLED_AT_ONCE, &page);

		if (n)
			pr_ram_received(self->ram, block, page, n, TRUE);
		pr_ram_claim_run(block, 0, PULLED_AT_ONCE, &page);
	}
}

void pr_pull_detach(PrPull *self)
{
	self->path = NULL;
}

void pr_pull_notify(PrPull *self)
{
}

void pr_pull_reclaim_inflight(PrPull *self)
{
	g_assert(!self->path);
	pr_ram_forget_inflight(self->ram, NULL, 0);
}

PrPull *pr_pull_ref(PrPull *self)
{
	self->refs++;
	return self;
}

void pr_pull_unref(PrPull *self)
{
	if (self && --self->refs == 0)
		g_free(self);
}

void pr_pull_stop(PrPull *self)
{
	g_assert(!self || !self->path);
	pr_pull_unref(self);
}

/* No rail joins the bulk pull. */
gboolean pr_pull_wants_rail(PrPull *self, PrDataPath *path)
{
	return FALSE;
}

guint pr_pull_add_rail(PrPull *self, PrDataPath *path, uint64_t *bytes, GError **error)
{
	g_assert_not_reached();
}

gboolean pr_pull_rail_moves(PrPull *self, guint id, gint64 within_us)
{
	g_assert_not_reached();
}

gboolean pr_pull_drain_rail(PrPull *self, guint id, gint64 deadline)
{
	g_assert_not_reached();
}

void pr_pull_end_rail(PrPull *self, guint id)
{
	g_assert_not_reached();
}

void pr_pull_reclaim_rail(PrPull *self, guint id)
{
	g_assert_not_reached();
}

gboolean pr_uffd_continue(int uffd, const PrRamBlock *block, uint64_t page, uint64_t n,
			  GError **error)
{
	g_assert(uffd >= 0 && page <= block->n_pages && n <= block->n_pages - page);
	return TRUE;
}

gboolean pr_uffd_resolve(int uffd, const PrRamBlock *block, uint64_t page, GError **error)
{
	return pr_uffd_continue(uffd, block, page, 1, error);
}

gboolean pr_uffd_wake_all(int uffd, const PrRam *ram, GError **error)
{
	return TRUE;
}
