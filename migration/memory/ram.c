/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/memory/ram.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "migration/memory/bitmap.h"
#include "migration/memory/invariants.h"
#include "migration/core/types.h"
#include "migration/memory/scratch.h"

#define CLEAR_STEP (64ull << 20) /* bytes */

static void set_system_error(GError **error, const char *what, const char *idstr)
{
	int code = errno;

	g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_SYSTEM, "RAM block %s: %s: %s",
		    idstr, what, g_strerror(code));
}

static gboolean map_block(PrRamBlock *block, const PrGuestBlock *from, PrGuestRole role,
			  GError **error)
{
	int prot = role == PR_GUEST_SOURCE ? PROT_READ : PROT_READ | PROT_WRITE;

	block->idstr = g_strdup(from->idstr);
	block->size = from->size;
	block->page_size = PR_TARGET_PAGE;
	block->n_pages = from->size / PR_TARGET_PAGE;
	block->per_host = from->page_size / PR_TARGET_PAGE;
	block->base = from->base;
	block->memfd = from->memfd;
	block->memfd_offset = from->memfd_offset;

	void *map = mmap(NULL, from->size, prot, MAP_SHARED | MAP_NORESERVE, from->memfd,
			 (off_t)from->memfd_offset);
	if (map == MAP_FAILED) {
		set_system_error(error, "mmap of its memfd", from->idstr);
		return FALSE;
	}
	/* A core dump of the engine must not contain guest memory. */
	(void)madvise(map, from->size, MADV_DONTDUMP);
	block->host = map;
	return TRUE;
}

static gsize bitmap_bytes(const PrRamBlock *block)
{
	return pr_bitmap_words(block->n_pages) * sizeof(unsigned long);
}

static gboolean make_bitmaps(PrRam *ram, GError **error)
{
	gsize bytes = 0;

	for (guint i = 0; i < ram->n_blocks; i++)
		bytes += 4 * pr_scratch_need(bitmap_bytes(&ram->blocks[i]));
	ram->scratch = pr_scratch_new(bytes);
	if (!ram->scratch) {
		set_system_error(error, "its bitmaps", ram->blocks[0].idstr);
		return FALSE;
	}
	for (guint i = 0; i < ram->n_blocks; i++) {
		PrRamBlock *block = &ram->blocks[i];

		block->inflight = pr_scratch_take(ram->scratch, bitmap_bytes(block));
		block->ungranted = pr_scratch_take(ram->scratch, bitmap_bytes(block));
		block->allocated = pr_scratch_take(ram->scratch, bitmap_bytes(block));
		block->waiting = pr_scratch_take(ram->scratch, bitmap_bytes(block));
	}
	return TRUE;
}

/* Takes state. Pages that are received there are received. */
static gboolean use_state(PrRam *ram, PrStateMemfd *state, gboolean adopted, GError **error)
{
	ram->state_memfd = state;
	ram->zero_bytes = pr_state_memfd_zero_bytes(state);
	if (!make_bitmaps(ram, error))
		return FALSE;
	for (guint i = 0; i < ram->n_blocks; i++) {
		PrRamBlock *block = &ram->blocks[i];

		block->received = pr_state_memfd_received(state, i);
		/* Reading a new bitmap would allocate it, and charge this engine for it
		 * (allocate.h). */
		if (adopted)
			ram->received_bytes +=
				pr_bitmap_count(block->received, block->n_pages) * block->page_size;
	}
	/* The last engine may have died between setting bits and counting them. */
	*ram->zero_bytes = MIN(*ram->zero_bytes, ram->received_bytes);
	return TRUE;
}

static PrRam *map_blocks(const PrGuestBlock *blocks, guint n, PrGuestRole role, GError **error)
{
	g_autoptr(PrRam) ram = g_new0(PrRam, 1);

	g_assert(n <= PR_BLOCKS_MAX);
	ram->blocks = g_new0(PrRamBlock, n);
	ram->regions = g_new0(PrRegion, n);
	for (guint i = 0; i < n; i++) {
		PrRamBlock *block = &ram->blocks[i];
		ram->n_blocks = i + 1;
		if (!map_block(block, &blocks[i], role, error))
			return NULL;
		ram->regions[i] =
			(PrRegion){block->host, block->size, block->memfd, block->memfd_offset};
		ram->total_bytes += block->size;
		ram->page_size_summary |= blocks[i].page_size;
		if (role == PR_GUEST_SOURCE) {
			block->dirty = pr_bitmap_new(block->n_pages);
			if (!block->dirty) {
				errno = ENOMEM;
				set_system_error(error, "its dirty bitmap", block->idstr);
				return NULL;
			}
			pr_bitmap_set(block->dirty, 0, block->n_pages);
		}
	}
	return g_steal_pointer(&ram);
}

PrRam *pr_ram_new(const PrGuestBlock *blocks, guint n, PrGuestRole role, GError **error)
{
	g_autoptr(PrRam) ram = map_blocks(blocks, n, role, error);

	if (ram && role == PR_GUEST_DESTINATION) {
		PrStateMemfd *state = pr_state_memfd_new(blocks, n, error);

		if (!state || !use_state(ram, state, /* adopted= */ FALSE, error))
			return NULL;
	}
	return g_steal_pointer(&ram);
}

PrRam *pr_ram_adopt(const PrGuestBlock *blocks, guint n, PrStateMemfd *state, GError **error)
{
	g_autoptr(PrRam) ram = map_blocks(blocks, n, PR_GUEST_DESTINATION, error);

	if (!ram) {
		pr_state_memfd_free(state);
		return NULL;
	}
	return use_state(ram, state, /* adopted= */ TRUE, error) ? g_steal_pointer(&ram) : NULL;
}

void pr_ram_free(PrRam *ram)
{
	if (!ram)
		return;
	for (guint i = 0; i < ram->n_blocks; i++) {
		PrRamBlock *block = &ram->blocks[i];
		if (block->host)
			munmap(block->host, block->size);
		g_free(block->idstr);
		g_free(block->dirty);
	}
	pr_state_memfd_free(ram->state_memfd);
	pr_scratch_free(ram->scratch);
	g_free(ram->blocks);
	g_free(ram->regions);
	g_free(ram);
}

PrWireBlock *pr_ram_wire_blocks(const PrRam *ram)
{
	PrWireBlock *out = g_new0(PrWireBlock, ram->n_blocks);

	for (guint i = 0; i < ram->n_blocks; i++) {
		g_strlcpy(out[i].idstr, ram->blocks[i].idstr, sizeof(out[i].idstr));
		out[i].size = ram->blocks[i].size;
		out[i].page_size = (uint32_t)ram->blocks[i].per_host * PR_TARGET_PAGE;
	}
	return out;
}

static gboolean check_block(const PrRamBlock *ours, const PrWireBlock *theirs, GError **error)
{
	if (strcmp(ours->idstr, theirs->idstr) != 0)
		g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_MISMATCH,
			    "RAM block \"%s\" of the source is \"%s\" at the destination; give the "
			    "memory backends the same ids in the same order on both sides",
			    theirs->idstr, ours->idstr);
	else if (ours->size != theirs->size)
		g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_MISMATCH,
			    "RAM block \"%s\": the source has %" G_GUINT64_FORMAT
			    " bytes, the destination %" G_GUINT64_FORMAT
			    "; use the same size on both sides",
			    ours->idstr, theirs->size, ours->size);
	else
		return TRUE;
	return FALSE;
}

gboolean pr_ram_check_blocks(const PrRam *ram, const PrWireBlock *blocks, guint n, GError **error)
{
	for (guint i = 0; i < MIN(n, ram->n_blocks); i++)
		if (!check_block(&ram->blocks[i], &blocks[i], error))
			return FALSE;
	if (n != ram->n_blocks) {
		const char *extra =
			n > ram->n_blocks ? blocks[ram->n_blocks].idstr : ram->blocks[n].idstr;
		g_set_error(
			error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_MISMATCH,
			"RAM block \"%s\" exists only at the %s (%u blocks at the source, %u at "
			"the destination)",
			extra, n > ram->n_blocks ? "source" : "destination", n, ram->n_blocks);
		return FALSE;
	}
	return TRUE;
}

PrRamBlock *pr_ram_find(const PrRam *ram, const char *idstr)
{
	for (guint i = 0; i < ram->n_blocks; i++)
		if (strcmp(ram->blocks[i].idstr, idstr) == 0)
			return &ram->blocks[i];
	return NULL;
}

gboolean pr_ram_locate(const PrRam *ram, uint64_t address, guint *ret_block, uint64_t *ret_page)
{
	for (guint i = 0; i < ram->n_blocks; i++) {
		const PrRamBlock *block = &ram->blocks[i];

		if (address < block->base || address - block->base >= block->size)
			continue;
		*ret_block = i;
		*ret_page = (address - block->base) / block->page_size;
		return TRUE;
	}
	return FALSE;
}

gboolean pr_ram_block_contains(const PrRamBlock *block, uint64_t offset, uint64_t length)
{
	return offset <= block->size && length <= block->size - offset &&
	       offset % block->page_size == 0 && length % block->page_size == 0;
}

void pr_ram_map_anew(const PrRamBlock *block, uint64_t offset, uint64_t length)
{
	uint8_t *at = block->host + offset;

	(void)madvise(at, length, MADV_DONTNEED);
	/* The bare system call, because ThreadSanitizer takes mmap() for a write to the memory; the
	 * contents stay as they are. */
	if (syscall(SYS_mmap, at, length, PROT_READ | PROT_WRITE,
		    MAP_SHARED | MAP_NORESERVE | MAP_FIXED, block->memfd,
		    (off_t)(block->memfd_offset + offset)) < 0)
		g_critical("RAM block %s: mapping a part of it anew: %s", block->idstr,
			   g_strerror(errno));
	(void)madvise(at, length, MADV_DONTDUMP);
}

/* Clears the range, and keeps what is allocated or reserved. */
static void clear_range(PrRamBlock *block, uint64_t start, uint64_t end)
{
	PrExtent data = {.end = start};

	while (pr_ram_next_data(block, data.end, end, &data))
		for (uint64_t at = data.start; at < data.end; at += block->page_size)
			if (!pr_ram_page_is_zero(block, at / block->page_size))
				memset(block->host + at, 0, block->page_size);
}

/* In steps, because the engine may have little memory for page tables. */
static void clear_block(PrRamBlock *block)
{
	uint64_t step = MAX(CLEAR_STEP, block->per_host * block->page_size);

	for (uint64_t at = 0, end; at < block->size; at = end) {
		end = MIN(at + step, block->size);
		clear_range(block, at, end);
		pr_ram_map_anew(block, at, end - at);
	}
}

gboolean pr_ram_empty(PrRam *ram, GError **error)
{
	for (guint i = 0; i < ram->n_blocks; i++) {
		PrRamBlock *block = &ram->blocks[i];

		pr_invariant_emptied(block);
		if (pr_file_is_preallocated(block->memfd)) {
			clear_block(block);
		} else if (fallocate(block->memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
				     (off_t)block->memfd_offset, (off_t)block->size) < 0) {
			set_system_error(error, "emptying its memfd", block->idstr);
			return FALSE;
		}
	}
	return TRUE;
}

gboolean pr_ram_claim(PrRamBlock *block, uint64_t page)
{
	if (pr_bitmap_test(block->received, page) || pr_bitmap_test_and_set(block->inflight, page))
		return FALSE;
	/* Between the two it may have been received. Then the claim was free again, but not the
	 * page. */
	if (pr_bitmap_test(block->received, page)) {
		pr_bitmap_test_and_clear(block->inflight, page);
		return FALSE;
	}
	return TRUE;
}

uint64_t pr_ram_claim_within(PrRamBlock *block, uint64_t from, uint64_t end, uint64_t max,
			     uint64_t *ret_page)
{
	uint64_t page = from;

	for (;;) {
		page = pr_bitmap_next_clear2(block->received, block->inflight, end, page);
		if (page >= end)
			return 0;
		if (pr_ram_claim(block, page))
			break;
		page++;
	}
	uint64_t n = 1;
	while (n < max && page + n < end && pr_ram_claim(block, page + n))
		n++;
	*ret_page = page;
	return n;
}

uint64_t pr_ram_claim_run(PrRamBlock *block, uint64_t from, uint64_t max, uint64_t *ret_page)
{
	return pr_ram_claim_within(block, from, block->n_pages, max, ret_page);
}

gboolean pr_ram_is_whole(const PrRamBlock *block, uint64_t first)
{
	uint64_t end = first + block->per_host;

	return pr_bitmap_next_clear(block->received, end, first) >= end;
}

uint64_t pr_ram_take_waiting(PrRamBlock *block, uint64_t page, uint64_t n)
{
	uint64_t start = pr_ram_host_start(block, page);

	return pr_bitmap_clear(block->waiting, start, pr_ram_host_end(block, page + n - 1) - start);
}

void pr_ram_received(PrRam *ram, PrRamBlock *block, uint64_t page, uint64_t n, gboolean travelled)
{
	pr_invariant_new(block, page, n);
	uint64_t changed = pr_bitmap_set(block->received, page, n);

	if (changed != n)
		g_critical("RAM block %s: %" G_GUINT64_FORMAT " of %" G_GUINT64_FORMAT
			   " pages at %" G_GUINT64_FORMAT " were placed twice",
			   block->idstr, n - changed, n, page);
	pr_bitmap_clear(block->inflight, page, n);
	__atomic_fetch_add(&ram->received_bytes, changed * block->page_size, __ATOMIC_SEQ_CST);
	if (!travelled)
		__atomic_fetch_add(ram->zero_bytes, changed * block->page_size, __ATOMIC_RELAXED);
}

/* Makes pages of a word granted. Returns those that were ungranted. */
static unsigned long clear_ungranted(PrRamBlock *block, uint64_t index, unsigned long mask)
{
	return mask & __atomic_fetch_and(&block->ungranted[index], ~mask, __ATOMIC_SEQ_CST);
}

void pr_ram_mark_ungranted(PrRam *ram)
{
	for (guint i = 0; i < ram->n_blocks; i++) {
		PrRamBlock *block = &ram->blocks[i];

		pr_bitmap_set(block->inflight, 0, block->n_pages);
		pr_bitmap_set(block->ungranted, 0, block->n_pages);
	}
}

void pr_ram_grant(PrRamBlock *block, uint64_t page, uint64_t n)
{
	uint64_t end = page + n;

	for (uint64_t i = page / PR_LONG_BITS; i < pr_bitmap_words(end); i++) {
		unsigned long mine = clear_ungranted(block, i, pr_bitmap_span(i, page, end));

		__atomic_fetch_and(&block->inflight[i], ~mine, __ATOMIC_SEQ_CST);
	}
}

void pr_ram_clear_ungranted(PrRam *ram)
{
	for (guint i = 0; i < ram->n_blocks; i++)
		pr_bitmap_clear(ram->blocks[i].ungranted, 0, ram->blocks[i].n_pages);
}

uint64_t pr_ram_zero(PrRam *ram, PrRamBlock *block, uint64_t page, uint64_t n)
{
	uint64_t changed = 0, end = page + n;

	/* A word at a time, because holes are large; otherwise as pr_ram_claim() and
	 * pr_ram_received() do it for a page. The claim of an ungranted page belongs to the thread
	 * that clears its ungranted bit. */
	for (uint64_t i = page / PR_LONG_BITS; i < pr_bitmap_words(end); i++) {
		unsigned long mask = pr_bitmap_span(i, page, end);
		unsigned long ungranted = mask & clear_ungranted(block, i, mask);
		unsigned long others =
			__atomic_fetch_or(&block->inflight[i], mask, __ATOMIC_SEQ_CST);
		unsigned long mine = (mask & ~others) | ungranted;
		unsigned long have = __atomic_load_n(&block->received[i], __ATOMIC_SEQ_CST);

		__atomic_fetch_or(&block->received[i], mine, __ATOMIC_SEQ_CST);
		__atomic_fetch_and(&block->inflight[i], ~mine, __ATOMIC_SEQ_CST);
		changed += (uint64_t)__builtin_popcountl(mine & ~have);
	}
	__atomic_fetch_add(ram->zero_bytes, changed * block->page_size, __ATOMIC_RELAXED);
	__atomic_fetch_add(&ram->received_bytes, changed * block->page_size, __ATOMIC_SEQ_CST);
	return changed;
}

void pr_ram_forget(PrRam *ram, uint64_t token)
{
	guint index;
	uint64_t page, n;

	pr_token_unpack(token, &index, &page, &n);
	pr_bitmap_clear(ram->blocks[index].inflight, page, n);
}

/* The first of the live runs in a block at or after `from`. Without one: no pages, at the block's
 * end. */
static void next_live(const PrRam *ram, guint index, uint64_t from, const uint64_t *live,
		      guint n_live, uint64_t *ret_page, uint64_t *ret_n)
{
	*ret_page = ram->blocks[index].n_pages;
	*ret_n = 0;
	for (guint i = 0; i < n_live; i++) {
		guint of;
		uint64_t page, n;

		pr_token_unpack(live[i], &of, &page, &n);
		if (of != index || page < from || page >= *ret_page)
			continue;
		*ret_page = page;
		*ret_n = n;
	}
}

void pr_ram_forget_inflight(PrRam *ram, const uint64_t *live, guint n_live)
{
	for (guint i = 0; i < ram->n_blocks; i++) {
		uint64_t from = 0, page, n;

		do {
			next_live(ram, i, from, live, n_live, &page, &n);
			pr_bitmap_clear(ram->blocks[i].inflight, from, page - from);
			from = page + n;
		} while (n > 0);
	}
}

uint64_t pr_ram_received_bytes(const PrRam *ram)
{
	return __atomic_load_n(&ram->received_bytes, __ATOMIC_SEQ_CST);
}

uint64_t pr_ram_zero_bytes(const PrRam *ram)
{
	return ram->zero_bytes ? __atomic_load_n(ram->zero_bytes, __ATOMIC_RELAXED) : 0;
}

gboolean pr_ram_complete(const PrRam *ram)
{
	return pr_ram_received_bytes(ram) == ram->total_bytes;
}

gboolean pr_ram_next_data(const PrRamBlock *block, uint64_t from, uint64_t end, PrExtent *ret)
{
	return pr_extent_next(block->memfd, block->memfd_offset, from, MIN(end, block->size), ret);
}

gboolean pr_ram_page_is_zero(const PrRamBlock *block, uint64_t page)
{
	const uint64_t *words = (const uint64_t *)(block->host + page * block->page_size);
	gsize n = block->page_size / sizeof(*words);

	/* Most pages that are not zero show it early. A round reads one cache line of 64 bytes. */
	for (gsize i = 0; i < n; i += 8) {
		uint64_t bits = words[i] | words[i + 1] | words[i + 2] | words[i + 3];
		bits |= words[i + 4] | words[i + 5] | words[i + 6] | words[i + 7];
		if (bits)
			return FALSE;
	}
	return TRUE;
}
