/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What need not travel: the source tells the destination which ranges of its RAM hold zeros only. Holes
 * of a memfd are found without reading them, zero pages by reading what has not arrived yet.
 */
#include "migration/memory/bitmap.h"
#include "migration/session/session.h"

#define STRETCH	     (2ull * 1024 * 1024) /* bytes; what one look decides on */
#define SAMPLED_PAGE 32			  /* one page in so many is looked at first */

typedef struct Ranges {
	PrConn *conn;
	uint32_t block;
	guint n;
	PrWireRange range[PR_RANGES_MAX];
} Ranges;

static gboolean flush_ranges(Ranges *ranges, GError **error)
{
	g_autoptr(GByteArray) body = g_byte_array_new();

	if (ranges->n == 0)
		return TRUE;
	pr_ranges_encode(body, ranges->block, ranges->range, ranges->n);
	ranges->n = 0;
	return pr_send(ranges->conn, PR_CMD_RAM_ZERO, body, error);
}

static gboolean add_range(Ranges *ranges, uint64_t offset, uint64_t length, GError **error)
{
	PrWireRange *last = ranges->n > 0 ? &ranges->range[ranges->n - 1] : NULL;

	if (last && last->offset + last->length == offset) {
		last->length += length;
		return TRUE;
	}
	if (ranges->n == PR_RANGES_MAX && !flush_ranges(ranges, error))
		return FALSE;
	ranges->range[ranges->n++] = (PrWireRange){offset, length};
	return TRUE;
}

/* What the memfd has never held is zero, and known without reading it. */
static gboolean send_block_holes(Ranges *ranges, const PrRamBlock *block, GError **error)
{
	uint64_t at = 0;
	PrExtent data;

	while (pr_ram_next_data(block, at, block->size, &data)) {
		if (data.start > at && !add_range(ranges, at, data.start - at, error))
			return FALSE;
		at = data.end;
	}
	if (at < block->size && !add_range(ranges, at, block->size - at, error))
		return FALSE;
	return flush_ranges(ranges, error);
}

gboolean pr_source_tell_holes(PrMigration *m, PrConn *conn, GError **error)
{
	g_autofree Ranges *ranges = g_new0(Ranges, 1);

	ranges->conn = conn;
	for (guint i = 0; i < m->ram->n_blocks; i++) {
		ranges->block = i;
		if (!send_block_holes(ranges, &m->ram->blocks[i], error))
			return FALSE;
	}
	return TRUE;
}

gboolean pr_source_tell_ungranted(PrConn *conn, uint32_t block, uint64_t start, uint64_t end,
				  const GArray *grants, GError **error)
{
	g_autofree Ranges *ranges = g_new0(Ranges, 1);
	uint64_t at = start;

	ranges->conn = conn;
	ranges->block = block;
	for (guint i = 0; i < grants->len; i++) {
		const PrGrant *grant = &g_array_index(grants, PrGrant, i);

		if (grant->offset > at && !add_range(ranges, at, grant->offset - at, error))
			return FALSE;
		at = MAX(at, grant->offset + grant->length);
	}
	return (at >= end || add_range(ranges, at, end - at, error)) && flush_ranges(ranges, error);
}

static gboolean is_zero_to_tell(const PrRamBlock *block, uint64_t at)
{
	uint64_t page = at / block->page_size;

	return pr_bitmap_test(block->dirty, page) && pr_ram_page_is_zero(block, page);
}

/* Zero pages lie together. Reading each page of RAM that has none takes processors from what has to be sent. */
static gboolean seems_to_have_zeros(const PrRamBlock *block, uint64_t start, uint64_t end)
{
	for (uint64_t at = start; at < end; at += (uint64_t)SAMPLED_PAGE * block->page_size)
		if (is_zero_to_tell(block, at))
			return TRUE;
	return FALSE;
}

static gboolean tell_zeros(Ranges *ranges, const PrRamBlock *block, uint64_t start, uint64_t end,
			   GError **error)
{
	for (uint64_t at = start; at < end; at += block->page_size)
		if (is_zero_to_tell(block, at) && !add_range(ranges, at, block->page_size, error))
			return FALSE;
	return TRUE;
}

static gboolean scan_extent(PrMigration *m, Ranges *ranges, const PrRamBlock *block, uint64_t start,
			    uint64_t end, GError **error)
{
	for (uint64_t at = start, next; at < end; at = next) {
		next = MIN(end, (at / STRETCH + 1) * STRETCH);
		if (pr_attempt_has_failed(m))
			return FALSE;
		if (seems_to_have_zeros(block, at, next) &&
		    !tell_zeros(ranges, block, at, next, error))
			return FALSE;
	}
	return flush_ranges(ranges, error);
}

void pr_source_tell_zero_pages(PrMigration *m, PrConn *conn)
{
	g_autofree Ranges *ranges = g_new0(Ranges, 1);
	g_autoptr(GError) error = NULL; /* the connection's, which is reported by itself */

	ranges->conn = conn;
	for (guint i = 0; i < m->ram->n_blocks; i++) {
		const PrRamBlock *block = &m->ram->blocks[i];
		PrExtent data = {0};

		ranges->block = i;
		while (pr_ram_next_data(block, data.end, block->size, &data))
			if (!scan_extent(m, ranges, block, data.start, data.end, &error))
				return;
	}
}
