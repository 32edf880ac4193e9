/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/destination/page-hashes.h"

#include "migration/destination/completion.h"
#include "migration/session/messages.h"

gboolean pr_destination_handle_hashes(PrConn *conn, const PrMsg *msg, GError **error)
{
	PrDestination *destination = pr_conn_destination(conn);
	PrSession *session = destination->session;
	PrHashes hashes;

	if (!pr_hashes_decode(msg->body, msg->length, &hashes, error))
		return FALSE;
	pr_session_lock(session);
	if (session->conn == conn && destination->verify)
		pr_verify_answer(destination->verify, &hashes);
	pr_session_unlock(session);
	return TRUE;
}

/* The thread that calls this has the connection until pr_verify_detach(). */
static void request_hashes(guint block, const PrWireRange *ranges, guint n, void *opaque)
{
	PrSession *session = ((PrDestination *)opaque)->session;
	g_autoptr(GByteArray) body = g_byte_array_new();

	pr_session_lock(session);
	PrConn *conn = session->conn;
	pr_session_unlock(session);
	pr_ranges_encode(body, block, ranges, n);
	/* A failure reports itself. */
	if (conn)
		pr_send(conn, PR_RP_REQ_HASHES, body, NULL);
}

static void settled(void *opaque)
{
	pr_fault_notify(((PrDestination *)opaque)->faults);
}

static void complete(void *opaque)
{
	pr_destination_check_complete(opaque);
}

static void broken(const GError *error, void *opaque)
{
	pr_session_failed(((PrDestination *)opaque)->session, NULL, error);
}

/* The connection that a page came over; NULL: it has been closed since. With the lock held. */
static PrConn *conn_of(PrSession *session, guint rail)
{
	if (rail == 0)
		return session->conn;
	for (guint i = 0; i < session->standbys->len; i++) {
		PrConn *conn = g_ptr_array_index(session->standbys, i);

		if (conn->rail == rail)
			return conn;
	}
	return NULL;
}

static void note_corrupt(PrDestination *destination, PrConn *conn, const PrCorrupt *corrupt)
{
	PrSession *session = destination->session;

	g_free(destination->last_corrupt);
	destination->last_corrupt =
		g_strdup_printf("page %" G_GUINT64_FORMAT
				" of RAM block %s, over %s, epoch %" G_GUINT64_FORMAT,
				corrupt->page, session->ram->blocks[corrupt->block].idstr,
				conn ? conn->name : "a path that is gone", session->binding.epoch);
	g_warning("a page was not what the source has, and is read again: %s (%u of %u times)",
		  destination->last_corrupt, corrupt->strikes, PR_VERIFY_STRIKES);
}

static void corrupt(const PrCorrupt *corrupt, void *opaque)
{
	PrDestination *destination = opaque;
	PrSession *session = destination->session;
	g_autoptr(GError) error = NULL;

	pr_session_lock(session);
	PrConn *conn = conn_of(session, corrupt->rail);
	note_corrupt(destination, conn, corrupt);
	if (conn && corrupt->strikes >= PR_VERIFY_STRIKES) {
		error = g_error_new(PR_PATH_ERROR, PR_PATH_ERROR_LOST,
				    "path %s: it does not bring what the source has: %s",
				    conn->name, destination->last_corrupt);
		pr_conn_failed_locked(conn, error);
	}
	pr_session_unlock(session);
}

gboolean pr_destination_start_verify(PrDestination *destination, GError **error)
{
	PrSession *session = destination->session;
	const PrVerifyHooks hooks = {request_hashes, settled, complete,
				     corrupt,	     broken,  destination};
	PrVerify *verify = session->verifies
				   ? pr_verify_start(session->ram, destination->uffd, &hooks, error)
				   : NULL;

	if (session->verifies && !verify)
		return FALSE;
	session->ram->verify = verify;
	pr_session_lock(session);
	destination->verify = verify;
	pr_session_unlock(session);
	return TRUE;
}

PrVerify *pr_destination_stop_verify(PrDestination *destination)
{
	PrSession *session = destination->session;

	pr_session_lock(session);
	PrVerify *verify = g_steal_pointer(&destination->verify);
	if (verify)
		pr_verify_stats(verify, &destination->verify_stats);
	pr_session_unlock(session);
	pr_verify_stop(verify);
	return verify;
}
