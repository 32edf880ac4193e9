/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Guest RAM as the engine sees it: the RAM blocks, our own mapping of each, and their bitmaps.
 *
 * The received bitmap (destination) is the only truth about which pages are in place:
 *
 *	received bit set  ⇒  the page in the memfd is final
 *
 * Order of a placement: the data lands → the received bit is set → the in-flight bit is cleared →
 * the page is exposed to the guest (uffd.h). Nobody writes to a page whose received bit is set, and
 * a page is covered by at most one READ: whoever wants to read it claims its in-flight bit first.
 * So the engine or the path may die between any two steps: a clear bit means that the page was
 * never exposed and is read again; a set bit on a page that was never exposed costs one more fault.
 *
 * A page is PR_TARGET_PAGE bytes here, on the wire and in all bitmaps, whatever the memory consists
 * of. The kernel shows the guest a whole host page at a time, which may be a huge one: it is
 * exposed when all its pages are received. So a huge page comes in by several READs, over several
 * rails, and what of it has come survives a cut; what of it is zero does not travel; and the two
 * sides may have host pages of different sizes.
 *
 * The received bitmap lives in the state memfd (state-memfd.h), which the agent in the guest's
 * process keeps.
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

	unsigned long *received; /* destination; atomic, in the state memfd */
	unsigned long *inflight; /* destination; atomic: claimed by a reader */
	unsigned long
		*ungranted; /* destination; atomic: the source has not told yet what it is; its
				  * in-flight bit is set for so long */
	unsigned long *allocated; /* destination; atomic: allocate.c */
	unsigned long
		*waiting;     /* destination; atomic, of a host page's first page: a fault waits for
				   * somebody else's READ */
	unsigned long *dirty; /* source: not yet in place at the destination, as far as we know;
				  * the migration thread's, the return-path thread's during recovery */
} PrRamBlock;

typedef struct PrRam {
	guint n_blocks;
	PrRamBlock *blocks;
	PrRegion *regions; /* the same, for the data path */
	uint64_t total_bytes;
	uint64_t page_size_summary; /* OR of the page sizes, as in POSTCOPY_ADVISE */
	PrStateMemfd *state_memfd;  /* destination: the state memfd; NULL on the source */
	struct PrScratch *scratch;  /* destination: the other bitmaps; NULL on the source */
	struct PrAllocate *
		allocate; /* destination: NULL: whoever fills a page allocates it. Set as `verify` is */
	struct PrVerify *verify; /* destination: NULL: pages are placed as they land. Set before the
				     * workers start, and stays until they have ended */
	uint64_t received_bytes; /* destination; atomic */
	uint64_t *
		zero_bytes; /* destination; atomic, in the state memfd: of these, what never travelled */
	guint huge_reads; /* destination; atomic: READs under way for faults on huge pages. The bulk pull over their
			   * path rests meanwhile: they can use all of it */
	uint64_t pull_hint; /* destination; atomic: token of the page that faulted last, 0: none;
				  * from there the bulk pull goes on */
} PrRam;

/* Names a run of pages in 64 bits: never 0. */
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

/* The first page of the host page with this one, and the first behind that. */
static inline uint64_t pr_ram_host_start(const PrRamBlock *block, uint64_t page)
{
	return page - page % block->per_host;
}

static inline uint64_t pr_ram_host_end(const PrRamBlock *block, uint64_t page)
{
	return pr_ram_host_start(block, page) + block->per_host;
}

/* Maps all blocks. Errors: PR_MIGRATION_ERROR_SYSTEM. */
PrRam *pr_ram_new(const PrGuestBlock *blocks, guint n, PrGuestRole role, GError **error);
void pr_ram_free(PrRam *ram);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrRam, pr_ram_free)

/* Destination: goes on with the bitmaps of an engine that has died. Takes kept. The blocks are the
 * ones that it describes, in its order. */
PrRam *pr_ram_adopt(const PrGuestBlock *blocks, guint n, PrStateMemfd *kept, GError **error);

/* The block table as HELLO carries it; g_free() it. */
PrWireBlock *pr_ram_wire_blocks(const PrRam *ram);
/* Compares the peer's block table with ours: by name and size, in order. The error says which block
 * differs in what. */
gboolean pr_ram_check_blocks(const PrRam *ram, const PrWireBlock *blocks, guint n, GError **error);
/* The page at an address of the guest process's; FALSE: it is in no block. */
gboolean pr_ram_locate(const PrRam *ram, uint64_t address, guint *ret_block, uint64_t *ret_page);
PrRamBlock *pr_ram_find(const PrRam *ram, const char *idstr);
/* Whether [offset, offset + length) lies in the block, on page boundaries. */
gboolean pr_ram_block_contains(const PrRamBlock *block, uint64_t offset, uint64_t length);

/* Destination: makes all memory zero, whatever the memfds hold already: frees it, or, where it was
 * allocated beforehand (prealloc=on) or is of huge pages, clears it. Only while every access
 * faults, and before anything was received. */
gboolean pr_ram_empty(PrRam *ram, GError **error);

/* Destination: maps a part of the block where it was, which frees our page tables for it. Others
 * can use the mapping meanwhile; what is in the memfd stays. */
void pr_ram_map_anew(const PrRamBlock *block, uint64_t offset, uint64_t length);

/* Destination: claims a page for reading. FALSE: it is received, or somebody else's READ covers
 * it. */
gboolean pr_ram_claim(PrRamBlock *block, uint64_t page);
/* Claims up to max pages in a row, the first free ones at or after `from`, within the block.
 * Returns how many (0: none free from there on), the first in *ret_page. */
uint64_t pr_ram_claim_run(PrRamBlock *block, uint64_t from, uint64_t max, uint64_t *ret_page);
/* The same before `end`. */
uint64_t pr_ram_claim_within(PrRamBlock *block, uint64_t from, uint64_t end, uint64_t max,
			     uint64_t *ret_page);
/* Whether all of the host page that begins with this page is received. */
gboolean pr_ram_is_whole(const PrRamBlock *block, uint64_t first);
/* Destination: ends the waiting for the host pages that have any of n pages. Returns for how many a
 * fault waited: the fault threads are to be notified. */
uint64_t pr_ram_take_waiting(PrRamBlock *block, uint64_t page, uint64_t n);
/* The data of n claimed pages is in place: sets the received bits, then ends the claim. */
void pr_ram_received(PrRam *ram, PrRamBlock *block, uint64_t page, uint64_t n, gboolean travelled);
/* The source says that n pages are zero: those that nobody has or reads are marked received.
 * Returns how many. */
uint64_t pr_ram_zero(PrRam *ram, PrRamBlock *block, uint64_t page, uint64_t n);
/* Destination, before anybody reads: no page can be claimed until the source has told what it is,
 * by pr_ram_grant() or pr_ram_zero(). */
void pr_ram_mark_ungranted(PrRam *ram);
/* n pages may be read now: those that were ungranted may be claimed. */
void pr_ram_grant(PrRamBlock *block, uint64_t page, uint64_t n);
/* Destination: nothing is ungranted any more; pr_ram_forget_inflight() is to follow. */
void pr_ram_clear_ungranted(PrRam *ram);
/* Destination: the READ of these pages was lost, and its path is fenced: they may be claimed
 * again. */
void pr_ram_forget(PrRam *ram, uint64_t token);
/* Destination: no READ is in flight any more but those of these tokens. */
void pr_ram_forget_inflight(PrRam *ram, const uint64_t *kept, guint n_kept);
/* Everything is in place. */
gboolean pr_ram_complete(const PrRam *ram);
uint64_t pr_ram_received_bytes(const PrRam *ram);
uint64_t pr_ram_zero_bytes(const PrRam *ram);

/* The next data of the block in [from, end), in bytes, or FALSE; what lies between was never
 * touched. */
gboolean pr_ram_next_data(const PrRamBlock *block, uint64_t from, uint64_t end, PrExtent *ret);
/* Whether a page holds only zeros. */
gboolean pr_ram_page_is_zero(const PrRamBlock *block, uint64_t page);
