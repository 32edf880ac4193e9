/* SPDX-License-Identifier: GPL-2.0-or-later */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#include "tests/unit/wire-samples.h"
#include "transport/wire/wire.h"

static void every_body_is_read_back_and_within_its_maximum(void **state)
{
	for (gsize i = 0; i < G_N_ELEMENTS(kinds); i++) {
		g_autoptr(GByteArray) body = sample_of(&kinds[i]);
		g_autoptr(GError) error = NULL;

		assert_true(decode_exact(&kinds[i], body->data, body->len, &error));
		assert_null(error);
		assert_true(body->len <= pr_msg_max_length(kinds[i].type));
	}
}

static void every_truncation_and_every_extra_byte_is_refused(void **state)
{
	for (gsize i = 0; i < G_N_ELEMENTS(kinds); i++) {
		g_autoptr(GByteArray) body = sample_of(&kinds[i]);
		gsize whole = body->len;

		for (gsize len = 0; len <= whole + 1; len++) {
			g_autoptr(GError) error = NULL;

			if (len == whole) {
				g_byte_array_append(body, (const uint8_t *)"", 1);
				continue;
			}
			if (decode_exact(&kinds[i], body->data, len, &error))
				fail_msg("%s of %zu bytes, cut to %zu, was accepted",
					 pr_msg_name(kinds[i].type), whole, len);
			assert_true(g_error_matches(error, PR_WIRE_ERROR, PR_WIRE_ERROR_MALFORMED));
		}
	}
}

/*
 * A peer may change any byte of a body. Decoding must not crash or read out of bounds, and sets an
 * error if it refuses.
 */
static void every_changed_byte_is_decoded_or_refused(void **state)
{
	static const uint8_t values[] = {0x00, 0x01, 0x7f, 0x80, 0xff};
	guint refused = 0;

	for (gsize i = 0; i < G_N_ELEMENTS(kinds); i++) {
		g_autoptr(GByteArray) body = sample_of(&kinds[i]);

		for (guint at = 0; at < body->len * G_N_ELEMENTS(values); at++) {
			uint8_t *byte = &body->data[at / G_N_ELEMENTS(values)];
			uint8_t was = *byte;
			g_autoptr(GError) error = NULL;

			*byte = values[at % G_N_ELEMENTS(values)];
			assert_true(decode_exact(&kinds[i], body->data, body->len, &error) ==
				    !error);
			refused += !!error;
			*byte = was;
		}
	}
	assert_true(refused > 100);
}

static void hello_round_trip(void **state)
{
	g_autoptr(GByteArray) body = g_byte_array_new();
	g_auto(PrHello) hello = {0};

	sample_hello(body);
	assert_true(pr_hello_decode(body->data, body->len, &hello, NULL));
	assert_int_equal(hello.version, PR_WIRE_VERSION);
	assert_int_equal(hello.role, PR_HELLO_SOURCE);
	assert_memory_equal(hello.uuid, "0123456789abcde", PR_UUID_BYTES);
	assert_int_equal(hello.epoch, 7);
	assert_int_equal(hello.resume, PR_RESUME_AUTOMATIC);
	assert_memory_equal(hello.secret, "fedcba987654321", PR_SECRET_BYTES);
	assert_true(hello.capabilities == 0x8000000000000001ull);
	assert_string_equal(hello.scheme, "faulty+ofi");
	assert_int_equal(hello.n_blocks, 2);
	assert_string_equal(hello.blocks[1].idstr, "0000:00:02.0/vga.vram");
	assert_int_equal(hello.blocks[1].size, 16 << 20);
	assert_int_equal(hello.blocks[1].page_size, 2 << 20);
}

static void the_largest_hello_fits(void **state)
{
	g_autofree PrWireBlock *blocks = g_new0(PrWireBlock, PR_BLOCKS_MAX);
	PrHello hello = {
		.version = PR_WIRE_VERSION,
		.role = PR_HELLO_SOURCE,
		.epoch = G_MAXUINT64,
		.scheme = "faulty+abcdefgh",
		.n_blocks = PR_BLOCKS_MAX,
		.blocks = blocks,
	};
	g_autoptr(GByteArray) body = g_byte_array_new();
	g_auto(PrHello) back = {0};

	for (guint i = 0; i < PR_BLOCKS_MAX; i++) {
		memset(blocks[i].idstr, 'x', PR_IDSTR_MAX);
		blocks[i].idstr[PR_IDSTR_MAX - 1] = '0' + i;
		blocks[i].size = blocks[i].page_size = 4096;
	}
	pr_hello_encode(body, &hello);
	assert_true(body->len <= pr_msg_max_length(PR_MSG_HELLO));
	assert_true(body->len <= 64 * 1024);
	assert_true(pr_hello_decode(body->data, body->len, &back, NULL));
	assert_string_equal(back.blocks[63].idstr, blocks[63].idstr);
}

static void the_largest_hello_ack_fits(void **state)
{
	PrHelloAck ack = {.status = PR_HELLO_REFUSED};
	g_autoptr(GByteArray) body = g_byte_array_new();
	PrHelloAck back;

	memset(ack.reason, 'x', PR_REASON_MAX);
	pr_hello_ack_encode(body, &ack);
	assert_int_equal(body->len, pr_msg_max_length(PR_MSG_HELLO_ACK));
	assert_true(pr_hello_ack_decode(body->data, body->len, &back, NULL));
	assert_string_equal(back.reason, ack.reason);
}

static void an_inconsistent_hello_is_refused(void **state)
{
	static const struct {
		const char *says;
		/* version, role, uuid, epoch, resume, secret, capabilities, scheme, n_blocks */
		PrHello hello;
		PrWireBlock block;
	} table[] = {
		{"version 9", {9, 1, {0}, 1, 0, {0}, 0, "tcp", 1, NULL}, {"a", 4096, 4096}},
		{"role 3",
		 {PR_WIRE_VERSION, 3, {0}, 1, 0, {0}, 0, "tcp", 1, NULL},
		 {"a", 4096, 4096}},
		{"for resume",
		 {PR_WIRE_VERSION, 1, {0}, 1, 4, {0}, 0, "tcp", 1, NULL},
		 {"a", 4096, 4096}},
		{"epoch 0",
		 {PR_WIRE_VERSION, 1, {0}, 0, 0, {0}, 0, "tcp", 1, NULL},
		 {"a", 4096, 4096}},
		{"scheme",
		 {PR_WIRE_VERSION, 1, {0}, 1, 0, {0}, 0, "Tcp", 1, NULL},
		 {"a", 4096, 4096}},
		{"no RAM block",
		 {PR_WIRE_VERSION, 1, {0}, 1, 0, {0}, 0, "tcp", 0, NULL},
		 {"a", 4096, 4096}},
		{"no proper name",
		 {PR_WIRE_VERSION, 1, {0}, 1, 0, {0}, 0, "tcp", 1, NULL},
		 {"a\nb", 4096, 4096}},
		{"no proper name",
		 {PR_WIRE_VERSION, 1, {0}, 1, 0, {0}, 0, "tcp", 1, NULL},
		 {"\xff", 4096, 4096}},
		{"page size 0",
		 {PR_WIRE_VERSION, 1, {0}, 1, 0, {0}, 0, "tcp", 1, NULL},
		 {"a", 4096, 0}},
		{"page size 2048",
		 {PR_WIRE_VERSION, 1, {0}, 1, 0, {0}, 0, "tcp", 1, NULL},
		 {"a", 4096, 2048}},
		{"page size 12288",
		 {PR_WIRE_VERSION, 1, {0}, 1, 0, {0}, 0, "tcp", 1, NULL},
		 {"a", 12288, 12288}},
		{"size 0", {PR_WIRE_VERSION, 1, {0}, 1, 0, {0}, 0, "tcp", 1, NULL}, {"a", 0, 4096}},
		{"size 6144",
		 {PR_WIRE_VERSION, 1, {0}, 1, 0, {0}, 0, "tcp", 1, NULL},
		 {"a", 6144, 4096}},
		{"multiple",
		 {PR_WIRE_VERSION, 1, {0}, 1, 0, {0}, 0, "tcp", 1, NULL},
		 {"a", 1ull << 63, 4096}},
	};

	for (gsize i = 0; i < G_N_ELEMENTS(table); i++) {
		PrWireBlock block = table[i].block;
		PrHello hello = table[i].hello;
		g_autoptr(GByteArray) body = g_byte_array_new();
		g_auto(PrHello) back = {0};
		g_autoptr(GError) error = NULL;

		hello.blocks = &block;
		pr_hello_encode(body, &hello);
		assert_false(pr_hello_decode(body->data, body->len, &back, &error));
		if (!strstr(error->message, table[i].says))
			fail_msg("\"%s\" does not say \"%s\"", error->message, table[i].says);
		assert_null(back.blocks);
	}
}

static void two_blocks_of_one_name_are_refused(void **state)
{
	PrWireBlock blocks[] = {{"a", 4096, 4096}, {"b", 4096, 4096}, {"a", 8192, 4096}};
	PrHello hello = {.version = PR_WIRE_VERSION,
			 .role = PR_HELLO_SOURCE,
			 .epoch = 1,
			 .scheme = "tcp",
			 .n_blocks = 3,
			 .blocks = blocks};
	g_autoptr(GByteArray) body = g_byte_array_new();
	g_auto(PrHello) back = {0};
	g_autoptr(GError) error = NULL;

	pr_hello_encode(body, &hello);
	assert_false(pr_hello_decode(body->data, body->len, &back, &error));
	assert_string_equal(error->message, "RAM block a is listed twice");
}

static void a_destination_may_list_no_block(void **state)
{
	PrHello hello = {.version = PR_WIRE_VERSION,
			 .role = PR_HELLO_DESTINATION,
			 .epoch = 1,
			 .scheme = "tcp"};
	g_autoptr(GByteArray) body = g_byte_array_new();
	g_auto(PrHello) back = {0};

	pr_hello_encode(body, &hello);
	assert_true(pr_hello_decode(body->data, body->len, &back, NULL));
	assert_int_equal(back.n_blocks, 0);
}

static void a_refusal_of_another_version_can_be_read(void **state)
{
	g_autoptr(GByteArray) body = g_byte_array_new();
	g_autoptr(GError) error = NULL;
	PrHelloAck ack = {.status = PR_HELLO_REFUSED, .reason = "too old"};
	PrHelloAck back;

	pr_hello_ack_encode(body, &ack);
	body->data[5] = 9;
	assert_true(pr_hello_ack_decode(body->data, body->len, &back, &error));
	assert_string_equal(back.reason, "too old");
	body->data[9] = PR_HELLO_OK;
	assert_false(pr_hello_ack_decode(body->data, body->len, &back, &error));
	assert_non_null(strstr(error->message, "version 9"));
}

/* "faulty\0ofi": no code would read or check the part behind the NUL. */
static void a_scheme_with_a_nul_in_it_is_refused(void **state)
{
	g_autoptr(GByteArray) body = g_byte_array_new();
	g_autoptr(GError) error = NULL;
	g_auto(PrHello) hello = {0};

	sample_hello(body);
	assert_memory_equal(body->data + 57, "faulty+ofi", 10);
	body->data[57 + 6] = '\0';
	assert_false(pr_hello_decode(body->data, body->len, &hello, &error));
	assert_non_null(strstr(error->message, "scheme"));
}

/* A wrong length or count at offset `at`, `bytes` bytes wide. */
static void wrong_lengths_are_refused(void **state)
{
	static const struct {
		uint16_t type;
		gsize at, width;
	} lies[] = {
		{PR_MSG_HELLO, 56, 1},	    /* scheme */
		{PR_MSG_HELLO, 67, 4},	    /* blocks */
		{PR_MSG_HELLO, 71, 1},	    /* idstr */
		{PR_MSG_HELLO_ACK, 60, 2},  /* reason */
		{PR_MSG_PAUSE, 0, 2},	    /* reason */
		{PR_CMD_RAM_ZERO, 4, 4},    /* ranges */
		{PR_CMD_GRANT, 4, 4},	    /* grants */
		{PR_CMD_PACKAGED, 1, 4},    /* data */
		{PR_CMD_RECV_BITMAP, 0, 1}, /* idstr */
		{PR_RP_RECV_BITMAP, 0, 1},  /* idstr */
		{PR_RP_RECV_BITMAP, 5, 8},  /* bitmap */
	};

	for (gsize i = 0; i < G_N_ELEMENTS(lies); i++) {
		const struct Kind *kind = kinds;

		while (kind->type != lies[i].type)
			kind++;
		for (guint step = 0; step < 4; step++) {
			g_autoptr(GByteArray) body = sample_of(kind);
			g_autoptr(GError) error = NULL;
			uint8_t *last = body->data + lies[i].at + lies[i].width - 1;

			if (step == 0)
				++*last;
			else if (step == 1)
				--*last;
			else
				memset(body->data + lies[i].at, step == 2 ? 0xff : 0,
				       lies[i].width);
			if (decode_exact(kind, body->data, body->len, &error))
				fail_msg("%s: wrong length %u at %zu was accepted",
					 pr_msg_name(kind->type), step, lies[i].at);
		}
	}
}

static void ranges_that_overflow_or_are_empty_are_refused(void **state)
{
	static const PrWireRange bad[] = {
		{0, 0}, {4096, 0}, {G_MAXUINT64, 1}, {1, G_MAXUINT64}, {G_MAXUINT64 - 4094, 4096}};

	for (gsize i = 0; i < G_N_ELEMENTS(bad); i++) {
		PrWireGrant grant = {bad[i].offset, bad[i].length, 0, 0};
		PrWireGrant far = {0, bad[i].length, bad[i].offset, 0};
		g_autoptr(GByteArray) ranges = g_byte_array_new();
		g_autoptr(GByteArray) grants = g_byte_array_new();
		g_autoptr(GByteArray) fars = g_byte_array_new();

		pr_ranges_encode(ranges, 0, &bad[i], 1);
		pr_grants_encode(grants, 0, &grant, 1);
		pr_grants_encode(fars, 0, &far, 1);
		assert_false(decode_ranges(ranges->data, ranges->len, NULL));
		assert_false(decode_grants(grants->data, grants->len, NULL));
		assert_false(decode_grants(fars->data, fars->len, NULL));
	}
}

static void ranges_round_trip(void **state)
{
	g_autoptr(GByteArray) body = g_byte_array_new();
	g_autofree PrWireRange *ranges = NULL;
	uint32_t block;
	guint n;

	sample_ranges(body);
	assert_true(pr_ranges_decode(body->data, body->len, &block, &ranges, &n, NULL));
	assert_int_equal(block, 1);
	assert_int_equal(n, 2);
	assert_int_equal(ranges[1].offset, 8192);
	assert_int_equal(ranges[1].length, 1 << 20);
}

static void grants_round_trip(void **state)
{
	g_autoptr(GByteArray) body = g_byte_array_new();
	g_autofree PrWireGrant *grants = NULL;
	uint32_t block;
	guint n;

	sample_grants(body);
	assert_true(pr_grants_decode(body->data, body->len, &block, &grants, &n, NULL));
	assert_int_equal(block, 63);
	assert_int_equal(n, 2);
	assert_int_equal(grants[0].addr, 0x7f0000000000);
	assert_int_equal(grants[1].offset, 1 << 30);
	assert_int_equal(grants[1].key, 43);
}

/* Returns the reason as the peer reads it. */
static void round_trip_reason(const char *text, char ret[PR_REASON_MAX + 1])
{
	g_autoptr(GByteArray) body = g_byte_array_new();

	pr_reason_encode(body, text);
	assert_true(pr_reason_decode(body->data, body->len, ret, NULL));
}

static void a_reason_is_cleaned(void **state)
{
	char back[PR_REASON_MAX + 1];

	round_trip_reason("a\033[2Jb\nc", back);
	assert_string_equal(back, "a [2Jb c");
}

static void the_longest_reason_is_sent_whole(void **state)
{
	g_autofree char *text = g_strnfill(PR_REASON_MAX, 'x');
	char back[PR_REASON_MAX + 1];

	round_trip_reason(text, back);
	assert_string_equal(back, text);
}

/* A long reason is cut at any length, also within a character of several bytes. */
static void a_shortened_reason_keeps_the_cause(void **state)
{
	for (guint more = 0; more < 8; more++) {
		g_autofree char *padding = g_strnfill(more, 'y');
		g_autoptr(GString) text = g_string_new("path tcp:10.0.0.1:4444?id=");
		char back[PR_REASON_MAX + 1];

		g_string_append(text, padding);
		while (text->len < 2 * PR_REASON_MAX)
			g_string_append(text, "☂");
		g_string_append(text, ": the address is in use");
		round_trip_reason(text->str, back);
		assert_true(g_str_has_prefix(back, "path tcp:10.0.0.1:4444?id="));
		assert_true(g_str_has_suffix(back, "☂: the address is in use"));
		assert_non_null(strstr(back, "☂ ... ☂"));
		assert_in_range(strlen(back), PR_REASON_MAX - 8, PR_REASON_MAX);
	}
}

static void a_reason_with_control_characters_is_refused(void **state)
{
	static const uint8_t body[] = {0, 3, 'a', 0x1b, 'b'};
	static const uint8_t nul[] = {0, 3, 'a', 0, 'b'};

	assert_false(decode_reason(body, sizeof body, NULL));
	assert_false(decode_reason(nul, sizeof nul, NULL));
}

/*
 * The bytes that QEMU itself puts on the wire for these messages (its migration/savevm.c and
 * ram.c).
 */
static void shared_messages_have_qemus_bytes(void **state)
{
	static const uint8_t ping[] = {0, 0, 0, 0x42};
	static const uint8_t advise[] = {0, 0, 0, 0, 0, 0x20, 0x10, 0, 0, 0, 0, 0, 0, 0, 0x10, 0};
	static const uint8_t name[] = {4, 'm', 'e', 'm', '0'};
	static const uint8_t bitmap[] = {4,    'm',  'e',  'm',	 '0',  0,    0,	  0, 0, 0,
					 0,    0,    16,   0x05, 0,    0,    0,	  0, 0, 0,
					 0x80, 0x21, 0,	   0,	 0,    0,    0,	  0, 0, 0x01,
					 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef};
	static const struct {
		void (*sample)(GByteArray *out);
		const uint8_t *bytes;
		gsize length;
	} golden[] = {
		{sample_u32, ping, sizeof ping},
		{sample_advise, advise, sizeof advise},
		{sample_block_name, name, sizeof name},
		{sample_recv_bitmap, bitmap, sizeof bitmap},
	};

	for (gsize i = 0; i < G_N_ELEMENTS(golden); i++) {
		g_autoptr(GByteArray) body = g_byte_array_new();

		golden[i].sample(body);
		assert_int_equal(body->len, golden[i].length);
		assert_memory_equal(body->data, golden[i].bytes, golden[i].length);
	}
}

static void shared_messages_have_qemus_numbers(void **state)
{
	assert_int_equal(PR_CMD_PING & 0xff, 2);
	assert_int_equal(PR_CMD_POSTCOPY_ADVISE & 0xff, 3);
	assert_int_equal(PR_CMD_POSTCOPY_LISTEN & 0xff, 4);
	assert_int_equal(PR_CMD_POSTCOPY_RUN & 0xff, 5);
	assert_int_equal(PR_CMD_PACKAGED & 0xff, 7);
	assert_int_equal(PR_CMD_POSTCOPY_RESUME & 0xff, 9);
	assert_int_equal(PR_CMD_RECV_BITMAP & 0xff, 10);
	assert_int_equal(PR_RP_SHUT & 0xff, 1);
	assert_int_equal(PR_RP_PONG & 0xff, 2);
	assert_int_equal(PR_RP_REQ_PAGES & 0xff, 4);
	assert_int_equal(PR_RP_RECV_BITMAP & 0xff, 5);
	assert_int_equal(PR_RP_RESUME_ACK & 0xff, 6);
}

static void req_pages_begins_as_in_qemu(void **state)
{
	static const uint8_t golden[] = {0, 0,	  0, 1, 0x23, 0x45, 0x60, 0,
					 0, 0x10, 0, 0, 0,    0,    0,	  2};
	g_autoptr(GByteArray) body = g_byte_array_new();
	PrReqPages req;

	sample_req_pages(body);
	assert_memory_equal(body->data, golden, sizeof golden);
	assert_true(pr_req_pages_decode(body->data, body->len, &req, NULL));
	assert_int_equal(req.block, 2);
	assert_int_equal(req.start, 0x123456000);
	assert_int_equal(req.length, 1 << 20);
}

static void req_pages_is_bounded(void **state)
{
	static const PrReqPages bad[] = {
		{0, 0, (1 << 20) + 1}, {PR_BLOCKS_MAX, 0, 4096}, {0, G_MAXUINT64 - 4094, 4096}};

	for (gsize i = 0; i < G_N_ELEMENTS(bad); i++) {
		uint8_t raw[PR_REQ_PAGES_BYTES];

		pr_req_pages_encode(raw, &bad[i]);
		assert_false(decode_req_pages(raw, sizeof raw, NULL));
	}
}

static void bitmaps_of_every_length_round_trip(void **state)
{
	for (uint64_t n_bits = 0; n_bits < 200; n_bits++) {
		unsigned long bits[4] = {0x0123456789abcdeful, ~0ul, 0xfedcba9876543210ul, ~0ul};
		g_autoptr(GByteArray) body = g_byte_array_new();
		g_autofree unsigned long *back = NULL;
		char idstr[PR_IDSTR_MAX + 1];

		pr_recv_bitmap_encode(body, "mem0", bits, n_bits, FALSE);
		assert_int_equal(body->len, 5 + 8 + (n_bits + 63) / 64 * 8 + 8);
		assert_true(pr_recv_bitmap_name(body->data, body->len, idstr, NULL));
		assert_string_equal(idstr, "mem0");
		assert_true(pr_recv_bitmap_decode(PR_RP_RECV_BITMAP, body->data, body->len, idstr,
						  n_bits, &back, NULL));
		for (uint64_t bit = 0; bit < (n_bits + 63) / 64 * 64; bit++) {
			gboolean sent = bit < n_bits && (bits[bit / 64] >> (bit % 64) & 1);

			assert_int_equal(back[bit / 64] >> (bit % 64) & 1, sent);
		}
	}
}

static void a_bitmap_for_another_size_or_with_stray_bits_is_refused(void **state)
{
	g_autoptr(GByteArray) body = g_byte_array_new();
	g_autofree unsigned long *bits = NULL;
	g_autoptr(GError) error = NULL;
	char idstr[PR_IDSTR_MAX + 1];

	sample_recv_bitmap(body);
	assert_false(pr_recv_bitmap_decode(PR_RP_RECV_BITMAP, body->data, body->len, idstr, 64,
					   &bits, NULL));
	assert_false(pr_recv_bitmap_decode(PR_RP_RECV_BITMAP, body->data, body->len, idstr, 129,
					   &bits, NULL));
	/* bit 69 is set, so a block of 69 pages has a bit too many */
	assert_false(pr_recv_bitmap_decode(PR_RP_RECV_BITMAP, body->data, body->len, idstr, 69,
					   &bits, &error));
	assert_non_null(strstr(error->message, "beyond its end"));
	body->data[body->len - 1] ^= 1;
	g_clear_error(&error);
	assert_false(pr_recv_bitmap_decode(PR_RP_RECV_BITMAP, body->data, body->len, idstr,
					   SAMPLE_BITS, &bits, &error));
	assert_non_null(strstr(error->message, "no end mark"));
	assert_null(bits);
}

/* Encodes a bitmap in the shorter way, decodes it, and compares. Returns the message type. */
static uint16_t round_trip(const unsigned long *bits, uint64_t n_bits)
{
	g_autoptr(GByteArray) body = g_byte_array_new();
	g_autofree unsigned long *back = NULL;
	char idstr[PR_IDSTR_MAX + 1];
	uint16_t type = pr_recv_bitmap_encode(body, "mem0", bits, n_bits, TRUE);

	assert_true(pr_recv_bitmap_decode(type, body->data, body->len, idstr, n_bits, &back, NULL));
	assert_memory_equal(back, bits, (n_bits + 63) / 64 * 8);
	return type;
}

static void a_bitmap_is_compressed_where_that_is_shorter(void **state)
{
	const uint64_t n_bits = 5 * 1024 * 1024 + 7;
	gsize words = (n_bits + 63) / 64;
	g_autofree unsigned long *bits = g_new0(unsigned long, words);
	GRand *rand = g_rand_new_with_seed(1);

	assert_int_equal(round_trip(bits, n_bits), PR_RP_RECV_BITMAP_ZSTD);
	/* Every other run of 2 MiB. */
	for (gsize i = 0; i < words - 1; i++)
		bits[i] = i / 8 % 2 ? ~0ul : 0;
	assert_int_equal(round_trip(bits, n_bits), PR_RP_RECV_BITMAP_ZSTD);
	for (gsize i = 0; i < words - 1; i++)
		bits[i] = (unsigned long)g_rand_int(rand) << 32 | g_rand_int(rand);
	assert_int_equal(round_trip(bits, n_bits), PR_RP_RECV_BITMAP);
	assert_int_equal(round_trip(bits, 0), PR_RP_RECV_BITMAP);
	g_rand_free(rand);
}

/* A valid frame whose bitmap has another size than the head says is refused. */
static void a_compressed_bitmap_of_another_size_is_refused(void **state)
{
	g_autoptr(GByteArray) body = g_byte_array_new();
	g_autofree unsigned long *bits = g_new0(unsigned long, 1024), *back = NULL;
	char idstr[PR_IDSTR_MAX + 1];

	pr_recv_bitmap_encode(body, "mem0", bits, 65536, TRUE);
	for (guint n_bits = 64; n_bits <= 131072; n_bits *= 2) {
		/* The size in the head, behind the name, is the size that would fit. */
		uint64_t size = GUINT64_TO_BE(n_bits / 8);

		memcpy(body->data + 5, &size, sizeof size);
		assert_int_equal(pr_recv_bitmap_decode(PR_RP_RECV_BITMAP_ZSTD, body->data,
						       body->len, idstr, n_bits, &back, NULL),
				 n_bits == 65536);
		g_clear_pointer(&back, g_free);
	}
}

static void packaged_points_into_the_body(void **state)
{
	g_autoptr(GByteArray) body = g_byte_array_new();
	PrPackaged packaged;

	sample_packaged(body);
	assert_true(pr_packaged_decode(body->data, body->len, &packaged, NULL));
	assert_true(packaged.last);
	assert_false(packaged.guest_running);
	assert_int_equal(packaged.length, 5);
	assert_ptr_equal(packaged.data, body->data + body->len - 5);
}

static void a_header_is_checked(void **state)
{
	static const uint8_t golden[] = {0x01, 0x02, 0, 0, 0, 0, 0, 4};
	uint8_t raw[PR_WIRE_HEADER_BYTES];
	g_autoptr(GError) error = NULL;
	PrMsgHeader header;

	pr_header_encode(raw, PR_CMD_PING, 4);
	assert_memory_equal(raw, golden, sizeof raw);
	assert_true(pr_header_decode(raw, &header, NULL));
	assert_int_equal(header.type, PR_CMD_PING);
	assert_int_equal(header.length, 4);
	raw[7] = 5;
	assert_false(pr_header_decode(raw, &header, &error));
	assert_string_equal(error->message, "CMD_PING claims 5 bytes, at most 4 are allowed");
	raw[7] = 4;
	raw[3] = 1;
	assert_false(pr_header_decode(raw, &header, NULL));
	pr_header_encode(raw, 0x7777, 64 * 1024);
	assert_true(pr_header_decode(raw, &header, NULL));
	pr_header_encode(raw, 0x7777, 64 * 1024 + 1);
	assert_false(pr_header_decode(raw, &header, NULL));
}

static void messages_have_names(void **state)
{
	assert_string_equal(pr_msg_name(PR_CMD_POSTCOPY_RUN), "CMD_POSTCOPY_RUN");
	assert_string_equal(pr_msg_name(0x0abc), "type 0x0abc");
	assert_true(pr_msg_is_known(PR_RP_PAGES));
	assert_false(pr_msg_is_known(0x0abc));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(every_body_is_read_back_and_within_its_maximum),
		cmocka_unit_test(every_truncation_and_every_extra_byte_is_refused),
		cmocka_unit_test(every_changed_byte_is_decoded_or_refused),
		cmocka_unit_test(hello_round_trip),
		cmocka_unit_test(a_scheme_with_a_nul_in_it_is_refused),
		cmocka_unit_test(the_largest_hello_fits),
		cmocka_unit_test(the_largest_hello_ack_fits),
		cmocka_unit_test(an_inconsistent_hello_is_refused),
		cmocka_unit_test(two_blocks_of_one_name_are_refused),
		cmocka_unit_test(a_destination_may_list_no_block),
		cmocka_unit_test(a_refusal_of_another_version_can_be_read),
		cmocka_unit_test(wrong_lengths_are_refused),
		cmocka_unit_test(ranges_that_overflow_or_are_empty_are_refused),
		cmocka_unit_test(ranges_round_trip),
		cmocka_unit_test(grants_round_trip),
		cmocka_unit_test(a_reason_is_cleaned),
		cmocka_unit_test(the_longest_reason_is_sent_whole),
		cmocka_unit_test(a_shortened_reason_keeps_the_cause),
		cmocka_unit_test(a_reason_with_control_characters_is_refused),
		cmocka_unit_test(shared_messages_have_qemus_bytes),
		cmocka_unit_test(shared_messages_have_qemus_numbers),
		cmocka_unit_test(req_pages_begins_as_in_qemu),
		cmocka_unit_test(req_pages_is_bounded),
		cmocka_unit_test(bitmaps_of_every_length_round_trip),
		cmocka_unit_test(a_bitmap_for_another_size_or_with_stray_bits_is_refused),
		cmocka_unit_test(a_bitmap_is_compressed_where_that_is_shorter),
		cmocka_unit_test(a_compressed_bitmap_of_another_size_is_refused),
		cmocka_unit_test(packaged_points_into_the_body),
		cmocka_unit_test(a_header_is_checked),
		cmocka_unit_test(messages_have_names),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
