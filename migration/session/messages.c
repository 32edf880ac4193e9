/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/session/messages.h"

/* The peer has left the connection. */
static GError *pause_error(const char *peer, gboolean by_operator, const char *reason)
{
	if (by_operator)
		return g_error_new(PR_PATH_ERROR, PR_PATH_ERROR_PAUSED_BY_OPERATOR,
				   "paused by the operator at the %s: %s", peer, reason);
	return g_error_new(PR_PATH_ERROR, PR_PATH_ERROR_PEER, "the %s has paused: %s", peer,
			   reason);
}

gboolean pr_handle_lost(PrSession *session, const PrMsg *msg, const char *peer, GError **error)
{
	PrLost lost;

	if (!pr_lost_decode(msg->body, msg->length, &lost, error))
		return FALSE;
	g_autoptr(GError) why = pause_error(peer, lost.paused_by_operator, lost.reason);
	pr_session_lock(session);
	/* The end of an older connection is known already. */
	if (session->conn && session->conn->epoch == lost.epoch)
		pr_session_failed_locked(session, why);
	pr_session_unlock(session);
	return TRUE;
}

void pr_send_lost_nowait(PrSession *session, uint64_t epoch, const GError *error)
{
	PrLost lost = {.epoch = epoch, .paused_by_operator = session->paused_by_operator};
	g_autoptr(GByteArray) body = g_byte_array_new();

	pr_reason_copy(lost.reason, error->message);
	pr_lost_encode(body, &lost);
	for (guint i = 0; i < session->standbys->len; i++)
		pr_control_send_nowait(((PrConn *)session->standbys->pdata[i])->control,
				       PR_MSG_LOST, body);
}

void pr_send_reason_nowait(PrConn *conn, uint16_t type, const char *reason)
{
	g_autoptr(GByteArray) body = g_byte_array_new();

	pr_reason_encode(body, reason);
	pr_control_send_nowait(conn->control, type, body);
}

gboolean pr_send(PrConn *conn, uint16_t type, GByteArray *body, GError **error)
{
	return pr_control_send_bytes(conn->control, type, body, error);
}

gboolean pr_handle_note(PrSession *session, const PrMsg *msg, const char *peer, GError **error)
{
	char reason[PR_REASON_MAX + 1];
	g_autofree char *what = NULL;

	if (!pr_reason_decode(msg->body, msg->length, reason, error))
		return FALSE;
	what = g_strdup_printf("the %s says: %s", peer, reason);
	pr_session_lock(session);
	pr_session_note_locked(session, what);
	pr_session_unlock(session);
	return TRUE;
}

gboolean pr_handle_reason(const PrMsg *msg, const char *peer, GError **error)
{
	char reason[PR_REASON_MAX + 1];

	if (!pr_reason_decode(msg->body, msg->length, reason, error))
		return FALSE;
	if (msg->type == PR_MSG_ERROR)
		g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_PEER,
			    "the %s has given up: %s", peer, reason);
	else
		g_propagate_error(error, pause_error(peer, msg->type == PR_MSG_HOLD, reason));
	return FALSE;
}
