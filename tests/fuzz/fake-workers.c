/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The destination's fault and pull threads, and userfaultfd, without threads and without a kernel. They hold their
 * owner to the rules: one path at a time, none when they are stopped, and nothing is woken outside of a block.
 */
#include "migration/fault.h"
#include "migration/place.h"
#include "migration/pull.h"

#define PULLED_AT_ONCE 3

struct PrFaultThread {
	PrDataPath *path;
};

struct PrPullThread {
	PrRam *ram;
	PrPullHooks hooks;
	PrDataPath *path;
};

PrFaultThread *pr_fault_start(PrRam *ram, int uffd, const PrParams *params,
			      const PrFaultHooks *hooks)
{
	g_assert(uffd >= 0);
	return g_new0(PrFaultThread, 1);
}

void pr_fault_attach(PrFaultThread *self, PrDataPath *path)
{
	g_assert(!self->path && path);
	self->path = path;
}

void pr_fault_detach(PrFaultThread *self)
{
	self->path = NULL;
}

void pr_fault_notify(PrFaultThread *self)
{
}

void pr_fault_stop(PrFaultThread *self)
{
	g_assert(!self || !self->path);
	g_free(self);
}

void pr_fault_stats(const PrFaultThread *self, PrFaultStats *ret)
{
	*ret = (PrFaultStats){.requests = 1};
}

PrPullThread *pr_pull_start(PrRam *ram, int uffd, const PrParams *params, PrFaultThread *faults,
			    const PrPullHooks *hooks)
{
	PrPullThread *self = g_new0(PrPullThread, 1);

	g_assert(uffd >= 0);
	self->ram = ram;
	self->hooks = *hooks;
	return self;
}

/* A few pages land, and as many are asked for. */
void pr_pull_attach(PrPullThread *self, PrDataPath *path)
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

void pr_pull_detach(PrPullThread *self)
{
	self->path = NULL;
}

void pr_pull_stop(PrPullThread *self)
{
	g_assert(!self || !self->path);
	g_free(self);
}

gboolean pr_place_wake(int uffd, const PrRamBlock *block, uint64_t page, uint64_t n, GError **error)
{
	g_assert(uffd >= 0 && page <= block->n_pages && n <= block->n_pages - page);
	return TRUE;
}

gboolean pr_place_expose(int uffd, const PrRamBlock *block, uint64_t page, uint64_t n,
			 GError **error)
{
	return pr_place_wake(uffd, block, page, n, error);
}

gboolean pr_place_resolve(int uffd, const PrRamBlock *block, uint64_t page, GError **error)
{
	return pr_place_wake(uffd, block, page, 1, error);
}
