/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Guest RAM as the engine sees it: the RAM blocks, the engine's mapping of each, and their bitmaps.
 *
 * The received bitmap (destination) is the only record of which pages are in place:
 *
 *	received bit set  ⇒  the page in the memfd is final
 *
 * A page is placed in this order: the data lands, the received bit is set, the in-flight bit is
 * cleared, the page is exposed to the guest (postcopy/place.h). Nobody writes to a page whose
 * received bit is set. A page is covered by at most one READ: the reader first claims the page's
 * in-flight bit. So the engine or the path may die between any two steps. A clear bit means that
 * the page was never exposed, and it is read again. A set bit on a page that was never exposed
 * costs one more fault.
 *
 * A page is PR_TARGET_PAGE bytes here, on the wire and in all bitmaps, whatever pages the memory
 * consists of. The kernel shows the guest a whole host page at a time, which may be a huge one. It
 * is exposed when all its pages are received. So a huge page comes in by several READs, over
 * several rails. The part that has come survives a lost path, and zeros in it do not travel. The
 * two sides may have host pages of different sizes.
 *
 * The received bitmap is in the state memfd (state-memfd.h), which the agent in the guest's process
 * keeps.
 */
#pragma once

#include <glib.h>
#include <stdint.h>

#include "guest/guest.h"
#include "migration/memory/state-memfd.h"
#include "transport/extents.h"
#include "transport/transport.h"

typedef struct PrRamBlock {
	char *idstr;
	uint64_t size;	    /* bytes */
	uint32_t page_size; /* bytes: PR_TARGET_PAGE */
	uint64_t n_pages;
	uint64_t per_host; /* pages that the kernel maps at once: 1, or those of a huge page */
	uint64_t base;	   /* guest process's address of the block */
	int memfd;	   /* the guest object's */
	uint64_t memfd_offset;
	uint8_t *host; /* our mapping: read-only on the source */

	/* Destination; atomic. */
	unsigned long *received; /* in the state memfd */
	unsigned long *inflight; /* claimed by a reader */
	unsigned long
		*ungranted; /* the source has not granted the page; its in-flight bit is set */
	unsigned long *allocated; /* allocate.c */
	unsigned long *waiting;	  /* of a host page's first page: a fault waits for another READ */

	/* Source: pages that are not yet received at the destination, as far as is known. Owned by
	 * the migration thread, and by the return-path thread during recovery. */
	unsigned long *dirty;
} PrRamBlock;

typedef struct PrRam {
	guint n_blocks;
	PrRamBlock *blocks;
	PrRegion *regions; /* of the blocks, for the data path */
	uint64_t total_bytes;
	uint64_t page_size_summary; /* OR of the page sizes, as in POSTCOPY_ADVISE */

	/* Destination; NULL or 0 on the source. */
	PrStateMemfd *state_memfd;
	struct PrScratch *scratch; /* the bitmaps but `received` */
	/* Both are set before the workers start, and stay until they have ended. */
	struct PrAllocate *allocate; /* NULL: the thread that fills a page allocates it */
	struct PrVerify *verify;     /* NULL: pages are placed as they land */
	uint64_t received_bytes;     /* atomic */
	uint64_t *zero_bytes; /* atomic, in the state memfd: of these, what never travelled */
	guint huge_reads;     /* atomic: READs in flight for faults on huge pages (fault.c) */
	uint64_t pull_hint;   /* atomic: token of the page that faulted last; 0: none (pull.c) */
} PrRam;

/* A run of n pages of a block in 64 bits; never 0. */
static inline uint64_t pr_token_pack(guint block, uint64_t page, uint64_t n)
{
	return (uint64_t)block << 56 | n << 40 | page;
}

static inline void pr_token_unpack(uint64_t token, guint *ret_block, uint64_t *ret_page,
				   uint64_t *ret_n)
{
	*ret_block = (guint)(token >> 56);
	*ret_n = token >> 40 & 0xffff;
	*ret_page = token & ((1ull << 40) - 1);
}

/* The first page of the host page that contains this page. */
static inline uint64_t pr_ram_host_start(const PrRamBlock *block, uint64_t page)
{
	return page - page % block->per_host;
}

/* The first page behind that host page. */
static inline uint64_t pr_ram_host_end(const PrRamBlock *block, uint64_t page)
{
	return pr_ram_host_start(block, page) + block->per_host;
}

/* Maps all blocks. Errors: PR_MIGRATION_ERROR_SYSTEM. */
PrRam *pr_ram_new(const PrGuestBlock *blocks, guint n, PrGuestRole role, GError **error);
void pr_ram_free(PrRam *ram);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrRam, pr_ram_free)

/* Destination: goes on with the bitmaps of an engine that has died. Takes state. The blocks are the
 * ones that it describes, in its order. */
PrRam *pr_ram_adopt(const PrGuestBlock *blocks, guint n, PrStateMemfd *state, GError **error);

/* The block table as HELLO carries it; free it with g_free(). */
PrWireBlock *pr_ram_wire_blocks(const PrRam *ram);
/* Compares the peer's block table with ours: by name and size, in order. The error says which block
 * differs in what. */
gboolean pr_ram_check_blocks(const PrRam *ram, const PrWireBlock *blocks, guint n, GError **error);
/* The page at an address in the guest's process. FALSE: the address is in no block. */
gboolean pr_ram_locate(const PrRam *ram, uint64_t address, guint *ret_block, uint64_t *ret_page);
PrRamBlock *pr_ram_find(const PrRam *ram, const char *idstr);
/* Whether [offset, offset + length) lies in the block, on page boundaries. */
gboolean pr_ram_block_contains(const PrRamBlock *block, uint64_t offset, uint64_t length);

/* Destination: makes all memory zero, whatever the memfds hold. Pages are freed; where they were
 * allocated beforehand (prealloc=on) or are huge, they are cleared. Only while every access faults,
 * and before anything is received. */
gboolean pr_ram_empty(PrRam *ram, GError **error);

/* Destination: maps a part of the block anew at its place, which frees the page tables of the
 * engine's mapping. Other threads can use the mapping meanwhile; the memfd's contents stay. */
void pr_ram_map_anew(const PrRamBlock *block, uint64_t offset, uint64_t length);

/* Destination: claims a page for reading. FALSE: it is received, or claimed already. */
gboolean pr_ram_claim(PrRamBlock *block, uint64_t page);
/* Claims up to max pages in a row, the first free ones at or after `from`, within the block.
 * Returns how many, the first of them in *ret_page. 0: no page is free from there on. */
uint64_t pr_ram_claim_run(PrRamBlock *block, uint64_t from, uint64_t max, uint64_t *ret_page);
/* The same before `end`. */
uint64_t pr_ram_claim_within(PrRamBlock *block, uint64_t from, uint64_t end, uint64_t max,
			     uint64_t *ret_page);
/* Whether all of the host page that begins with this page is received. */
gboolean pr_ram_is_whole(const PrRamBlock *block, uint64_t first);
/* Destination: clears the waiting bits of the host pages that contain any of n pages. Returns how
 * many were set: then the fault threads have to be notified. */
uint64_t pr_ram_take_waiting(PrRamBlock *block, uint64_t page, uint64_t n);
/* The data of n claimed pages has landed: sets the received bits, then ends the claims. */
void pr_ram_received(PrRam *ram, PrRamBlock *block, uint64_t page, uint64_t n, gboolean travelled);
/* The source says that n pages are zero: marks those received that are neither received nor
 * claimed. Returns how many. */
uint64_t pr_ram_zero(PrRam *ram, PrRamBlock *block, uint64_t page, uint64_t n);
/* Destination, before any READ: no page can be claimed before pr_ram_grant() or pr_ram_zero() was
 * called for it. */
void pr_ram_mark_ungranted(PrRam *ram);
/* The source grants n pages: those that were ungranted may be claimed now. */
void pr_ram_grant(PrRamBlock *block, uint64_t page, uint64_t n);
/* Destination: no page is ungranted any more. pr_ram_forget_inflight() has to follow. */
void pr_ram_clear_ungranted(PrRam *ram);
/* Destination: the READ of these pages was lost, and its path is fenced: ends the claims. */
void pr_ram_forget(PrRam *ram, uint64_t token);
/* Destination: no READ is in flight any more but those of these tokens: ends all other claims. */
void pr_ram_forget_inflight(PrRam *ram, const uint64_t *live, guint n_live);
/* Whether every page is received. */
gboolean pr_ram_complete(const PrRam *ram);
uint64_t pr_ram_received_bytes(const PrRam *ram);
uint64_t pr_ram_zero_bytes(const PrRam *ram);

/* The next range of the block in [from, end), in bytes, that has data. FALSE: there is none. What
 * lies between was never touched. */
gboolean pr_ram_next_data(const PrRamBlock *block, uint64_t from, uint64_t end, PrExtent *ret);
/* Whether a page holds only zeros. */
gboolean pr_ram_page_is_zero(const PrRamBlock *block, uint64_t page);
