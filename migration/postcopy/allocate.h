/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The destination: pages are allocated by the guest's allocator before they are filled. Theory in
 * allocate.c. */
#pragma once

#include "migration/memory/ram.h"
#include "util/stall-watchdog.h"

typedef struct PrAllocate PrAllocate;

typedef struct PrAllocateHooks {
	/* Pages that are to be read now can't be allocated. From whoever wanted to read them; each
	 * time. */
	void (*broken)(const GError *error, void *opaque);
	void *opaque;
	PrWatchdog *watchdog;
} PrAllocateHooks;

/* socket: of an allocator (guest/allocator.h), stays the caller's. Both, and what hooks name,
 * outlive it. uffd: the guest's, of a guest that has no page yet, and into which nobody reads
 * before this returns; -1: another engine has begun with it. */
PrAllocate *pr_allocate_start(PrRam *ram, int socket, int uffd, const PrAllocateHooks *hooks,
			      GError **error);
/* Ends it: nobody allocates any more. */
void pr_allocate_stop(PrAllocate *self);

/* Before n pages are read, or registered to be. Returns at once where they are allocated, else
 * within PR_ALLOCATE_TIMEOUT_MS. FALSE: they can't be, and the hook was told. NULL: whoever fills a
 * page allocates it. bulk: what lies behind is to be read next; nobody waits for a single page of
 * it. */
gboolean pr_allocate(PrAllocate *self, guint block, uint64_t page, uint64_t n, gboolean bulk);
/* The guest runs: what is to come may be allocated ahead. NULL is harmless. */
void pr_allocate_walk(PrAllocate *self);
/* The source has told more of its RAM. NULL is harmless. */
void pr_allocate_notify(PrAllocate *self);

#define PR_ALLOCATE_TIMEOUT_MS 10000

/* Within how many 2 MiB pieces our mappings are read into, until their page tables are given
 * back. */
#define PR_ALLOCATE_PIECES_MAX 1024
