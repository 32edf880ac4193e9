/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Capability `verify` on the wire: the source's answers, and what the destination asks, hears and reports. */
#include <string.h>

#include "migration/session/session.h"

/* ---- the source ---- */

/* Of one page. A hole is not read: that would fill it. */
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

static gboolean tell_range(PrConn *conn, const PrRamBlock *block, uint32_t index,
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

gboolean pr_source_tell_hashes(PrMigration *m, PrConn *conn, const PrMsg *msg, GError **error)
{
	g_autofree PrWireRange *ranges = NULL;
	uint32_t index;
	guint n;

	if (!pr_ranges_decode(msg->body, msg->length, &index, &ranges, &n, error))
		return FALSE;
	if (index >= m->ram->n_blocks) {
		g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_PROTOCOL,
			    "REQ_HASHES for block %u, but there are only %u", index,
			    m->ram->n_blocks);
		return FALSE;
	}
	for (guint i = 0; i < n; i++)
		if (!tell_range(conn, &m->ram->blocks[index], index, &ranges[i], error))
			return FALSE;
	return TRUE;
}

void pr_source_note_verify(PrMigration *m, const PrHelloAck *ack)
{
	gboolean verifies = (ack->capabilities & PR_HELLO_CAN_VERIFY) != 0;

	if (!verifies && pr_capability(m->params, PR_CAP_VERIFY))
		g_message("pages are not verified: capability verify is off at the destination");
	g_mutex_lock(&m->lock);
	m->verifies = verifies;
	g_mutex_unlock(&m->lock);
}

/* ---- the destination ---- */

gboolean pr_hashes_take(PrConn *conn, const PrMsg *msg, GError **error)
{
	PrMigration *m = conn->m;
	PrHashes hashes;

	if (!pr_hashes_decode(msg->body, msg->length, &hashes, error))
		return FALSE;
	g_mutex_lock(&m->lock);
	if (m->conn == conn && m->verify)
		pr_verify_answer(m->verify, &hashes);
	g_mutex_unlock(&m->lock);
	return TRUE;
}

/* The thread that calls this has the connection until pr_verify_detach(). */
static void ask(guint block, const PrWireRange *ranges, guint n, void *opaque)
{
	PrMigration *m = opaque;
	g_autoptr(GByteArray) body = g_byte_array_new();

	g_mutex_lock(&m->lock);
	PrConn *conn = m->conn;
	g_mutex_unlock(&m->lock);
	pr_ranges_encode(body, block, ranges, n);
	/* A failure reports itself. */
	if (conn)
		pr_send(conn, PR_RP_REQ_HASHES, body, NULL);
}

static void settled(void *opaque)
{
	pr_fault_notify(((PrMigration *)opaque)->faults);
}

static void complete(void *opaque)
{
	pr_destination_check_complete(opaque);
}

static void broken(const GError *error, void *opaque)
{
	pr_migration_failed(opaque, NULL, error);
}

/* The connection by which it came; NULL: it has gone meanwhile. With the lock held. */
static PrConn *conn_of(PrMigration *m, guint stripe)
{
	if (stripe == 0)
		return m->conn;
	for (guint i = 0; i < m->standbys->len; i++) {
		PrConn *conn = g_ptr_array_index(m->standbys, i);

		if (conn->stripe == stripe)
			return conn;
	}
	return NULL;
}

static void note_corrupt(PrMigration *m, PrConn *conn, const PrCorrupt *corrupt)
{
	g_free(m->last_corrupt);
	m->last_corrupt =
		g_strdup_printf("page %" G_GUINT64_FORMAT
				" of RAM block %s, over %s, epoch %" G_GUINT64_FORMAT,
				corrupt->page, m->ram->blocks[corrupt->block].idstr,
				conn ? conn->name : "a path that is gone", m->binding.epoch);
	g_warning("a page was not what the source has, and is read again: %s (%u of %u times)",
		  m->last_corrupt, corrupt->strikes, PR_VERIFY_STRIKES);
}

static void corrupt(const PrCorrupt *corrupt, void *opaque)
{
	PrMigration *m = opaque;
	g_autoptr(GError) error = NULL;

	g_mutex_lock(&m->lock);
	PrConn *conn = conn_of(m, corrupt->stripe);
	note_corrupt(m, conn, corrupt);
	if (conn && corrupt->strikes >= PR_VERIFY_STRIKES) {
		error = g_error_new(PR_PATH_ERROR, PR_PATH_ERROR_LOST,
				    "path %s: it does not bring what the source has: %s",
				    conn->name, m->last_corrupt);
		pr_conn_failed_locked(conn, error);
	}
	g_mutex_unlock(&m->lock);
	pr_session_flush_events(m);
}

gboolean pr_destination_start_verify(PrMigration *m, GError **error)
{
	const PrVerifyHooks hooks = {ask, settled, complete, corrupt, broken, m};
	PrVerify *verify = m->verifies ? pr_verify_start(m->ram, m->uffd, &hooks, error) : NULL;

	if (m->verifies && !verify)
		return FALSE;
	m->ram->verify = verify;
	g_mutex_lock(&m->lock);
	m->verify = verify;
	g_mutex_unlock(&m->lock);
	return TRUE;
}

PrVerify *pr_destination_stop_verify(PrMigration *m)
{
	g_mutex_lock(&m->lock);
	PrVerify *verify = g_steal_pointer(&m->verify);
	if (verify)
		pr_verify_stats(verify, &m->verify_stats);
	g_mutex_unlock(&m->lock);
	pr_verify_stop(verify);
	return verify;
}
