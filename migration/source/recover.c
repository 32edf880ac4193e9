/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Recovery, both halves.
 *
 * When a path is lost both sides end up in postcopy-paused with their connection fenced: at the
 * destination no READ of it is in flight any more. Its received bitmap says what is in place; what standbys were
 * asked for before (rails.c) may come in later, and is claimed until then.
 * The source then connects again, over any path, with a higher epoch:
 *
 *	source                                          destination
 *	  RECOVER_SETUP                                   PAUSED
 *	  HELLO (same uuid and secret, epoch + n) ──▶     fences what it may still have open
 *	                                          ◀──     HELLO_ACK; RECOVER
 *	  lanes, GRANT                            ──▶
 *	  RECOVER
 *	  RECV_BITMAP for every block at once     ──▶
 *	                                          ◀──     RECV_BITMAP each
 *	  dirty = not received
 *	  POSTCOPY_RESUME                         ──▶     the workers get the new path; every fault that waits
 *	                                                  is asked for again; ACTIVE
 *	  ACTIVE                                  ◀──     RESUME_ACK
 *
 * Nothing in it is fatal: any failure leads back to paused, and the next attempt starts at the top. What
 * has to be prepared for a resume is a table of handlers, as in QEMU; RAM is the first.
 *
 * POSTCOPY_RESUME implies RUN: the source sends it only after it has handed the guest over, and RUN may
 * have been lost with the path.
 */
#include <string.h>

#include "migration/memory/bitmap.h"
#include "migration/session/session.h"
#include "migration/core/crash-point.h"
#include "util/try-alloc.h"

typedef struct ResumeHandler {
	const char *name;
	/* Source: brings what it knows about the destination up to date. */
	gboolean (*resume_prepare)(PrMigration *m, PrConn *conn, GError **error);
} ResumeHandler;

/* Neither failed, nor over already: a destination that does not keep to the order may have said RESUME_ACK, and
 * even SHUT, before its bitmaps, and a loss of the path fails nothing after that. With the lock held. */
static gboolean is_recovering(const PrMigration *m)
{
	return !m->failure && m->sm.state == PR_STATE_POSTCOPY_RECOVER;
}

static gboolean ram_resume_prepare(PrMigration *m, PrConn *conn, GError **error)
{
	g_mutex_lock(&m->lock);
	m->bitmaps_due = m->ram->n_blocks;
	g_mutex_unlock(&m->lock);
	for (guint i = 0; i < m->ram->n_blocks; i++) {
		g_autoptr(GByteArray) body = g_byte_array_new();
		pr_block_name_encode(body, m->ram->blocks[i].idstr);
		if (!pr_send(conn, PR_CMD_RECV_BITMAP, body, error))
			return FALSE;
	}
	g_mutex_lock(&m->lock);
	/* Ended by the last bitmap, or by any failure. */
	while (is_recovering(m) && m->bitmaps_due > 0)
		g_cond_wait(&m->changed, &m->lock);
	gboolean done = !m->failure && m->bitmaps_due == 0;
	if (!done)
		pr_migration_copy_failure(m, error);
	g_mutex_unlock(&m->lock);
	return done;
}

static const ResumeHandler resume_handlers[] = {
	{"ram", ram_resume_prepare},
};

gboolean pr_source_take_bitmap(PrMigration *m, const PrMsg *msg, GError **error)
{
	char idstr[PR_IDSTR_MAX + 1];
	g_autofree unsigned long *received = NULL;

	if (!pr_recv_bitmap_name(msg->body, msg->length, idstr, error))
		return FALSE;
	PrRamBlock *block = pr_ram_find(m->ram, idstr);
	g_mutex_lock(&m->lock);
	gboolean due = m->bitmaps_due > 0;
	g_mutex_unlock(&m->lock);
	if (!block || !due) {
		g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_PROTOCOL,
			    "a received bitmap of \"%s\", which was not asked for", idstr);
		return FALSE;
	}
	if (!pr_recv_bitmap_decode(msg->type, msg->body, msg->length, idstr, block->n_pages,
				   &received, error))
		return FALSE;
	for (uint64_t i = 0; i < pr_bitmap_words(block->n_pages); i++)
		__atomic_store_n(&block->dirty[i], ~received[i], __ATOMIC_RELAXED);

	g_mutex_lock(&m->lock);
	m->bitmaps_due--;
	g_cond_broadcast(&m->changed);
	g_mutex_unlock(&m->lock);
	return TRUE;
}

static gboolean final_handshake(PrMigration *m, PrConn *conn, GError **error)
{
	if (!pr_send(conn, PR_CMD_POSTCOPY_RESUME, NULL, error))
		return FALSE;
	pr_crash_point(PR_CRASH_SOURCE_RESUME_SENT);
	g_mutex_lock(&m->lock);
	/* Ended by RESUME_ACK, or by any failure. */
	while (is_recovering(m))
		g_cond_wait(&m->changed, &m->lock);
	gboolean done = !m->failure;
	if (!done)
		pr_migration_copy_failure(m, error);
	g_mutex_unlock(&m->lock);
	return done;
}

gboolean pr_source_recover(PrMigration *m, PrConn *conn, GError **error)
{
	g_autofree char *reason = g_strdup_printf("connected again over %s", conn->name);

	if (!pr_migration_step(m, PR_EVENT_CONNECTED, reason, error))
		return FALSE;
	pr_crash_point(PR_CRASH_SOURCE_RECONNECTED);
	for (guint i = 0; i < G_N_ELEMENTS(resume_handlers); i++)
		if (!resume_handlers[i].resume_prepare(m, conn, error)) {
			g_prefix_error(error,
				       "preparing %s for the resume: ", resume_handlers[i].name);
			return FALSE;
		}
	pr_crash_point(PR_CRASH_SOURCE_BITMAPS_TAKEN);
	return final_handshake(m, conn, error);
}

gboolean pr_destination_send_bitmap(PrMigration *m, PrConn *conn, const PrMsg *msg, GError **error)
{
	char idstr[PR_IDSTR_MAX + 1];
	g_autoptr(GByteArray) body = g_byte_array_new();

	if (!pr_block_name_decode(msg->body, msg->length, idstr, error))
		return FALSE;
	const PrRamBlock *block = pr_ram_find(m->ram, idstr);
	if (!block) {
		g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_PROTOCOL,
			    "the source asks for the received bitmap of \"%s\", which is not here",
			    idstr);
		return FALSE;
	}
	/* Stripes go on placing pages, and the encoder looks more than once. */
	g_autofree unsigned long *received = pr_bitmap_snapshot(block->received, block->n_pages);
	/* The encoded one and, if it is compressed, what it is compressed from. */
	gsize bytes = 3 * pr_bitmap_words(block->n_pages) * sizeof(unsigned long);
	if (!pr_check_memory_headroom(received ? bytes : G_MAXSSIZE, "a received bitmap", error))
		return FALSE;
	uint16_t type = pr_recv_bitmap_encode(body, idstr, received, block->n_pages,
					      (conn->peer_can & PR_HELLO_CAN_ZSTD) != 0);
	if (!pr_send(conn, type, body, error))
		return FALSE;
	pr_crash_point(PR_CRASH_DESTINATION_BITMAP_SENT);
	return TRUE;
}

gboolean pr_destination_resume(PrMigration *m, PrConn *conn, GError **error)
{
	g_autoptr(GByteArray) body = g_byte_array_new();

	pr_u32_encode(body, PR_RESUME_ACK_VALUE);
	if (!pr_send(conn, PR_RP_RESUME_ACK, body, error))
		return FALSE;
	pr_crash_point(PR_CRASH_DESTINATION_RESUME_ACKED);
	g_mutex_lock(&m->lock);
	PrAction action =
		pr_migration_step_locked(m, PR_EVENT_RESUMED, PR_ROLE_DESTINATION, "recovered");
	if (action == PR_ACTION_REFUSE)
		pr_migration_copy_failure(m, error);
	gboolean run = action == PR_ACTION_RUN || !m->guest_started;
	g_mutex_unlock(&m->lock);
	pr_session_flush_events(m);
	if (action == PR_ACTION_REFUSE)
		return FALSE;

	if (m->verify)
		pr_verify_attach(m->verify);
	pr_fault_attach(m->faults, conn->path);
	pr_pull_attach(m->pull, conn->path);
	if (run)
		pr_destination_run(m);
	pr_destination_check_complete(m);
	return TRUE;
}
