/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Destination: the guest's allocator allocates pages before they are filled. Theory in
 * allocate.c. */
#pragma once

#include "migration/memory/ram.h"
#include "util/stall-watchdog.h"

typedef struct PrAllocate PrAllocate;

typedef struct PrAllocateHooks {
	/* Pages that are to be read now can't be allocated. From the thread that needs them, each
	 * time. */
	void (*broken)(const GError *error, void *opaque);
	void *opaque;
	PrWatchdog *watchdog;
} PrAllocateHooks;

/* socket: of an allocator (guest/allocator.h); it stays the caller's, and outlives the PrAllocate,
 * as does all that hooks name. uffd: the userfaultfd of a guest that has no page yet, and nobody
 * reads into its memory before this returns; -1: an engine has begun with the guest before. */
PrAllocate *pr_allocate_start(PrRam *ram, int socket, int uffd, const PrAllocateHooks *hooks,
			      GError **error);
/* Ends the thread and frees all. Nobody may call pr_allocate() any more. */
void pr_allocate_stop(PrAllocate *self);

/* Called before n pages are read, or registered for READs. Returns at once if they are allocated,
 * else within PR_ALLOCATE_TIMEOUT_MS. FALSE: they can't be allocated, and the hook was called. self
 * NULL: the thread that fills a page allocates it. bulk: the pages behind these are read next, and
 * nobody waits for a single one of them. */
gboolean pr_allocate(PrAllocate *self, guint block, uint64_t page, uint64_t n, gboolean bulk);
/* The guest runs: from now on pages are allocated ahead. Does nothing for NULL. */
void pr_allocate_walk(PrAllocate *self);
/* The source has granted more of its RAM. Does nothing for NULL. */
void pr_allocate_notify(PrAllocate *self);

#define PR_ALLOCATE_TIMEOUT_MS 10000

/* When READs have touched so many pieces of 2 MiB, the page tables of the engine's mappings are
 * freed. */
#define PR_ALLOCATE_PIECES_MAX 1024
