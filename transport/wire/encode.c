/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Encodes what is sent to a peer: pure functions. */
#include <string.h>

#include "transport/wire/bytes.h"
#include "transport/wire/zstd.h"
#include "transport/wire/wire.h"

#define REASON_LEFT_OUT " ... "

void pr_header_encode(uint8_t out[PR_WIRE_HEADER_BYTES], uint16_t type, uint32_t length)
{
	store_u16(out, type);
	store_u16(out + 2, 0);
	store_u32(out + 4, length);
}

void pr_hello_encode(GByteArray *out, const PrHello *hello)
{
	g_assert(hello->n_blocks <= PR_BLOCKS_MAX);
	put_u32(out, PR_WIRE_MAGIC);
	put_u16(out, hello->version);
	put_u8(out, hello->role);
	put_bytes(out, hello->uuid, sizeof hello->uuid);
	put_u64(out, hello->epoch);
	put_u8(out, hello->resume);
	put_bytes(out, hello->secret, sizeof hello->secret);
	put_u64(out, hello->capabilities);
	put_name(out, hello->scheme);
	put_u32(out, hello->n_blocks);
	for (uint32_t i = 0; i < hello->n_blocks; i++) {
		put_name(out, hello->blocks[i].idstr);
		put_u64(out, hello->blocks[i].size);
		put_u32(out, hello->blocks[i].page_size);
	}
}

void pr_progress_encode(GByteArray *out, const PrProgress *progress)
{
	put_u64(out, progress->received_pages);
	put_u64(out, progress->postcopy_requests);
	put_u64(out, progress->postcopy_bytes);
	put_u64(out, progress->remaining);
	put_u64(out, progress->zero_pages);
}

void pr_rails_encode(GByteArray *out, const PrRail *rails, guint n)
{
	g_assert(n <= PR_RAILS_MAX);
	put_u32(out, n);
	for (guint i = 0; i < n; i++) {
		put_u64(out, rails[i].epoch);
		put_u64(out, rails[i].bytes);
		put_u8(out, rails[i].pulls != 0);
	}
}

static gboolean is_within_char(const char *at)
{
	return ((uint8_t)*at & 0xc0) == 0x80;
}

/* The start of a long reason says what has failed, and its end says why. */
static void leave_out_middle(char ret[PR_REASON_MAX + 1], const char *text)
{
	const gsize mark = strlen(REASON_LEFT_OUT), half = (PR_REASON_MAX - mark) / 2;
	const char *head = text + half, *tail = text + strlen(text) - half;

	while (is_within_char(head))
		head--;
	while (is_within_char(tail))
		tail++;
	g_snprintf(ret, PR_REASON_MAX + 1, "%.*s" REASON_LEFT_OUT "%s", (int)(head - text), text,
		   tail);
}

void pr_reason_copy(char ret[PR_REASON_MAX + 1], const char *reason)
{
	g_autofree char *text = g_utf8_make_valid(reason, -1);

	for (char *c = text; *c; c++)
		if ((uint8_t)*c < 0x20 || *c == 0x7f)
			*c = ' ';
	if (strlen(text) > PR_REASON_MAX)
		leave_out_middle(ret, text);
	else
		g_strlcpy(ret, text, PR_REASON_MAX + 1);
}

void pr_reason_encode(GByteArray *out, const char *reason)
{
	char text[PR_REASON_MAX + 1];

	pr_reason_copy(text, reason);
	put_u16(out, strlen(text));
	put_bytes(out, text, strlen(text));
}

void pr_hello_ack_encode(GByteArray *out, const PrHelloAck *ack)
{
	put_u32(out, PR_WIRE_MAGIC);
	put_u16(out, PR_WIRE_VERSION);
	put_u32(out, ack->status);
	put_u64(out, ack->capabilities);
	put_u16(out, ack->data_port);
	pr_progress_encode(out, &ack->progress);
	pr_reason_encode(out, ack->reason);
}

void pr_lane_hello_encode(GByteArray *out, const PrLaneHello *lane)
{
	put_u32(out, PR_WIRE_MAGIC);
	put_bytes(out, lane->uuid, sizeof lane->uuid);
	put_u64(out, lane->epoch);
	put_bytes(out, lane->token, sizeof lane->token);
	put_u8(out, lane->lane);
}

void pr_heartbeat_encode(uint8_t out[PR_HEARTBEAT_BYTES], const PrHeartbeatBody *heartbeat)
{
	store_u64(out, heartbeat->stamp);
	store_u64(out + 8, heartbeat->echo);
	store_u64(out + 16, heartbeat->echo_age);
}

void pr_u32_encode(GByteArray *out, uint32_t value)
{
	put_u32(out, value);
}

void pr_advise_encode(GByteArray *out, uint64_t page_size_summary, uint64_t target_page_size)
{
	put_u64(out, page_size_summary);
	put_u64(out, target_page_size);
}

void pr_ranges_encode(GByteArray *out, uint32_t block, const PrWireRange *ranges, guint n)
{
	g_assert(n <= PR_RANGES_MAX);
	put_u32(out, block);
	put_u32(out, n);
	for (guint i = 0; i < n; i++) {
		put_u64(out, ranges[i].offset);
		put_u64(out, ranges[i].length);
	}
}

void pr_grants_encode(GByteArray *out, uint32_t block, const PrWireGrant *grants, guint n)
{
	g_assert(n <= PR_RANGES_MAX);
	put_u32(out, block);
	put_u32(out, n);
	for (guint i = 0; i < n; i++) {
		put_u64(out, grants[i].offset);
		put_u64(out, grants[i].length);
		put_u64(out, grants[i].addr);
		put_u64(out, grants[i].key);
	}
}

void pr_req_pages_encode(uint8_t out[PR_REQ_PAGES_BYTES], const PrReqPages *req)
{
	store_u64(out, req->start);
	store_u32(out + 8, req->length);
	store_u32(out + 12, req->block);
}

void pr_packaged_encode(GByteArray *out, gboolean last, gboolean guest_running, const void *data,
			gsize length)
{
	g_assert(length <= PR_PACKAGED_CHUNK);
	put_u8(out, (last ? PACKAGED_LAST : 0) | (guest_running ? PACKAGED_RUNNING : 0));
	put_u32(out, length);
	put_bytes(out, data, length);
}

void pr_block_name_encode(GByteArray *out, const char *idstr)
{
	put_name(out, idstr);
}

static void put_bitmap(GByteArray *out, const unsigned long *bits, uint64_t n_bits)
{
	uint64_t n = groups_of(n_bits);
	guint at = out->len;

	g_byte_array_set_size(out, at + n * 8);
	if (groups_are_memory() && n)
		memcpy(out->data + at, bits, (n - 1) * 8);
	for (uint64_t i = groups_are_memory() && n ? n - 1 : 0; i < n; i++) {
		uint64_t group = GUINT64_TO_LE(load_group(bits, n_bits, i));

		memcpy(out->data + at + i * 8, &group, sizeof group);
	}
}

uint16_t pr_recv_bitmap_encode(GByteArray *out, const char *idstr, const unsigned long *bits,
			       uint64_t n_bits, gboolean may_compress)
{
	uint64_t size = groups_of(n_bits) * 8;
	gboolean compressed;

	g_assert(size <= BITMAP_BYTES_MAX);
	put_name(out, idstr);
	put_u64(out, size);
	compressed = may_compress && size && pr_zstd_put_bitmap(out, bits, n_bits, size - 1);
	if (!compressed)
		put_bitmap(out, bits, n_bits);
	put_u64(out, PR_BITMAP_END_MARK);
	return compressed ? PR_RP_RECV_BITMAP_ZSTD : PR_RP_RECV_BITMAP;
}

void pr_hashes_encode(GByteArray *out, const PrHashes *hashes)
{
	g_assert(hashes->n <= PR_HASHES_MAX);
	put_u32(out, hashes->block);
	put_u64(out, hashes->offset);
	put_u32(out, hashes->n);
	for (uint32_t i = 0; i < hashes->n; i++)
		put_u64(out, hashes->hash[i]);
}

void pr_lost_encode(GByteArray *out, const PrLost *lost)
{
	put_u64(out, lost->epoch);
	put_u8(out, lost->paused_by_operator != FALSE);
	pr_reason_encode(out, lost->reason);
}

void pr_activate_encode(GByteArray *out, const PrActivate *activate)
{
	put_u64(out, activate->epoch);
	put_u8(out, activate->resume);
}

void pr_probed_encode(GByteArray *out, const PrProbed *probed)
{
	put_u64(out, probed->count);
	put_u64(out, probed->rtt_us);
}
