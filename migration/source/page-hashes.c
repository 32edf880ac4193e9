/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/source/page-hashes.h"

#include "migration/postcopy/verify.h"
#include "migration/session/messages.h"

/* The hash of a page of zeros. A hole is not read: that would allocate it. */
static uint64_t hash_of_hole(uint32_t page_size)
{
	g_autofree uint8_t *zeros = g_malloc0(page_size);

	return pr_verify_hash(zeros, page_size);
}

static void hash_range(const PrRamBlock *block, const PrWireRange *range, PrHashes *ret)
{
	uint64_t at = range->offset, end = range->offset + range->length;
	uint64_t hole = 0;

	while (at < end) {
		PrExtent data;

		if (!pr_ram_next_data(block, at, end, &data))
			data = (PrExtent){end, end};
		if (data.start > at && hole == 0)
			hole = hash_of_hole(block->page_size);
		for (; at < data.start; at += block->page_size)
			ret->hash[ret->n++] = hole;
		for (; at < data.end; at += block->page_size)
			ret->hash[ret->n++] = pr_verify_hash(block->host + at, block->page_size);
	}
}

static gboolean send_range(PrConn *conn, const PrRamBlock *block, uint32_t index,
			   const PrWireRange *range, GError **error)
{
	g_autoptr(GByteArray) body = g_byte_array_new();
	PrHashes hashes = {.block = index, .offset = range->offset};

	if (!pr_ram_block_contains(block, range->offset, range->length) ||
	    range->length / block->page_size > PR_HASHES_MAX) {
		g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_PROTOCOL,
			    "REQ_HASHES of a range that RAM block %s does not have", block->idstr);
		return FALSE;
	}
	hash_range(block, range, &hashes);
	pr_hashes_encode(body, &hashes);
	return pr_send(conn, PR_CMD_HASHES, body, error);
}

gboolean pr_source_handle_req_hashes(PrConn *conn, const PrMsg *msg, GError **error)
{
	const PrRam *ram = conn->session->ram;
	g_autofree PrWireRange *ranges = NULL;
	uint32_t index;
	guint n;

	if (!pr_ranges_decode(msg->body, msg->length, &index, &ranges, &n, error))
		return FALSE;
	if (index >= ram->n_blocks) {
		g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_PROTOCOL,
			    "REQ_HASHES for block %u, but there are only %u", index, ram->n_blocks);
		return FALSE;
	}
	for (guint i = 0; i < n; i++)
		if (!send_range(conn, &ram->blocks[index], index, &ranges[i], error))
			return FALSE;
	return TRUE;
}

void pr_source_note_verify(PrSource *source, const PrHelloAck *ack)
{
	PrSession *session = source->session;
	gboolean verifies = (ack->capabilities & PR_HELLO_CAN_VERIFY) != 0;

	if (!verifies && pr_capability(session->params, PR_CAP_VERIFY))
		g_message("pages are not verified: capability verify is off at the destination");
	pr_session_lock(session);
	session->verifies = verifies;
	pr_session_unlock(session);
}
