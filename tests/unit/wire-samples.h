/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A sample of every body, and its decoder. Included once. */
#pragma once

#include <string.h>

#include "transport/wire/wire.h"

static void sample_hello(GByteArray *out)
{
	PrWireBlock blocks[] = {
		{.idstr = "mem0", .size = 512 * 1024 * 1024ull, .page_size = 4096},
		{.idstr = "0000:00:02.0/vga.vram", .size = 16 << 20, .page_size = 2 << 20},
	};
	PrHello hello = {
		.version = PR_WIRE_VERSION,
		.role = PR_HELLO_SOURCE,
		.uuid = "0123456789abcde",
		.epoch = 7,
		.resume = PR_RESUME_AUTOMATIC,
		.secret = "fedcba987654321",
		.capabilities = 0x8000000000000001ull,
		.scheme = "faulty+ofi",
		.n_blocks = G_N_ELEMENTS(blocks),
		.blocks = blocks,
	};

	pr_hello_encode(out, &hello);
}

static gboolean decode_hello(const uint8_t *body, gsize len, GError **error)
{
	g_auto(PrHello) hello = {0};

	return pr_hello_decode(body, len, &hello, error);
}

static void sample_hello_ack(GByteArray *out)
{
	PrHelloAck ack = {.status = PR_HELLO_REFUSED, .data_port = 4445, .reason = "no: ☂"};

	pr_hello_ack_encode(out, &ack);
}

static gboolean decode_hello_ack(const uint8_t *body, gsize len, GError **error)
{
	PrHelloAck ack;

	return pr_hello_ack_decode(body, len, &ack, error);
}

static void sample_lane(GByteArray *out)
{
	PrLaneHello lane = {.uuid = "u", .epoch = 3, .token = "t", .lane = 1};

	pr_lane_hello_encode(out, &lane);
}

static gboolean decode_lane(const uint8_t *body, gsize len, GError **error)
{
	PrLaneHello lane;

	return pr_lane_hello_decode(body, len, &lane, error);
}

static void sample_heartbeat(GByteArray *out)
{
	PrHeartbeatBody heartbeat = {.stamp = 1, .echo = 2, .echo_age = 3};
	uint8_t raw[PR_HEARTBEAT_BYTES];

	pr_heartbeat_encode(raw, &heartbeat);
	g_byte_array_append(out, raw, sizeof raw);
}

static gboolean decode_heartbeat(const uint8_t *body, gsize len, GError **error)
{
	PrHeartbeatBody heartbeat;

	return pr_heartbeat_decode(body, len, &heartbeat, error);
}

static void sample_u32(GByteArray *out)
{
	pr_u32_encode(out, PR_PING_LOADED);
}

static gboolean decode_u32(const uint8_t *body, gsize len, GError **error)
{
	uint32_t value;

	return pr_u32_decode(body, len, &value, error);
}

static void sample_reason(GByteArray *out)
{
	pr_reason_encode(out, "path lost");
}

static gboolean decode_reason(const uint8_t *body, gsize len, GError **error)
{
	char reason[PR_REASON_MAX + 1];

	return pr_reason_decode(body, len, reason, error);
}

static void sample_advise(GByteArray *out)
{
	pr_advise_encode(out, 0x201000, 0x1000);
}

static gboolean decode_advise(const uint8_t *body, gsize len, GError **error)
{
	uint64_t summary, page_size;

	return pr_advise_decode(body, len, &summary, &page_size, error);
}

static void sample_ranges(GByteArray *out)
{
	PrWireRange ranges[] = {{0, 4096}, {8192, 1 << 20}};

	pr_ranges_encode(out, 1, ranges, G_N_ELEMENTS(ranges));
}

static gboolean decode_ranges(const uint8_t *body, gsize len, GError **error)
{
	g_autofree PrWireRange *ranges = NULL;
	uint32_t block;
	guint n;

	return pr_ranges_decode(body, len, &block, &ranges, &n, error);
}

static void sample_grants(GByteArray *out)
{
	PrWireGrant grants[] = {{0, 1 << 30, 0x7f0000000000, 42}, {1 << 30, 4096, 0, 43}};

	pr_grants_encode(out, 63, grants, G_N_ELEMENTS(grants));
}

static gboolean decode_grants(const uint8_t *body, gsize len, GError **error)
{
	g_autofree PrWireGrant *grants = NULL;
	uint32_t block;
	guint n;

	return pr_grants_decode(body, len, &block, &grants, &n, error);
}

static void sample_packaged(GByteArray *out)
{
	pr_packaged_encode(out, TRUE, FALSE, "state", 5);
}

static gboolean decode_packaged(const uint8_t *body, gsize len, GError **error)
{
	PrPackaged packaged;

	return pr_packaged_decode(body, len, &packaged, error);
}

static void sample_block_name(GByteArray *out)
{
	pr_block_name_encode(out, "mem0");
}

static gboolean decode_block_name(const uint8_t *body, gsize len, GError **error)
{
	char idstr[PR_IDSTR_MAX + 1];

	return pr_block_name_decode(body, len, idstr, error);
}

#define SAMPLE_BITS 70

static void sample_recv_bitmap(GByteArray *out)
{
	unsigned long bits[2] = {0x8000000000000005ul, 0x21};

	pr_recv_bitmap_encode(out, "mem0", bits, SAMPLE_BITS, FALSE);
}

#define SAMPLE_BITS_ZSTD 4100

static void sample_recv_bitmap_zstd(GByteArray *out)
{
	unsigned long bits[(SAMPLE_BITS_ZSTD + 63) / 64] = {0x8000000000000005ul};
	uint16_t type = pr_recv_bitmap_encode(out, "mem0", bits, SAMPLE_BITS_ZSTD, TRUE);

	assert_int_equal(type, PR_RP_RECV_BITMAP_ZSTD);
}

static gboolean decode_recv_bitmap_zstd(const uint8_t *body, gsize len, GError **error)
{
	g_autofree unsigned long *bits = NULL;
	char idstr[PR_IDSTR_MAX + 1];

	return pr_recv_bitmap_decode(PR_RP_RECV_BITMAP_ZSTD, body, len, idstr, SAMPLE_BITS_ZSTD,
				     &bits, error);
}

static gboolean decode_recv_bitmap(const uint8_t *body, gsize len, GError **error)
{
	g_autofree unsigned long *bits = NULL;
	char idstr[PR_IDSTR_MAX + 1];

	return pr_recv_bitmap_decode(PR_RP_RECV_BITMAP, body, len, idstr, SAMPLE_BITS, &bits,
				     error);
}

static void sample_req_pages(GByteArray *out)
{
	PrReqPages req = {.block = 2, .start = 0x123456000, .length = 1 << 20};
	uint8_t raw[PR_REQ_PAGES_BYTES];

	pr_req_pages_encode(raw, &req);
	g_byte_array_append(out, raw, sizeof raw);
}

static gboolean decode_req_pages(const uint8_t *body, gsize len, GError **error)
{
	PrReqPages req;

	return pr_req_pages_decode(body, len, &req, error);
}

static void sample_progress(GByteArray *out)
{
	PrProgress progress = {1, 2, 3, 4, 5};

	pr_progress_encode(out, &progress);
}

static gboolean decode_progress(const uint8_t *body, gsize len, GError **error)
{
	PrProgress progress;

	return pr_progress_decode(body, len, &progress, error);
}

static void sample_lost(GByteArray *out)
{
	PrLost lost = {.epoch = 7, .paused_by_operator = TRUE, .reason = "rail rxe0 is DOWN"};

	pr_lost_encode(out, &lost);
}

static gboolean decode_lost(const uint8_t *body, gsize len, GError **error)
{
	PrLost lost;

	return pr_lost_decode(body, len, &lost, error);
}

static void sample_activate(GByteArray *out)
{
	PrActivate activate = {.epoch = 7, .resume = PR_RESUME_AUTOMATIC};

	pr_activate_encode(out, &activate);
}

static gboolean decode_activate(const uint8_t *body, gsize len, GError **error)
{
	PrActivate activate;

	return pr_activate_decode(body, len, &activate, error);
}

static void sample_probed(GByteArray *out)
{
	PrProbed probed = {3, 250};

	pr_probed_encode(out, &probed);
}

static gboolean decode_probed(const uint8_t *body, gsize len, GError **error)
{
	PrProbed probed;

	return pr_probed_decode(body, len, &probed, error);
}

static void sample_rails(GByteArray *out)
{
	PrRail rails[] = {{7, 4096, TRUE}, {9, 0, FALSE}};

	pr_rails_encode(out, rails, G_N_ELEMENTS(rails));
}

static gboolean decode_rails(const uint8_t *body, gsize len, GError **error)
{
	g_autofree PrRail *rails = NULL;
	guint n;

	return pr_rails_decode(body, len, &rails, &n, error);
}

static void sample_hashes(GByteArray *out)
{
	PrHashes hashes = {.block = 1, .offset = 8192, .n = 2, .hash = {3, UINT64_MAX}};

	pr_hashes_encode(out, &hashes);
}

static gboolean decode_hashes(const uint8_t *body, gsize len, GError **error)
{
	PrHashes hashes;

	return pr_hashes_decode(body, len, &hashes, error);
}

static const struct Kind {
	uint16_t type;
	void (*sample)(GByteArray *out);
	gboolean (*decode)(const uint8_t *body, gsize len, GError **error);
} kinds[] = {
	{PR_MSG_HELLO, sample_hello, decode_hello},
	{PR_MSG_HELLO_ACK, sample_hello_ack, decode_hello_ack},
	{PR_MSG_LANE, sample_lane, decode_lane},
	{PR_MSG_HEARTBEAT, sample_heartbeat, decode_heartbeat},
	{PR_CMD_PING, sample_u32, decode_u32},
	{PR_RP_PONG, sample_u32, decode_u32},
	{PR_RP_SHUT, sample_u32, decode_u32},
	{PR_RP_RESUME_ACK, sample_u32, decode_u32},
	{PR_MSG_PAUSE, sample_reason, decode_reason},
	{PR_MSG_HOLD, sample_reason, decode_reason},
	{PR_MSG_NOTE, sample_reason, decode_reason},
	{PR_MSG_ERROR, sample_reason, decode_reason},
	{PR_CMD_POSTCOPY_ADVISE, sample_advise, decode_advise},
	{PR_CMD_RAM_ZERO, sample_ranges, decode_ranges},
	{PR_CMD_GRANT, sample_grants, decode_grants},
	{PR_CMD_PACKAGED, sample_packaged, decode_packaged},
	{PR_CMD_RECV_BITMAP, sample_block_name, decode_block_name},
	{PR_RP_RECV_BITMAP, sample_recv_bitmap, decode_recv_bitmap},
	{PR_RP_RECV_BITMAP_ZSTD, sample_recv_bitmap_zstd, decode_recv_bitmap_zstd},
	{PR_RP_REQ_PAGES, sample_req_pages, decode_req_pages},
	{PR_RP_PROGRESS, sample_progress, decode_progress},
	{PR_MSG_LOST, sample_lost, decode_lost},
	{PR_CMD_ACTIVATE, sample_activate, decode_activate},
	{PR_RP_ACTIVATED, sample_hello_ack, decode_hello_ack},
	{PR_RP_PROBED, sample_probed, decode_probed},
	{PR_RP_RAILS, sample_rails, decode_rails},
	{PR_RP_SCAN_FIRST, sample_ranges, decode_ranges},
	{PR_CMD_HASHES, sample_hashes, decode_hashes},
	{PR_RP_REQ_HASHES, sample_ranges, decode_ranges},
};

static GByteArray *sample_of(const struct Kind *kind)
{
	GByteArray *body = g_byte_array_new();

	kind->sample(body);
	return body;
}

/* Decodes from memory that ends with the body, so that AddressSanitizer sees a read beyond it. */
static gboolean decode_exact(const struct Kind *kind, const uint8_t *body, gsize len,
			     GError **error)
{
	g_autofree uint8_t *copy = g_memdup2(body, len);

	return kind->decode(copy, len, error);
}
