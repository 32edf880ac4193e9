/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The return path: what the destination tells the source, taken by a thread for each connection. */
#include "migration/session/session.h"

static const PrWatchPoint hearing = {"taking a message of the destination", 500};

static gboolean take_pong(PrMigration *m, const PrMsg *msg, GError **error)
{
	uint32_t value;

	if (!pr_u32_decode(msg->body, msg->length, &value, error))
		return FALSE;
	g_mutex_lock(&m->lock);
	m->pong = value;
	g_cond_broadcast(&m->changed);
	g_mutex_unlock(&m->lock);
	return TRUE;
}

static gboolean take_resume_ack(PrMigration *m, const PrMsg *msg, GError **error)
{
	uint32_t value;

	if (!pr_u32_decode(msg->body, msg->length, &value, error))
		return FALSE;
	if (value != PR_RESUME_ACK_VALUE) {
		g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_PROTOCOL,
			    "RESUME_ACK with value %u instead of %u", value, PR_RESUME_ACK_VALUE);
		return FALSE;
	}
	/* Stepped here, not by the migration thread, which would be overtaken by a SHUT right behind. */
	return pr_migration_step(m, PR_EVENT_RESUMED, "recovered", error);
}

static gboolean take_progress(PrMigration *m, const PrMsg *msg, GError **error)
{
	PrProgress progress;

	if (!pr_progress_decode(msg->body, msg->length, &progress, error))
		return FALSE;
	g_mutex_lock(&m->lock);
	m->progress = progress;
	pr_migration_sample_rate(m, progress.postcopy_bytes, g_get_monotonic_time());
	g_mutex_unlock(&m->lock);
	return TRUE;
}

static gboolean take_shut(PrMigration *m, const PrMsg *msg, GError **error)
{
	uint32_t status;

	if (!pr_u32_decode(msg->body, msg->length, &status, error))
		return FALSE;
	return pr_migration_step(m, PR_EVENT_SHUT, "the destination has every page", error);
}

static gboolean take_message(PrConn *conn, const PrMsg *msg, GError **error)
{
	PrMigration *m = conn->m;

	switch (msg->type) {
	case PR_RP_PONG:
		return take_pong(m, msg, error);
	case PR_RP_RECV_BITMAP:
	case PR_RP_RECV_BITMAP_ZSTD:
		return pr_source_take_bitmap(m, msg, error);
	case PR_RP_RESUME_ACK:
		return take_resume_ack(m, msg, error);
	case PR_RP_PROGRESS:
		return take_progress(m, msg, error);
	case PR_RP_REQ_HASHES:
		return pr_source_tell_hashes(m, conn, msg, error);
	case PR_RP_RAILS:
		return pr_rail_take_rails(m, msg, error);
	case PR_RP_SCAN_FIRST:
		return pr_source_take_look(m, msg, error);
	case PR_RP_SHUT:
		return take_shut(m, msg, error);
	case PR_RP_PROBED:
		return pr_standby_take_probed(conn, msg, error);
	case PR_RP_ACTIVATED:
		return pr_standby_take_activated(conn, msg, error);
	case PR_MSG_NOTE:
		return pr_take_note(m, msg, "destination", error);
	case PR_MSG_LOST:
		return pr_standby_take_lost(m, msg, "destination", error);
	case PR_MSG_PAUSE:
	case PR_MSG_HOLD:
	case PR_MSG_ERROR:
		return pr_take_reason(msg, "destination", error);
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
	g_autoptr(PrWatch) watch = pr_watch_new(conn->m->watchdog, "return-path");

	for (;;) {
		g_autoptr(GError) error = NULL;
		pr_watch_idle(watch);
		g_autoptr(PrMsg) msg = pr_control_recv(conn->control, G_MAXUINT, &error);
		pr_watch_enter(watch, &hearing);
		if (!msg || !take_message(conn, msg, &error)) {
			pr_conn_failed(error, conn);
			return NULL;
		}
	}
}
