/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Every decoder of transport/wire/wire.c. The first byte chooses the message, the rest is its body.
 * A decoded message is encoded again. Where it has one encoding only, the result must be the body.
 */
#include <string.h>

#include "tests/fuzz/fuzz.h"
#include "transport/wire/bytes.h"
#include "transport/wire/wire.h"

#define MANY_BITS 8192

/* Decodes a body, and appends the encoded message to `out`. *ret_exact: `out` must be equal to the
 * body. */
typedef gboolean (*Roundtrip)(const uint8_t *body, gsize len, GByteArray *out, gboolean *ret_exact,
			      GError **error);

static gboolean roundtrip_header(const uint8_t *body, gsize len, GByteArray *out,
				 gboolean *ret_exact, GError **error)
{
	uint8_t in[PR_WIRE_HEADER_BYTES] = {0}, again[PR_WIRE_HEADER_BYTES];
	PrMsgHeader header;

	for (gsize i = 0; i < MIN(len, sizeof in); i++)
		in[i] = body[i];
	*ret_exact = len == sizeof in;
	if (!pr_header_decode(in, &header, error))
		return FALSE;
	g_assert(header.length <= pr_msg_max_length(header.type));
	g_assert(*pr_msg_name(header.type));
	pr_header_encode(again, header.type, header.length);
	g_byte_array_append(out, again, sizeof again);
	return TRUE;
}

static gboolean roundtrip_hello(const uint8_t *body, gsize len, GByteArray *out,
				gboolean *ret_exact, GError **error)
{
	g_auto(PrHello) hello = {0}, copy = {0};

	if (!pr_hello_decode(body, len, &hello, error))
		return FALSE;
	pr_hello_copy(&copy, &hello);
	pr_hello_encode(out, &copy);
	return TRUE;
}

static gboolean roundtrip_hello_ack(const uint8_t *body, gsize len, GByteArray *out,
				    gboolean *ret_exact, GError **error)
{
	PrHelloAck ack;

	if (!pr_hello_ack_decode(body, len, &ack, error))
		return FALSE;
	pr_hello_ack_encode(out, &ack);
	/* A refusal may have another version's number. */
	*ret_exact = body[5] == PR_WIRE_VERSION && !body[4];
	return TRUE;
}

static gboolean roundtrip_lane(const uint8_t *body, gsize len, GByteArray *out, gboolean *ret_exact,
			       GError **error)
{
	PrLaneHello lane;

	if (!pr_lane_hello_decode(body, len, &lane, error))
		return FALSE;
	pr_lane_hello_encode(out, &lane);
	return TRUE;
}

static gboolean roundtrip_heartbeat(const uint8_t *body, gsize len, GByteArray *out,
				    gboolean *ret_exact, GError **error)
{
	PrHeartbeatBody heartbeat;
	uint8_t raw[PR_HEARTBEAT_BYTES];

	if (!pr_heartbeat_decode(body, len, &heartbeat, error))
		return FALSE;
	pr_heartbeat_encode(raw, &heartbeat);
	g_byte_array_append(out, raw, sizeof raw);
	return TRUE;
}

static gboolean roundtrip_u32(const uint8_t *body, gsize len, GByteArray *out, gboolean *ret_exact,
			      GError **error)
{
	uint32_t value;

	if (!pr_u32_decode(body, len, &value, error))
		return FALSE;
	pr_u32_encode(out, value);
	return TRUE;
}

static gboolean roundtrip_reason(const uint8_t *body, gsize len, GByteArray *out,
				 gboolean *ret_exact, GError **error)
{
	char reason[PR_REASON_MAX + 1];

	if (!pr_reason_decode(body, len, reason, error))
		return FALSE;
	g_assert(g_utf8_validate(reason, -1, NULL));
	pr_reason_encode(out, reason);
	return TRUE;
}

static gboolean roundtrip_advise(const uint8_t *body, gsize len, GByteArray *out,
				 gboolean *ret_exact, GError **error)
{
	uint64_t summary, page_size;

	if (!pr_advise_decode(body, len, &summary, &page_size, error))
		return FALSE;
	pr_advise_encode(out, summary, page_size);
	return TRUE;
}

static gboolean roundtrip_ranges(const uint8_t *body, gsize len, GByteArray *out,
				 gboolean *ret_exact, GError **error)
{
	g_autofree PrWireRange *ranges = NULL;
	uint32_t block;
	guint n;

	if (!pr_ranges_decode(body, len, &block, &ranges, &n, error))
		return FALSE;
	for (guint i = 0; i < n; i++)
		g_assert(ranges[i].length &&
			 ranges[i].offset + ranges[i].length > ranges[i].offset);
	pr_ranges_encode(out, block, ranges, n);
	return TRUE;
}

static gboolean roundtrip_grants(const uint8_t *body, gsize len, GByteArray *out,
				 gboolean *ret_exact, GError **error)
{
	g_autofree PrWireGrant *grants = NULL;
	uint32_t block;
	guint n;

	if (!pr_grants_decode(body, len, &block, &grants, &n, error))
		return FALSE;
	pr_grants_encode(out, block, grants, n);
	return TRUE;
}

static gboolean roundtrip_packaged(const uint8_t *body, gsize len, GByteArray *out,
				   gboolean *ret_exact, GError **error)
{
	PrPackaged packaged;

	if (!pr_packaged_decode(body, len, &packaged, error))
		return FALSE;
	g_assert(packaged.length <= len);
	pr_packaged_encode(out, packaged.last, packaged.guest_running, packaged.data,
			   packaged.length);
	return TRUE;
}

static gboolean roundtrip_block_name(const uint8_t *body, gsize len, GByteArray *out,
				     gboolean *ret_exact, GError **error)
{
	char idstr[PR_IDSTR_MAX + 1];

	if (!pr_block_name_decode(body, len, idstr, error))
		return FALSE;
	pr_block_name_encode(out, idstr);
	return TRUE;
}

static gboolean roundtrip_req_pages(const uint8_t *body, gsize len, GByteArray *out,
				    gboolean *ret_exact, GError **error)
{
	uint8_t raw[PR_REQ_PAGES_BYTES];
	PrReqPages req;

	if (!pr_req_pages_decode(body, len, &req, error))
		return FALSE;
	pr_req_pages_encode(raw, &req);
	g_byte_array_append(out, raw, sizeof raw);
	return TRUE;
}

static gboolean roundtrip_progress(const uint8_t *body, gsize len, GByteArray *out,
				   gboolean *ret_exact, GError **error)
{
	PrProgress progress;

	if (!pr_progress_decode(body, len, &progress, error))
		return FALSE;
	pr_progress_encode(out, &progress);
	return TRUE;
}

static gboolean roundtrip_lost(const uint8_t *body, gsize len, GByteArray *out, gboolean *ret_exact,
			       GError **error)
{
	PrLost lost;

	if (!pr_lost_decode(body, len, &lost, error))
		return FALSE;
	pr_lost_encode(out, &lost);
	*ret_exact = body[8] <= 1;
	return TRUE;
}

static gboolean roundtrip_activate(const uint8_t *body, gsize len, GByteArray *out,
				   gboolean *ret_exact, GError **error)
{
	PrActivate activate;

	if (!pr_activate_decode(body, len, &activate, error))
		return FALSE;
	pr_activate_encode(out, &activate);
	return TRUE;
}

static gboolean roundtrip_probed(const uint8_t *body, gsize len, GByteArray *out,
				 gboolean *ret_exact, GError **error)
{
	PrProbed probed;

	if (!pr_probed_decode(body, len, &probed, error))
		return FALSE;
	pr_probed_encode(out, &probed);
	return TRUE;
}

/* The message does not have the number of bits: the two bytes before it do. */
static gboolean decode_bitmap(uint16_t type, const uint8_t *body, gsize len, GByteArray *out,
			      GError **error)
{
	FuzzInput input = {body, len};
	uint64_t n_bits = fuzz_u16(&input) % MANY_BITS;
	g_autofree unsigned long *bits = NULL;
	char idstr[PR_IDSTR_MAX + 1], name[PR_IDSTR_MAX + 1];

	if (!pr_recv_bitmap_decode(type, input.at, input.left, idstr, n_bits, &bits, error))
		return FALSE;
	g_assert(pr_recv_bitmap_name(input.at, input.left, name, NULL));
	g_assert_cmpstr(idstr, ==, name);
	g_byte_array_append(out, body, len - input.left);
	g_assert(pr_recv_bitmap_encode(out, idstr, bits, n_bits, FALSE) == PR_RP_RECV_BITMAP);
	return TRUE;
}

static gboolean roundtrip_bitmap(const uint8_t *body, gsize len, GByteArray *out,
				 gboolean *ret_exact, GError **error)
{
	*ret_exact = len >= 2;
	return decode_bitmap(PR_RP_RECV_BITMAP, body, len, out, error);
}

/* The encoded result has the same bits uncompressed, and must be valid itself. */
static gboolean roundtrip_bitmap_zstd(const uint8_t *body, gsize len, GByteArray *out,
				      gboolean *ret_exact, GError **error)
{
	g_autoptr(GByteArray) again = g_byte_array_new();

	*ret_exact = FALSE;
	if (!decode_bitmap(PR_RP_RECV_BITMAP_ZSTD, body, len, out, error))
		return FALSE;
	g_assert(decode_bitmap(PR_RP_RECV_BITMAP, out->data, out->len, again, NULL));
	g_assert(again->len == out->len && !memcmp(again->data, out->data, out->len));
	return TRUE;
}

static const Roundtrip roundtrips[] = {
	roundtrip_header,    roundtrip_hello,	 roundtrip_hello_ack,	roundtrip_lane,
	roundtrip_heartbeat, roundtrip_u32,	 roundtrip_reason,	roundtrip_advise,
	roundtrip_ranges,    roundtrip_grants,	 roundtrip_packaged,	roundtrip_block_name,
	roundtrip_req_pages, roundtrip_progress, roundtrip_lost,	roundtrip_activate,
	roundtrip_probed,    roundtrip_bitmap,	 roundtrip_bitmap_zstd,
};

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	g_autoptr(GByteArray) out = g_byte_array_new();
	g_autoptr(GByteArray) again = g_byte_array_new();
	g_autoptr(GError) error = NULL;
	FuzzInput input = {data, size};
	Roundtrip roundtrip = roundtrips[fuzz_u8(&input) % G_N_ELEMENTS(roundtrips)];
	gboolean exact = TRUE, ok = roundtrip(input.at, input.left, out, &exact, &error);

	fuzz_clean_outcome(ok, error);
	if (!ok || roundtrip == roundtrip_bitmap_zstd)
		return 0;
	if (exact)
		g_assert(out->len == input.left && !memcmp(out->data, input.at, out->len));
	g_assert(roundtrip(out->data, out->len, again, &exact, NULL));
	g_assert(again->len == out->len && !memcmp(again->data, out->data, out->len));
	return 0;
}
