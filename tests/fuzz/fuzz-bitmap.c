/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Received bitmaps, as the source handles them in a recovery (migration/source/recover.c). An input
 * is a list of items: a byte with the kind, a length of two bytes, and data. The data is the body
 * of a RECV_BITMAP or RECV_BITMAP_ZSTD, or bits that are encoded and decoded and must stay the
 * same.
 */
#include <string.h>

#include "migration/memory/bitmap.h"
#include "migration/source/recover.h"
#include "tests/fuzz/fuzz.h"

#define N_BLOCKS 4
#define BITS_MAX 4096

/* The parts of an engine that the return-path thread uses. */
typedef struct Source {
	PrSession session;
	PrSource role;
	PrConn conn;
	PrRam ram;
	PrRamBlock blocks[N_BLOCKS];
} Source;

static const uint64_t sizes[N_BLOCKS] = {1, 64, 100, BITS_MAX};
static char *const names[N_BLOCKS] = {"one", "group", "odd", "many"};

static void source_init(Source *source)
{
	source->session = (PrSession){.ram = &source->ram};
	source->role = (PrSource){.session = &source->session};
	source->conn = (PrConn){.session = &source->session, .role = &source->role};
	source->ram = (PrRam){.n_blocks = N_BLOCKS, .blocks = source->blocks};
	g_mutex_init(&source->session.lock);
	g_cond_init(&source->session.changed);
	for (guint i = 0; i < N_BLOCKS; i++)
		source->blocks[i] = (PrRamBlock){
			.idstr = names[i],
			.n_pages = sizes[i],
			.dirty = pr_bitmap_new(sizes[i]),
		};
}

static void source_clear(Source *source)
{
	for (guint i = 0; i < N_BLOCKS; i++)
		g_free(source->blocks[i].dirty);
	g_mutex_clear(&source->session.lock);
	g_cond_clear(&source->session.changed);
}

static gboolean take(Source *source, uint16_t type, const uint8_t *body, gsize len)
{
	/* The memory ends with the body, so that AddressSanitizer sees a read beyond it. */
	g_autofree uint8_t *exact = g_memdup2(body, len);
	PrMsg msg = {.type = type, .length = len, .body = exact};
	g_autoptr(GError) error = NULL;
	gboolean ok;

	source->role.bitmaps_due = 1;
	ok = pr_source_handle_bitmap(&source->conn, &msg, &error);
	fuzz_clean_outcome(ok, error);
	g_assert(source->role.bitmaps_due == !ok);
	return ok;
}

/* A bitmap that was not requested is an error and changes nothing. */
static void handle_unrequested(Source *source, uint16_t type, const uint8_t *body, gsize len)
{
	g_autofree uint8_t *exact = g_memdup2(body, len);
	PrMsg msg = {.type = type, .length = len, .body = exact};

	source->role.bitmaps_due = 0;
	g_assert(!pr_source_handle_bitmap(&source->conn, &msg, NULL));
	g_assert(!source->role.bitmaps_due);
}

/* The pages that are dirty at the source are those not received at the destination. */
static void check_bits(const PrRamBlock *block, const unsigned long *received)
{
	for (uint64_t i = 0; i < block->n_pages; i++)
		g_assert(pr_bitmap_test(block->dirty, i) != pr_bitmap_test(received, i));
	g_assert(pr_bitmap_count(block->dirty, block->n_pages) +
			 pr_bitmap_count(received, block->n_pages) ==
		 block->n_pages);
}

static void send_bits(Source *source, uint8_t what, const uint8_t *bytes, gsize len)
{
	const PrRamBlock *block = &source->blocks[what >> 3 & 3];
	gsize size = pr_bitmap_words(block->n_pages) * sizeof(unsigned long);
	g_autofree unsigned long *received = g_malloc0(size);
	g_autoptr(GByteArray) body = g_byte_array_new();
	uint16_t type;

	/* Bits beyond the end may be set in memory, but are not sent. */
	for (gsize at = 0; len && at < size; at += len)
		memcpy((uint8_t *)received + at, bytes, MIN(len, size - at));
	type = pr_recv_bitmap_encode(body, block->idstr, received, block->n_pages, what & 4);
	g_assert(body->len <= pr_msg_max_length(type));
	g_assert(take(source, type, body->data, body->len));
	check_bits(block, received);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	FuzzInput input = {data, size};
	Source source;

	source_init(&source);
	while (input.left) {
		uint8_t what = fuzz_u8(&input);
		gsize n;
		const uint8_t *bytes = fuzz_take(&input, fuzz_u16(&input), &n);
		uint16_t type = what & 1 ? PR_RP_RECV_BITMAP_ZSTD : PR_RP_RECV_BITMAP;

		if (what & 2)
			send_bits(&source, what, bytes, n);
		else if (what & 4)
			handle_unrequested(&source, type, bytes, n);
		else
			take(&source, type, bytes, n);
	}
	source_clear(&source);
	return 0;
}
