/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Decodes everything that a peer sends: pure functions, which are fuzzed. A length in a message
 * is compared with the bytes that are there before it is used to allocate or to loop. (encode.c
 * is the other direction.)
 */
#include "transport/wire/wire.h"

#include <string.h>

#include "transport/wire/bytes.h"
#include "util/try-alloc.h"
#include "transport/wire/zstd.h"

G_DEFINE_QUARK(pr_wire_error, pr_wire_error)

#define PACKAGED_HEAD	   5 /* flags, length */
#define RANGES_HEAD	   8 /* block, n */
#define RANGE_BYTES	   16
#define GRANT_BYTES	   32
#define RAIL_BYTES	   17
#define HASHES_HEAD	   16 /* block, offset, n */
#define BLOCK_BYTES_MAX	   (1 + PR_IDSTR_MAX + 8 + 4)
#define BLOCK_BYTES_MIN	   (1 + 1 + 8 + 4)
#define REASON_BYTES_MAX   (2 + PR_REASON_MAX)
#define ACK_BYTES_MAX	   (4 + 2 + 4 + 8 + 2 + PR_PROGRESS_BYTES + REASON_BYTES_MAX)
#define RANGES_BYTES_MAX   (RANGES_HEAD + PR_RANGES_MAX * RANGE_BYTES)
#define GRANTS_BYTES_MAX   (RANGES_HEAD + PR_RANGES_MAX * GRANT_BYTES)
#define HELLO_HEAD_MAX	   (4 + 2 + 1 + PR_UUID_BYTES + 8 + 1 + PR_SECRET_BYTES + 8 + 16 + 4)
#define HELLO_BYTES_MAX	   (HELLO_HEAD_MAX + PR_BLOCKS_MAX * BLOCK_BYTES_MAX)
#define PAGE_SIZE_MIN	   4096
#define REQ_PAGES_MAX	   (1024 * 1024)
#define UNKNOWN_LENGTH_MAX (64 * 1024)

typedef struct MsgInfo {
	uint16_t type;
	const char *name;
	uint32_t max_length;
} MsgInfo;

static const MsgInfo messages[] = {
	{PR_MSG_HELLO, "HELLO", HELLO_BYTES_MAX},
	{PR_MSG_HELLO_ACK, "HELLO_ACK", ACK_BYTES_MAX},
	{PR_MSG_LANE, "LANE", PR_LANE_HELLO_BYTES},
	{PR_MSG_LANE_ACK, "LANE_ACK", ACK_BYTES_MAX},
	{PR_MSG_HEARTBEAT, "HEARTBEAT", PR_HEARTBEAT_BYTES},
	{PR_MSG_PAUSE, "PAUSE", REASON_BYTES_MAX},
	{PR_MSG_HOLD, "HOLD", REASON_BYTES_MAX},
	{PR_MSG_ERROR, "ERROR", REASON_BYTES_MAX},
	{PR_MSG_LOST, "LOST", 8 + 1 + REASON_BYTES_MAX},
	{PR_MSG_NOTE, "NOTE", REASON_BYTES_MAX},
	{PR_CMD_PING, "CMD_PING", 4},
	{PR_CMD_POSTCOPY_ADVISE, "CMD_POSTCOPY_ADVISE", 16},
	{PR_CMD_POSTCOPY_LISTEN, "CMD_POSTCOPY_LISTEN", 0},
	{PR_CMD_POSTCOPY_RUN, "CMD_POSTCOPY_RUN", 0},
	{PR_CMD_PACKAGED, "CMD_PACKAGED", PACKAGED_HEAD + PR_PACKAGED_CHUNK},
	{PR_CMD_POSTCOPY_RESUME, "CMD_POSTCOPY_RESUME", 0},
	{PR_CMD_RECV_BITMAP, "CMD_RECV_BITMAP", 1 + PR_IDSTR_MAX},
	{PR_CMD_GRANT, "CMD_GRANT", GRANTS_BYTES_MAX},
	{PR_CMD_RAM_ZERO, "CMD_RAM_ZERO", RANGES_BYTES_MAX},
	{PR_CMD_ACTIVATE, "CMD_ACTIVATE", 8 + 1},
	{PR_CMD_HASHES, "CMD_HASHES", HASHES_HEAD + PR_HASHES_MAX * 8},
	{PR_CMD_EARLY_STATE, "CMD_EARLY_STATE", PR_PACKAGED_CHUNK},
	{PR_RP_SHUT, "RP_SHUT", 4},
	{PR_RP_PONG, "RP_PONG", 4},
	{PR_RP_REQ_PAGES, "RP_REQ_PAGES", PR_REQ_PAGES_BYTES},
	{PR_RP_RECV_BITMAP, "RP_RECV_BITMAP", 1 + PR_IDSTR_MAX + 8 + BITMAP_BYTES_MAX + 8},
	{PR_RP_RECV_BITMAP_ZSTD, "RP_RECV_BITMAP_ZSTD",
	 1 + PR_IDSTR_MAX + 8 + BITMAP_BYTES_MAX + 8},
	{PR_RP_RESUME_ACK, "RP_RESUME_ACK", 4},
	{PR_RP_PROGRESS, "RP_PROGRESS", PR_PROGRESS_BYTES},
	{PR_RP_PAGES, "RP_PAGES", PR_REQ_PAGES_BYTES + REQ_PAGES_MAX},
	{PR_RP_ACTIVATED, "RP_ACTIVATED", ACK_BYTES_MAX},
	{PR_RP_PROBED, "RP_PROBED", 16},
	{PR_RP_RAILS, "RP_RAILS", 4 + PR_RAILS_MAX *RAIL_BYTES},
	{PR_RP_SCAN_FIRST, "RP_SCAN_FIRST", RANGES_BYTES_MAX},
	{PR_RP_REQ_HASHES, "RP_REQ_HASHES", RANGES_BYTES_MAX},
};

static const MsgInfo *msg_info(uint16_t type)
{
	for (gsize i = 0; i < G_N_ELEMENTS(messages); i++)
		if (messages[i].type == type)
			return &messages[i];
	return NULL;
}

const char *pr_msg_name(uint16_t type)
{
	static __thread char unknown[sizeof "type 0xffff"];
	const MsgInfo *info = msg_info(type);

	if (info)
		return info->name;
	g_snprintf(unknown, sizeof unknown, "type 0x%04x", type);
	return unknown;
}

gboolean pr_msg_is_known(uint16_t type)
{
	return msg_info(type) != NULL;
}

uint32_t pr_msg_max_length(uint16_t type)
{
	const MsgInfo *info = msg_info(type);

	return info ? info->max_length : UNKNOWN_LENGTH_MAX;
}

static gboolean G_GNUC_PRINTF(2, 3) malformed(GError **error, const char *format, ...)
{
	g_autofree char *what = NULL;
	va_list args;

	va_start(args, format);
	what = g_strdup_vprintf(format, args);
	va_end(args);
	g_set_error_literal(error, PR_WIRE_ERROR, PR_WIRE_ERROR_MALFORMED, what);
	return FALSE;
}

/* Whether the cursor is exactly at the end of the body. */
static gboolean finished(const Cursor *cursor, uint16_t type, gsize len, GError **error)
{
	if (cursor->overrun)
		return malformed(error, "%s is too short (%" G_GSIZE_FORMAT " bytes)",
				 pr_msg_name(type), len);
	if (cursor->left)
		return malformed(error,
				 "%s has %" G_GSIZE_FORMAT " bytes too many (%" G_GSIZE_FORMAT
				 " in all)",
				 pr_msg_name(type), cursor->left, len);
	return TRUE;
}

/* UTF-8 without control characters, which may be logged and shown on a terminal. */
static gboolean is_clean_text(const char *text, gsize length)
{
	for (gsize i = 0; i < length; i++)
		if ((uint8_t)text[i] < 0x20 || text[i] == 0x7f)
			return FALSE;
	return g_utf8_validate_len(text, length, NULL);
}

/* Reads a text of `length` bytes into out[size], NUL-terminated. A text that does not fit is an
 * overrun. */
static gboolean get_text(Cursor *cursor, gsize length, char *out, gsize size)
{
	if (length >= size) {
		cursor->overrun = TRUE;
		length = 0;
	}
	get_bytes(cursor, out, length);
	out[length] = '\0';
	return is_clean_text(out, length);
}

static gboolean get_name(Cursor *cursor, char *out, gsize size)
{
	uint8_t length = get_u8(cursor);

	return get_text(cursor, length, out, size) && length > 0;
}

static gboolean is_power_of_two(uint64_t value)
{
	return value && !(value & (value - 1));
}

static gboolean is_range(uint64_t offset, uint64_t length)
{
	return length > 0 && length <= UINT64_MAX - offset;
}

static gboolean get_magic(Cursor *cursor, uint16_t type, GError **error)
{
	uint32_t magic = get_u32(cursor);

	if (magic == PR_WIRE_MAGIC)
		return TRUE;
	return malformed(error, "%s begins with 0x%08x, not with Postroad's magic",
			 pr_msg_name(type), magic);
}

gboolean pr_header_decode(const uint8_t in[PR_WIRE_HEADER_BYTES], PrMsgHeader *ret, GError **error)
{
	Cursor cursor = {.at = in, .left = PR_WIRE_HEADER_BYTES};
	uint16_t type = get_u16(&cursor);
	uint16_t zero = get_u16(&cursor);
	uint32_t length = get_u32(&cursor);

	if (zero)
		return malformed(error, "bytes 2 and 3 of a frame are 0x%04x, not zero", zero);
	if (length > pr_msg_max_length(type))
		return malformed(error, "%s claims %u bytes, at most %u are allowed",
				 pr_msg_name(type), length, pr_msg_max_length(type));
	*ret = (PrMsgHeader){.type = type, .length = length};
	return TRUE;
}

void pr_hello_clear(PrHello *hello)
{
	g_clear_pointer(&hello->blocks, g_free);
	hello->n_blocks = 0;
}

void pr_hello_copy(PrHello *ret, const PrHello *hello)
{
	*ret = *hello;
	ret->blocks = g_memdup2(hello->blocks, hello->n_blocks * sizeof(PrWireBlock));
}

static gboolean check_block(const PrHello *hello, const PrWireBlock *block, GError **error)
{
	if (!is_power_of_two(block->page_size) || block->page_size < PAGE_SIZE_MIN)
		return malformed(error, "RAM block %s: page size %u is no power of two >= %d",
				 block->idstr, block->page_size, PAGE_SIZE_MIN);
	if (!block->size || block->size > INT64_MAX || block->size % block->page_size)
		return malformed(error,
				 "RAM block %s: size %" G_GUINT64_FORMAT
				 " is not a multiple of its page size %u",
				 block->idstr, block->size, block->page_size);
	for (const PrWireBlock *other = hello->blocks; other < block; other++)
		if (!strcmp(other->idstr, block->idstr))
			return malformed(error, "RAM block %s is listed twice", block->idstr);
	return TRUE;
}

static gboolean get_blocks(Cursor *cursor, PrHello *hello, GError **error)
{
	uint32_t n = get_u32(cursor);

	if (n > PR_BLOCKS_MAX || n > cursor->left / BLOCK_BYTES_MIN)
		return malformed(error, "HELLO claims %u RAM blocks in %" G_GSIZE_FORMAT " bytes",
				 n, cursor->left);
	if (!n && hello->role == PR_HELLO_SOURCE)
		return malformed(error, "HELLO of a source lists no RAM block");
	hello->blocks = g_new0(PrWireBlock, n);
	for (; hello->n_blocks < n; hello->n_blocks++) {
		PrWireBlock *block = &hello->blocks[hello->n_blocks];
		gboolean named = get_name(cursor, block->idstr, sizeof block->idstr);

		block->size = get_u64(cursor);
		block->page_size = get_u32(cursor);
		if (cursor->overrun)
			return TRUE;
		if (!named)
			return malformed(error, "RAM block %u has no proper name", hello->n_blocks);
		if (!check_block(hello, block, error))
			return FALSE;
	}
	return TRUE;
}

static gboolean is_scheme(const char *scheme)
{
	for (const char *c = scheme; *c; c++)
		if (!g_ascii_islower(*c) && !g_ascii_isdigit(*c) && *c != '+')
			return FALSE;
	return *scheme != '\0';
}

static gboolean get_hello_head(Cursor *cursor, PrHello *hello, GError **error)
{
	gboolean named;

	hello->version = get_u16(cursor);
	if (!cursor->overrun && hello->version != PR_WIRE_VERSION)
		return malformed(
			error,
			"the peer speaks version %u of the protocol, this side version %d; "
			"run the same release on both",
			hello->version, PR_WIRE_VERSION);
	hello->role = get_u8(cursor);
	get_bytes(cursor, hello->uuid, sizeof hello->uuid);
	hello->epoch = get_u64(cursor);
	hello->resume = get_u8(cursor);
	get_bytes(cursor, hello->secret, sizeof hello->secret);
	hello->capabilities = get_u64(cursor);
	named = get_name(cursor, hello->scheme, sizeof hello->scheme);
	if (cursor->overrun)
		return malformed(error, "HELLO is too short");
	if (hello->role != PR_HELLO_SOURCE && hello->role != PR_HELLO_DESTINATION)
		return malformed(error, "HELLO names the unknown role %u", hello->role);
	if (hello->resume > PR_RESUME_STANDBY)
		return malformed(error, "HELLO has %u for resume, more than 3", hello->resume);
	if (!hello->epoch)
		return malformed(error, "HELLO names the epoch 0, epochs begin with 1");
	if (!named || !is_scheme(hello->scheme))
		return malformed(error, "HELLO names no proper scheme");
	return TRUE;
}

gboolean pr_hello_decode(const uint8_t *body, gsize len, PrHello *ret, GError **error)
{
	Cursor cursor = {.at = body, .left = len};
	g_auto(PrHello) hello = {0};

	if (!get_magic(&cursor, PR_MSG_HELLO, error) || !get_hello_head(&cursor, &hello, error) ||
	    !get_blocks(&cursor, &hello, error) || !finished(&cursor, PR_MSG_HELLO, len, error))
		return FALSE;
	*ret = hello;
	hello = (PrHello){0};
	return TRUE;
}

static void get_progress(Cursor *cursor, PrProgress *progress)
{
	progress->received_pages = get_u64(cursor);
	progress->postcopy_requests = get_u64(cursor);
	progress->postcopy_bytes = get_u64(cursor);
	progress->remaining = get_u64(cursor);
	progress->zero_pages = get_u64(cursor);
}

static gboolean get_reason(Cursor *cursor, uint16_t type, char out[PR_REASON_MAX + 1],
			   GError **error)
{
	uint16_t length = get_u16(cursor);

	if (get_text(cursor, length, out, PR_REASON_MAX + 1) || cursor->overrun)
		return TRUE;
	return malformed(error, "%s has a reason that is no clean UTF-8", pr_msg_name(type));
}

gboolean pr_hello_ack_decode(const uint8_t *body, gsize len, PrHelloAck *ret, GError **error)
{
	Cursor cursor = {.at = body, .left = len};
	PrHelloAck ack;
	uint16_t version;

	if (!get_magic(&cursor, PR_MSG_HELLO_ACK, error))
		return FALSE;
	version = get_u16(&cursor);
	ack.status = get_u32(&cursor);
	ack.capabilities = get_u64(&cursor);
	ack.data_port = get_u16(&cursor);
	get_progress(&cursor, &ack.progress);
	if (!get_reason(&cursor, PR_MSG_HELLO_ACK, ack.reason, error) ||
	    !finished(&cursor, PR_MSG_HELLO_ACK, len, error))
		return FALSE;
	if (ack.status > PR_HELLO_PAUSED_BY_OPERATOR)
		return malformed(error, "HELLO_ACK has the unknown status %u", ack.status);
	if (version != PR_WIRE_VERSION && ack.status != PR_HELLO_REFUSED)
		return malformed(error,
				 "the peer speaks version %u of the protocol, this side version %d",
				 version, PR_WIRE_VERSION);
	*ret = ack;
	return TRUE;
}

gboolean pr_lane_hello_decode(const uint8_t *body, gsize len, PrLaneHello *ret, GError **error)
{
	Cursor cursor = {.at = body, .left = len};
	PrLaneHello lane;

	if (!get_magic(&cursor, PR_MSG_LANE, error))
		return FALSE;
	get_bytes(&cursor, lane.uuid, sizeof lane.uuid);
	lane.epoch = get_u64(&cursor);
	get_bytes(&cursor, lane.token, sizeof lane.token);
	lane.lane = get_u8(&cursor);
	if (!finished(&cursor, PR_MSG_LANE, len, error))
		return FALSE;
	*ret = lane;
	return TRUE;
}

gboolean pr_heartbeat_decode(const uint8_t *body, gsize len, PrHeartbeatBody *ret, GError **error)
{
	Cursor cursor = {.at = body, .left = len};
	PrHeartbeatBody heartbeat = {.stamp = get_u64(&cursor)};

	heartbeat.echo = get_u64(&cursor);
	heartbeat.echo_age = get_u64(&cursor);
	if (!finished(&cursor, PR_MSG_HEARTBEAT, len, error))
		return FALSE;
	*ret = heartbeat;
	return TRUE;
}

gboolean pr_u32_decode(const uint8_t *body, gsize len, uint32_t *ret, GError **error)
{
	Cursor cursor = {.at = body, .left = len};
	uint32_t value = get_u32(&cursor);

	if (cursor.overrun || cursor.left)
		return malformed(error, "a number of 4 bytes has %" G_GSIZE_FORMAT, len);
	*ret = value;
	return TRUE;
}

gboolean pr_reason_decode(const uint8_t *body, gsize len, char ret[PR_REASON_MAX + 1],
			  GError **error)
{
	Cursor cursor = {.at = body, .left = len};
	char reason[PR_REASON_MAX + 1];

	if (!get_reason(&cursor, PR_MSG_PAUSE, reason, error) ||
	    !finished(&cursor, PR_MSG_PAUSE, len, error))
		return FALSE;
	memcpy(ret, reason, strlen(reason) + 1);
	return TRUE;
}

gboolean pr_advise_decode(const uint8_t *body, gsize len, uint64_t *ret_summary,
			  uint64_t *ret_target_page_size, GError **error)
{
	Cursor cursor = {.at = body, .left = len};
	uint64_t summary = get_u64(&cursor);
	uint64_t page_size = get_u64(&cursor);

	if (!finished(&cursor, PR_CMD_POSTCOPY_ADVISE, len, error))
		return FALSE;
	if (!is_power_of_two(page_size) || !summary || summary % page_size)
		return malformed(error,
				 "CMD_POSTCOPY_ADVISE: page sizes 0x%" G_GINT64_MODIFIER
				 "x and target page size 0x%" G_GINT64_MODIFIER "x make no sense",
				 summary, page_size);
	*ret_summary = summary;
	*ret_target_page_size = page_size;
	return TRUE;
}

gboolean pr_progress_decode(const uint8_t *body, gsize len, PrProgress *ret, GError **error)
{
	Cursor cursor = {.at = body, .left = len};
	PrProgress progress;

	get_progress(&cursor, &progress);
	if (!finished(&cursor, PR_RP_PROGRESS, len, error))
		return FALSE;
	*ret = progress;
	return TRUE;
}

/* Reads the head of RAM_ZERO and GRANT. The rest of the body has exactly n elements. */
static gboolean get_ranges_head(Cursor *cursor, uint16_t type, gsize element, uint32_t *ret_block,
				uint32_t *ret_n, GError **error)
{
	uint32_t block = get_u32(cursor);
	uint32_t n = get_u32(cursor);

	if (cursor->overrun)
		return malformed(error, "%s is too short", pr_msg_name(type));
	if (block >= PR_BLOCKS_MAX)
		return malformed(error, "%s is about RAM block %u, there are at most %d",
				 pr_msg_name(type), block, PR_BLOCKS_MAX);
	if (n > PR_RANGES_MAX || cursor->left != n * element)
		return malformed(error, "%s claims %u ranges in %" G_GSIZE_FORMAT " bytes",
				 pr_msg_name(type), n, cursor->left);
	*ret_block = block;
	*ret_n = n;
	return TRUE;
}

static gboolean bad_range(uint16_t type, uint64_t offset, uint64_t length, GError **error)
{
	return malformed(error,
			 "%s: a range of %" G_GUINT64_FORMAT " bytes at offset %" G_GUINT64_FORMAT
			 " is not valid",
			 pr_msg_name(type), length, offset);
}

gboolean pr_ranges_decode(const uint8_t *body, gsize len, uint32_t *ret_block,
			  PrWireRange **ret_ranges, guint *ret_n, GError **error)
{
	Cursor cursor = {.at = body, .left = len};
	g_autofree PrWireRange *ranges = NULL;
	uint32_t block, n;

	if (!get_ranges_head(&cursor, PR_CMD_RAM_ZERO, RANGE_BYTES, &block, &n, error))
		return FALSE;
	ranges = g_new(PrWireRange, n);
	for (uint32_t i = 0; i < n; i++) {
		ranges[i].offset = get_u64(&cursor);
		ranges[i].length = get_u64(&cursor);
		if (!is_range(ranges[i].offset, ranges[i].length))
			return bad_range(PR_CMD_RAM_ZERO, ranges[i].offset, ranges[i].length,
					 error);
	}
	*ret_block = block;
	*ret_ranges = g_steal_pointer(&ranges);
	*ret_n = n;
	return TRUE;
}

gboolean pr_grants_decode(const uint8_t *body, gsize len, uint32_t *ret_block,
			  PrWireGrant **ret_grants, guint *ret_n, GError **error)
{
	Cursor cursor = {.at = body, .left = len};
	g_autofree PrWireGrant *grants = NULL;
	uint32_t block, n;

	if (!get_ranges_head(&cursor, PR_CMD_GRANT, GRANT_BYTES, &block, &n, error))
		return FALSE;
	grants = g_new(PrWireGrant, n);
	for (uint32_t i = 0; i < n; i++) {
		PrWireGrant *grant = &grants[i];

		grant->offset = get_u64(&cursor);
		grant->length = get_u64(&cursor);
		grant->addr = get_u64(&cursor);
		grant->key = get_u64(&cursor);
		if (!is_range(grant->offset, grant->length) ||
		    !is_range(grant->addr, grant->length))
			return bad_range(PR_CMD_GRANT, grant->offset, grant->length, error);
	}
	*ret_block = block;
	*ret_grants = g_steal_pointer(&grants);
	*ret_n = n;
	return TRUE;
}

gboolean pr_req_pages_decode(const uint8_t *body, gsize len, PrReqPages *ret, GError **error)
{
	Cursor cursor = {.at = body, .left = len};
	PrReqPages req;

	req.start = get_u64(&cursor);
	req.length = get_u32(&cursor);
	req.block = get_u32(&cursor);
	if (!finished(&cursor, PR_RP_REQ_PAGES, len, error))
		return FALSE;
	if (req.block >= PR_BLOCKS_MAX || req.length > REQ_PAGES_MAX ||
	    req.start > UINT64_MAX - req.length)
		return bad_range(PR_RP_REQ_PAGES, req.start, req.length, error);
	*ret = req;
	return TRUE;
}

gboolean pr_packaged_decode(const uint8_t *body, gsize len, PrPackaged *ret, GError **error)
{
	Cursor cursor = {.at = body, .left = len};
	uint8_t flags = get_u8(&cursor);
	uint32_t length = get_u32(&cursor);
	const uint8_t *data = take(&cursor, length);

	if (!finished(&cursor, PR_CMD_PACKAGED, len, error))
		return FALSE;
	if (flags & ~(PACKAGED_LAST | PACKAGED_RUNNING) || length > PR_PACKAGED_CHUNK)
		return malformed(error, "CMD_PACKAGED has flags 0x%02x and %u bytes", flags,
				 length);
	*ret = (PrPackaged){
		.last = !!(flags & PACKAGED_LAST),
		.guest_running = !!(flags & PACKAGED_RUNNING),
		.data = data,
		.length = length,
	};
	return TRUE;
}

static gboolean get_block_name(Cursor *cursor, uint16_t type, char out[PR_IDSTR_MAX + 1],
			       GError **error)
{
	if (get_name(cursor, out, PR_IDSTR_MAX + 1) && !cursor->overrun)
		return TRUE;
	return malformed(error, "%s names no RAM block", pr_msg_name(type));
}

gboolean pr_block_name_decode(const uint8_t *body, gsize len, char ret[PR_IDSTR_MAX + 1],
			      GError **error)
{
	Cursor cursor = {.at = body, .left = len};
	char name[PR_IDSTR_MAX + 1];

	if (!get_block_name(&cursor, PR_CMD_RECV_BITMAP, name, error) ||
	    !finished(&cursor, PR_CMD_RECV_BITMAP, len, error))
		return FALSE;
	memcpy(ret, name, strlen(name) + 1);
	return TRUE;
}

static gboolean get_bitmap(const uint8_t *raw, uint64_t n_bits, unsigned long *bits)
{
	memcpy(bits, raw, groups_of(n_bits) * 8);
	return accept_groups(bits, n_bits);
}

/* Reads up to the bitmap itself. *ret_size: its bytes before compression. */
static gboolean get_bitmap_head(Cursor *cursor, uint16_t type, uint64_t n_bits,
				char ret_idstr[PR_IDSTR_MAX + 1], uint64_t *ret_size,
				GError **error)
{
	if (!get_block_name(cursor, type, ret_idstr, error))
		return FALSE;
	*ret_size = get_u64(cursor);
	if (cursor->overrun || (*ret_size % 8 == 0 && *ret_size / 8 == groups_of(n_bits)))
		return TRUE;
	return malformed(error,
			 "%s of RAM block %s has %" G_GUINT64_FORMAT " bytes for %" G_GUINT64_FORMAT
			 " pages",
			 pr_msg_name(type), ret_idstr, *ret_size, n_bits);
}

static gboolean get_end_mark(Cursor *cursor, uint16_t type, gsize len, const char *idstr,
			     GError **error)
{
	if (get_u64(cursor) != PR_BITMAP_END_MARK && !cursor->overrun)
		return malformed(error, "%s of RAM block %s has no end mark", pr_msg_name(type),
				 idstr);
	return finished(cursor, type, len, error);
}

gboolean pr_recv_bitmap_decode(uint16_t type, const uint8_t *body, gsize len,
			       char ret_idstr[PR_IDSTR_MAX + 1], uint64_t n_bits,
			       unsigned long **ret_bits, GError **error)
{
	gboolean compressed = type == PR_RP_RECV_BITMAP_ZSTD;
	Cursor cursor = {.at = body, .left = len};
	g_autofree unsigned long *bits = NULL;
	char idstr[PR_IDSTR_MAX + 1];
	const uint8_t *data;
	uint64_t size, length;

	if (!get_bitmap_head(&cursor, type, n_bits, idstr, &size, error))
		return FALSE;
	length = compressed ? cursor.left - MIN(cursor.left, sizeof(uint64_t)) : size;
	data = take(&cursor, length);
	if (!get_end_mark(&cursor, type, len, idstr, error))
		return FALSE;
	bits = pr_try_alloc(MAX(size, sizeof *bits), "a received bitmap", error);
	if (!bits)
		return FALSE;
	if (!(compressed ? pr_zstd_get_bitmap(data, length, n_bits, bits)
			 : get_bitmap(data, n_bits, bits)))
		return malformed(error, "%s of RAM block %s %s", pr_msg_name(type), idstr,
				 compressed ? "cannot be decompressed to its size"
					    : "has bits beyond its end");
	memcpy(ret_idstr, idstr, strlen(idstr) + 1);
	*ret_bits = g_steal_pointer(&bits);
	return TRUE;
}

gboolean pr_recv_bitmap_name(const uint8_t *body, gsize len, char ret_idstr[PR_IDSTR_MAX + 1],
			     GError **error)
{
	Cursor cursor = {.at = body, .left = len};
	char idstr[PR_IDSTR_MAX + 1];

	if (!get_block_name(&cursor, PR_RP_RECV_BITMAP, idstr, error))
		return FALSE;
	memcpy(ret_idstr, idstr, strlen(idstr) + 1);
	return TRUE;
}

gboolean pr_rails_decode(const uint8_t *body, gsize len, PrRail **ret_rails, guint *ret_n,
			 GError **error)
{
	Cursor cursor = {.at = body, .left = len};
	guint n = get_u32(&cursor);

	if (n > PR_RAILS_MAX)
		return malformed(error, "RP_RAILS of %u paths", n);
	g_autofree PrRail *rails = g_new0(PrRail, MAX(n, 1));
	for (guint i = 0; i < n; i++) {
		rails[i].epoch = get_u64(&cursor);
		rails[i].bytes = get_u64(&cursor);
		rails[i].pulls = get_u8(&cursor) != 0;
	}
	if (!finished(&cursor, PR_RP_RAILS, len, error))
		return FALSE;
	*ret_rails = g_steal_pointer(&rails);
	*ret_n = n;
	return TRUE;
}

gboolean pr_hashes_decode(const uint8_t *body, gsize len, PrHashes *ret, GError **error)
{
	Cursor cursor = {.at = body, .left = len};
	uint32_t block = get_u32(&cursor);
	uint64_t offset = get_u64(&cursor);
	uint32_t n = get_u32(&cursor);

	if (cursor.overrun)
		return malformed(error, "CMD_HASHES is too short");
	if (block >= PR_BLOCKS_MAX || n == 0 || n > PR_HASHES_MAX || cursor.left != n * 8)
		return malformed(error,
				 "CMD_HASHES claims %u hashes of block %u in %" G_GSIZE_FORMAT
				 " bytes",
				 n, block, cursor.left);
	ret->block = block;
	ret->offset = offset;
	ret->n = n;
	for (uint32_t i = 0; i < n; i++)
		ret->hash[i] = get_u64(&cursor);
	return TRUE;
}

gboolean pr_lost_decode(const uint8_t *body, gsize len, PrLost *ret, GError **error)
{
	Cursor cursor = {.at = body, .left = len};
	PrLost lost;

	lost.epoch = get_u64(&cursor);
	lost.paused_by_operator = get_u8(&cursor) != 0;
	if (!get_reason(&cursor, PR_MSG_LOST, lost.reason, error) ||
	    !finished(&cursor, PR_MSG_LOST, len, error))
		return FALSE;
	*ret = lost;
	return TRUE;
}

gboolean pr_activate_decode(const uint8_t *body, gsize len, PrActivate *ret, GError **error)
{
	Cursor cursor = {.at = body, .left = len};
	PrActivate activate;

	activate.epoch = get_u64(&cursor);
	activate.resume = get_u8(&cursor);
	if (!finished(&cursor, PR_CMD_ACTIVATE, len, error))
		return FALSE;
	if (activate.resume != PR_RESUME_ASKED && activate.resume != PR_RESUME_AUTOMATIC)
		return malformed(error, "ACTIVATE has %u for resume", activate.resume);
	*ret = activate;
	return TRUE;
}

gboolean pr_probed_decode(const uint8_t *body, gsize len, PrProbed *ret, GError **error)
{
	Cursor cursor = {.at = body, .left = len};
	PrProbed probed;

	probed.count = get_u64(&cursor);
	probed.rtt_us = get_u64(&cursor);
	if (!finished(&cursor, PR_RP_PROBED, len, error))
		return FALSE;
	*ret = probed;
	return TRUE;
}
