/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "tests/fuzz/script.h"

#include <string.h>

#include "transport/backend.h"

#define BYTES_MAX (48 * 1024) /* of a connection; less than a socket buffers */

typedef struct Script {
	FuzzInput *input;
	const PrWireBlock *blocks;
	guint n_blocks;
	GByteArray *out; /* the bytes of the segment */
	gsize total;
} Script;

static void add_frame(Script *script, uint16_t type, const GByteArray *body)
{
	uint8_t header[PR_WIRE_HEADER_BYTES];

	pr_header_encode(header, type, body->len);
	g_byte_array_append(script->out, header, sizeof header);
	if (body->len)
		g_byte_array_append(script->out, body->data, body->len);
}

static uint8_t next(Script *script)
{
	return fuzz_u8(script->input);
}

static const PrWireBlock *next_block(Script *script, uint32_t *ret_index)
{
	*ret_index = next(script);
	return &script->blocks[*ret_index % script->n_blocks];
}

static void put_hello(Script *script, GByteArray *body)
{
	g_autofree PrWireBlock *blocks =
		g_memdup2(script->blocks, script->n_blocks * sizeof *script->blocks);
	PrHello hello = {
		.version = PR_WIRE_VERSION,
		.uuid = SCRIPT_UUID,
		.secret = SCRIPT_SECRET,
		.n_blocks = script->n_blocks,
		.blocks = blocks,
	};
	uint8_t flaws;

	/* Not in the initializer: C does not define its order of evaluation. */
	hello.resume = next(script);
	hello.epoch = next(script);
	flaws = next(script);
	hello.role = flaws & 1 ? PR_HELLO_DESTINATION : PR_HELLO_SOURCE;
	hello.uuid[0] ^= flaws & 2;
	hello.secret[0] ^= flaws & 4;
	strcpy(hello.scheme, flaws & 8 ? "other" : "fuzz");
	hello.n_blocks -= flaws & 16 ? 1 : 0;
	blocks[0].size += flaws & 32 ? blocks[0].page_size : 0;
	hello.capabilities = flaws & 64 ? 0 : PR_HELLO_CAN_ZSTD;
	pr_hello_encode(body, &hello);
}

static void put_hello_ack(Script *script, GByteArray *body)
{
	PrHelloAck ack = {.status = next(script), .data_port = 4445, .reason = "a reason"};

	pr_hello_ack_encode(body, &ack);
}

static void put_advise(Script *script, GByteArray *body)
{
	uint64_t summary = 0;

	for (guint i = 0; i < script->n_blocks; i++)
		summary |= script->blocks[i].page_size;
	pr_advise_encode(body, summary << (next(script) & 1), 4096);
}

static void put_grant(Script *script, GByteArray *body)
{
	uint32_t index;
	const PrWireBlock *block = next_block(script, &index);
	uint64_t page = next(script), pages = next(script);
	PrWireGrant grant = {page * block->page_size, pages * block->page_size, 0x10000, 7};

	pr_grants_encode(body, index, &grant, 1);
}

/* 0 pages: all to the end of the block. */
static void put_zero(Script *script, GByteArray *body)
{
	uint32_t index;
	const PrWireBlock *block = next_block(script, &index);
	uint64_t offset = (uint64_t)next(script) * block->page_size;
	uint64_t length = (uint64_t)next(script) * block->page_size;
	PrWireRange range = {offset, length ? length : block->size - MIN(block->size, offset)};

	pr_ranges_encode(body, index, &range, 1);
}

static void put_packaged(Script *script, GByteArray *body)
{
	uint8_t flags = next(script);

	pr_packaged_encode(body, flags & 1, flags >> 1 & 1, "device state", flags & 1 ? 0 : 12);
}

static void put_block_name(Script *script, GByteArray *body)
{
	uint32_t index;

	pr_block_name_encode(body, next_block(script, &index)->idstr);
}

static void put_activate(Script *script, GByteArray *body)
{
	PrActivate activate = {.epoch = next(script)};

	activate.resume = next(script);
	pr_activate_encode(body, &activate);
}

static uint16_t put_bitmap(Script *script, GByteArray *body, gboolean zstd)
{
	uint32_t index;
	const PrWireBlock *block = next_block(script, &index);
	uint64_t n_bits = block->size / block->page_size;
	g_autofree unsigned long *bits = g_new0(unsigned long, n_bits / 64 + 1);
	uint8_t pattern = next(script);

	memset(bits, pattern, (n_bits / 64 + 1) * sizeof *bits);
	return pr_recv_bitmap_encode(body, block->idstr, bits, n_bits, zstd);
}

static void put_progress(Script *script, GByteArray *body)
{
	PrProgress progress = {.received_pages = next(script), .remaining = 4096, .zero_pages = 1};

	progress.postcopy_requests = next(script);
	progress.postcopy_bytes = next(script);
	pr_progress_encode(body, &progress);
}

static void put_probed(Script *script, GByteArray *body)
{
	PrProbed probed = {next(script), 250};

	pr_probed_encode(body, &probed);
}

static void put_lost(Script *script, GByteArray *body)
{
	PrLost lost = {.epoch = next(script), .reason = "a rail is DOWN"};

	lost.paused_by_operator = next(script) & 1;
	pr_lost_encode(body, &lost);
}

static uint16_t put_reason(Script *script, GByteArray *body)
{
	static const uint16_t types[] = {PR_MSG_PAUSE, PR_MSG_HOLD, PR_MSG_ERROR};

	pr_reason_encode(body, "they have their reasons");
	return types[next(script) % G_N_ELEMENTS(types)];
}

static void put_heartbeat(Script *script, GByteArray *body)
{
	PrHeartbeatBody heartbeat = {.stamp = next(script)};
	uint8_t raw[PR_HEARTBEAT_BYTES];

	heartbeat.echo = next(script);
	heartbeat.echo_age = next(script);
	pr_heartbeat_encode(raw, &heartbeat);
	g_byte_array_append(body, raw, sizeof raw);
}

static void put_lane(Script *script, GByteArray *body)
{
	PrBinding binding = {.uuid = SCRIPT_UUID, .secret = SCRIPT_SECRET, .epoch = next(script)};
	PrLaneHello lane;

	pr_backend_lane_hello(&lane, &binding, next(script));
	pr_lane_hello_encode(body, &lane);
}

static void put_bytes_as_they_are(Script *script, GByteArray *body)
{
	gsize n;
	const uint8_t *bytes = fuzz_take(script->input, next(script), &n);

	if (n)
		g_byte_array_append(body, bytes, n);
}

static uint16_t put_typed(Script *script, GByteArray *body)
{
	uint16_t type = fuzz_u16(script->input);

	put_bytes_as_they_are(script, body);
	return type;
}

static void put_value(Script *script, GByteArray *body)
{
	pr_u32_encode(body, next(script));
}

static void put_nothing(Script *script, GByteArray *body)
{
}

static const struct Message {
	uint16_t type;
	void (*put)(Script *script, GByteArray *body);
} messages[SCRIPT_N_OPS] = {
	[SCRIPT_HELLO] = {PR_MSG_HELLO, put_hello},
	[SCRIPT_HELLO_ACK] = {PR_MSG_HELLO_ACK, put_hello_ack},
	[SCRIPT_ADVISE] = {PR_CMD_POSTCOPY_ADVISE, put_advise},
	[SCRIPT_PING] = {PR_CMD_PING, put_value},
	[SCRIPT_GRANT] = {PR_CMD_GRANT, put_grant},
	[SCRIPT_ZERO] = {PR_CMD_RAM_ZERO, put_zero},
	[SCRIPT_LISTEN] = {PR_CMD_POSTCOPY_LISTEN, put_nothing},
	[SCRIPT_PACKAGED] = {PR_CMD_PACKAGED, put_packaged},
	[SCRIPT_RUN] = {PR_CMD_POSTCOPY_RUN, put_nothing},
	[SCRIPT_ASK_BITMAP] = {PR_CMD_RECV_BITMAP, put_block_name},
	[SCRIPT_RESUME] = {PR_CMD_POSTCOPY_RESUME, put_nothing},
	[SCRIPT_ACTIVATE] = {PR_CMD_ACTIVATE, put_activate},
	[SCRIPT_PONG] = {PR_RP_PONG, put_value},
	[SCRIPT_RESUME_ACK] = {PR_RP_RESUME_ACK, put_value},
	[SCRIPT_PROGRESS] = {PR_RP_PROGRESS, put_progress},
	[SCRIPT_SHUT] = {PR_RP_SHUT, put_value},
	[SCRIPT_PROBED] = {PR_RP_PROBED, put_probed},
	[SCRIPT_ACTIVATED] = {PR_RP_ACTIVATED, put_hello_ack},
	[SCRIPT_LOST] = {PR_MSG_LOST, put_lost},
	[SCRIPT_HEARTBEAT] = {PR_MSG_HEARTBEAT, put_heartbeat},
	[SCRIPT_LANE] = {PR_MSG_LANE, put_lane},
};

static void add_message(Script *script, ScriptOp op)
{
	g_autoptr(GByteArray) body = g_byte_array_new();
	uint16_t type = messages[op].type;

	switch (op) {
	case SCRIPT_RAW:
		put_bytes_as_they_are(script, script->out);
		return;
	case SCRIPT_BITMAP:
	case SCRIPT_BITMAP_ZSTD:
		type = put_bitmap(script, body, op == SCRIPT_BITMAP_ZSTD);
		break;
	case SCRIPT_REASON:
		type = put_reason(script, body);
		break;
	case SCRIPT_TYPED:
		type = put_typed(script, body);
		break;
	default:
		messages[op].put(script, body);
	}
	add_frame(script, type, body);
}

/* Reads up to and including the operation that ends the segment. */
static ScriptSegment read_segment(Script *script)
{
	ScriptSegment segment = {.bytes = g_byte_array_new(), .then = SCRIPT_END};

	script->out = segment.bytes;
	while (script->input->left && script->total + segment.bytes->len < BYTES_MAX) {
		ScriptOp op = next(script) % SCRIPT_N_OPS;

		if (op == SCRIPT_END)
			break;
		if (op == SCRIPT_CONNECT || op == SCRIPT_COMMAND) {
			segment.then = op;
			segment.what = op == SCRIPT_COMMAND ? next(script) : 0;
			break;
		}
		add_message(script, op);
	}
	script->total += segment.bytes->len;
	return segment;
}

static void segment_clear(gpointer segment)
{
	g_byte_array_unref(((ScriptSegment *)segment)->bytes);
}

GArray *script_read(FuzzInput *input, const PrWireBlock *blocks, guint n_blocks)
{
	GArray *segments = g_array_new(FALSE, FALSE, sizeof(ScriptSegment));
	Script script = {.input = input, .blocks = blocks, .n_blocks = n_blocks};
	ScriptSegment segment;

	g_array_set_clear_func(segments, segment_clear);
	do {
		segment = read_segment(&script);
		g_array_append_val(segments, segment);
	} while (segment.then != SCRIPT_END);
	return segments;
}
