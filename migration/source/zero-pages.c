/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The source tells the destination which ranges of its RAM hold zeros only, so that they need not
 * travel. Holes of a memfd are found without reading them. Zero pages are found by reading the
 * pages that have not arrived yet.
 */
#include "migration/source/zero-pages.h"

#include "migration/memory/bitmap.h"
#include "migration/session/messages.h"

#define STRETCH	     (2ull * 1024 * 1024) /* bytes; sampled as one */
#define SAMPLED_PAGE 32			  /* one page in so many is sampled */

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

/* A range that the memfd has never held is zero, which is known without reading it. */
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

gboolean pr_source_send_holes(PrConn *conn, GError **error)
{
	const PrRam *ram = conn->session->ram;
	g_autofree Ranges *ranges = g_new0(Ranges, 1);

	ranges->conn = conn;
	for (guint i = 0; i < ram->n_blocks; i++) {
		ranges->block = i;
		if (!send_block_holes(ranges, &ram->blocks[i], error))
			return FALSE;
	}
	return TRUE;
}

gboolean pr_source_send_ungranted(PrConn *conn, uint32_t block, uint64_t start, uint64_t end,
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

static gboolean is_missing_zero(const PrRamBlock *block, uint64_t at)
{
	uint64_t page = at / block->page_size;

	return pr_bitmap_test(block->dirty, page) && pr_ram_page_is_zero(block, page);
}

/* Zero pages lie together. Reading every page of RAM that has none would take processors from the
 * transfer. */
static gboolean seems_to_have_zeros(const PrRamBlock *block, uint64_t start, uint64_t end)
{
	for (uint64_t at = start; at < end; at += (uint64_t)SAMPLED_PAGE * block->page_size)
		if (is_missing_zero(block, at))
			return TRUE;
	return FALSE;
}

static gboolean send_zeros(Ranges *ranges, const PrRamBlock *block, uint64_t start, uint64_t end,
			   GError **error)
{
	for (uint64_t at = start; at < end; at += block->page_size)
		if (is_missing_zero(block, at) && !add_range(ranges, at, block->page_size, error))
			return FALSE;
	return TRUE;
}

static gboolean scan_extent(Ranges *ranges, const PrRamBlock *block, uint64_t start, uint64_t end,
			    GError **error)
{
	for (uint64_t at = start, next; at < end; at = next) {
		next = MIN(end, (at / STRETCH + 1) * STRETCH);
		if (pr_session_attempt_has_failed(ranges->conn->session))
			return FALSE;
		if (seems_to_have_zeros(block, at, next) &&
		    !send_zeros(ranges, block, at, next, error))
			return FALSE;
	}
	return flush_ranges(ranges, error);
}

void pr_source_send_zero_pages(PrConn *conn)
{
	const PrRam *ram = conn->session->ram;
	g_autofree Ranges *ranges = g_new0(Ranges, 1);
	g_autoptr(GError) error = NULL; /* a failure of the connection reports itself */

	ranges->conn = conn;
	for (guint i = 0; i < ram->n_blocks; i++) {
		const PrRamBlock *block = &ram->blocks[i];
		PrExtent data = {0};

		ranges->block = i;
		while (pr_ram_next_data(block, data.end, block->size, &data))
			if (!scan_extent(ranges, block, data.start, data.end, &error))
				return;
	}
}
