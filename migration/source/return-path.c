/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/source/return-path.h"

#include "migration/session/messages.h"
#include "migration/source/page-hashes.h"
#include "migration/source/ram-scan.h"
#include "migration/source/recover.h"

static const PrWatchPoint handling = {"handling a message of the destination", 500};

static gboolean handle_pong(PrConn *conn, const PrMsg *msg, GError **error)
{
	PrSession *session = conn->session;
	uint32_t value;

	if (!pr_u32_decode(msg->body, msg->length, &value, error))
		return FALSE;
	pr_session_lock(session);
	pr_conn_source(conn)->pong = value;
	g_cond_broadcast(&session->changed);
	pr_session_unlock(session);
	return TRUE;
}

static gboolean handle_resume_ack(PrConn *conn, const PrMsg *msg, GError **error)
{
	PrSession *session = conn->session;
	uint32_t value;

	if (!pr_u32_decode(msg->body, msg->length, &value, error))
		return FALSE;
	if (value != PR_RESUME_ACK_VALUE) {
		g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_PROTOCOL,
			    "RESUME_ACK with value %u instead of %u", value, PR_RESUME_ACK_VALUE);
		return FALSE;
	}
	/* Stepped by this thread, not by the owner: a SHUT may follow at once. */
	return pr_session_step(session, PR_EVENT_RESUMED, "recovered", error);
}

static gboolean handle_progress(PrConn *conn, const PrMsg *msg, GError **error)
{
	PrSession *session = conn->session;
	PrProgress progress;

	if (!pr_progress_decode(msg->body, msg->length, &progress, error))
		return FALSE;
	pr_session_lock(session);
	session->progress = progress;
	pr_session_sample_rate(session, progress.postcopy_bytes, g_get_monotonic_time());
	pr_session_unlock(session);
	return TRUE;
}

static gboolean handle_shut(PrConn *conn, const PrMsg *msg, GError **error)
{
	PrSession *session = conn->session;
	uint32_t status;

	if (!pr_u32_decode(msg->body, msg->length, &status, error))
		return FALSE;
	return pr_session_step(session, PR_EVENT_SHUT, "the destination has every page", error);
}

/* With the lock held. */
static void note_rail(PrSession *session, const PrRail *rail)
{
	for (guint i = 0; i < session->standbys->len; i++) {
		PrConn *conn = session->standbys->pdata[i];

		if (conn->lanes_epoch != rail->epoch)
			continue;
		conn->pulls = rail->pulls;
		__atomic_store_n(&pr_path_record(&session->paths, conn->name)->bytes, rail->bytes,
				 __ATOMIC_RELAXED);
	}
}

static gboolean handle_rails(PrConn *conn, const PrMsg *msg, GError **error)
{
	PrSession *session = conn->session;
	g_autofree PrRail *rails = NULL;
	guint n;

	if (!pr_rails_decode(msg->body, msg->length, &rails, &n, error))
		return FALSE;
	pr_session_lock(session);
	for (guint i = 0; i < n; i++)
		note_rail(session, &rails[i]);
	pr_session_unlock(session);
	return TRUE;
}

static gboolean handle_probed(PrConn *conn, const PrMsg *msg, GError **error)
{
	PrSession *session = conn->session;
	PrProbed probed;

	if (!pr_probed_decode(msg->body, msg->length, &probed, error))
		return FALSE;
	pr_session_lock(session);
	conn->rtt_us = probed.rtt_us;
	if (conn->standby)
		pr_path_step(&session->paths, conn->name, PR_HEALTH_PROBED, "answers probes");
	pr_session_unlock(session);
	return TRUE;
}

static gboolean handle_activated(PrConn *conn, const PrMsg *msg, GError **error)
{
	PrSession *session = conn->session;
	PrHelloAck ack;

	if (!pr_hello_ack_decode(msg->body, msg->length, &ack, error))
		return FALSE;
	pr_session_lock(session);
	if (!conn->ack)
		conn->ack = g_memdup2(&ack, sizeof(ack));
	g_cond_broadcast(&session->changed);
	pr_session_unlock(session);
	return TRUE;
}

/* ---- the destination ---- */

static gboolean handle_message(PrConn *conn, const PrMsg *msg, GError **error)
{
	switch (msg->type) {
	case PR_RP_PONG:
		return handle_pong(conn, msg, error);
	case PR_RP_RECV_BITMAP:
	case PR_RP_RECV_BITMAP_ZSTD:
		return pr_source_handle_bitmap(conn, msg, error);
	case PR_RP_RESUME_ACK:
		return handle_resume_ack(conn, msg, error);
	case PR_RP_PROGRESS:
		return handle_progress(conn, msg, error);
	case PR_RP_REQ_HASHES:
		return pr_source_handle_req_hashes(conn, msg, error);
	case PR_RP_RAILS:
		return handle_rails(conn, msg, error);
	case PR_RP_SCAN_FIRST:
		return pr_source_handle_scan_first(conn, msg, error);
	case PR_RP_SHUT:
		return handle_shut(conn, msg, error);
	case PR_RP_PROBED:
		return handle_probed(conn, msg, error);
	case PR_RP_ACTIVATED:
		return handle_activated(conn, msg, error);
	case PR_MSG_NOTE:
		return pr_handle_note(conn->session, msg, "destination", error);
	case PR_MSG_LOST:
		return pr_handle_lost(conn->session, msg, "destination", error);
	case PR_MSG_PAUSE:
	case PR_MSG_HOLD:
	case PR_MSG_ERROR:
		return pr_handle_reason(msg, "destination", error);
	default:
		g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_PROTOCOL,
			    "the destination sent %s, which is not for a source",
			    pr_msg_name(msg->type));
		return FALSE;
	}
}

gpointer pr_source_return_path_thread(gpointer opaque)
{
	PrConn *conn = opaque;
	g_autoptr(PrWatch) watch = pr_watch_new(conn->session->watchdog, "return-path");

	for (;;) {
		g_autoptr(GError) error = NULL;
		pr_watch_idle(watch);
		g_autoptr(PrMsg) msg = pr_control_recv(conn->control, G_MAXUINT, &error);
		pr_watch_enter(watch, &handling);
		if (!msg || !handle_message(conn, msg, &error)) {
			pr_conn_failed(error, conn);
			return NULL;
		}
	}
}
