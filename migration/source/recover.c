/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Recovery, both halves.
 *
 * When a path is lost both sides end up in postcopy-paused with their connection fenced: at the
 * destination no READ of it is in flight any more. The received bitmap says which pages are in
 * place. READs that rails have posted before (destination/rails.c) may land later; their pages are
 * claimed until then. The source then connects again, over any path, with a higher epoch:
 *
 *   source                                          destination
 *     RECOVER_SETUP                                   PAUSED
 *     HELLO (same uuid and secret, epoch + n) ──▶     fences what it may still have open
 *                                             ◀──     HELLO_ACK; RECOVER
 *     lanes, GRANT                            ──▶
 *     RECOVER
 *     RECV_BITMAP for every block at once     ──▶
 *                                             ◀──     RECV_BITMAP each
 *     dirty = not received
 *     POSTCOPY_RESUME                         ──▶     the workers get the new path; waiting
 *                                                     faults are asked for again; ACTIVE
 *     ACTIVE                                  ◀──     RESUME_ACK
 *
 * No failure is fatal: any leads back to paused, and the next attempt starts at the top. What has
 * to be prepared for a resume is a table of handlers, as in QEMU; RAM is the first.
 *
 * POSTCOPY_RESUME implies RUN: the source sends it only after it has handed the guest over, and RUN
 * may have been lost with the path.
 */
#include "migration/source/recover.h"

#include "migration/core/crash-point.h"
#include "migration/memory/bitmap.h"
#include "migration/session/messages.h"

typedef struct ResumeHandler {
	const char *name;
	/* Brings the source's knowledge of the destination up to date. */
	gboolean (*resume_prepare)(PrConn *conn, GError **error);
} ResumeHandler;

/* A destination that breaks the protocol may send RESUME_ACK, and even SHUT, before its bitmaps. A
 * loss of the path fails nothing after that, so the state is checked, too. With the lock held. */
static gboolean is_recovering(const PrSession *session)
{
	return !session->failure && session->sm.state == PR_STATE_POSTCOPY_RECOVER;
}

static gboolean ram_resume_prepare(PrConn *conn, GError **error)
{
	PrSource *source = pr_conn_source(conn);
	PrSession *session = conn->session;

	pr_session_lock(session);
	source->bitmaps_due = session->ram->n_blocks;
	pr_session_unlock(session);
	for (guint i = 0; i < session->ram->n_blocks; i++) {
		g_autoptr(GByteArray) body = g_byte_array_new();
		pr_block_name_encode(body, session->ram->blocks[i].idstr);
		if (!pr_send(conn, PR_CMD_RECV_BITMAP, body, error))
			return FALSE;
	}
	pr_session_lock(session);
	/* Ended by the last bitmap, or by any failure. */
	while (is_recovering(session) && source->bitmaps_due > 0)
		g_cond_wait(&session->changed, &session->lock);
	gboolean done = !session->failure && source->bitmaps_due == 0;
	if (!done)
		pr_session_copy_failure(session, error);
	pr_session_unlock(session);
	return done;
}

static const ResumeHandler resume_handlers[] = {
	{"ram", ram_resume_prepare},
};

gboolean pr_source_handle_bitmap(PrConn *conn, const PrMsg *msg, GError **error)
{
	PrSource *source = pr_conn_source(conn);
	PrSession *session = conn->session;
	char idstr[PR_IDSTR_MAX + 1];
	g_autofree unsigned long *received = NULL;

	if (!pr_recv_bitmap_name(msg->body, msg->length, idstr, error))
		return FALSE;
	PrRamBlock *block = pr_ram_find(session->ram, idstr);
	pr_session_lock(session);
	gboolean due = source->bitmaps_due > 0;
	pr_session_unlock(session);
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

	pr_session_lock(session);
	source->bitmaps_due--;
	g_cond_broadcast(&session->changed);
	pr_session_unlock(session);
	return TRUE;
}

static gboolean final_handshake(PrConn *conn, GError **error)
{
	PrSession *session = conn->session;

	if (!pr_send(conn, PR_CMD_POSTCOPY_RESUME, NULL, error))
		return FALSE;
	pr_crash_point(PR_CRASH_SOURCE_RESUME_SENT);
	pr_session_lock(session);
	/* Ended by RESUME_ACK, or by any failure. */
	while (is_recovering(session))
		g_cond_wait(&session->changed, &session->lock);
	gboolean done = !session->failure;
	if (!done)
		pr_session_copy_failure(session, error);
	pr_session_unlock(session);
	return done;
}

gboolean pr_source_recover(PrConn *conn, GError **error)
{
	g_autofree char *reason = g_strdup_printf("connected again over %s", conn->name);

	if (!pr_session_step(conn->session, PR_EVENT_CONNECTED, reason, error))
		return FALSE;
	pr_crash_point(PR_CRASH_SOURCE_RECONNECTED);
	for (guint i = 0; i < G_N_ELEMENTS(resume_handlers); i++)
		if (!resume_handlers[i].resume_prepare(conn, error)) {
			g_prefix_error(error,
				       "preparing %s for the resume: ", resume_handlers[i].name);
			return FALSE;
		}
	pr_crash_point(PR_CRASH_SOURCE_BITMAPS_TAKEN);
	return final_handshake(conn, error);
}
