/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/destination/recover.h"

#include "migration/core/crash-point.h"
#include "migration/destination/completion.h"
#include "migration/destination/grants.h"
#include "migration/destination/workers.h"
#include "migration/memory/bitmap.h"
#include "migration/session/messages.h"
#include "util/try-alloc.h"

gboolean pr_destination_handle_recv_bitmap(PrConn *conn, const PrMsg *msg, GError **error)
{
	const PrRam *ram = conn->session->ram;
	char idstr[PR_IDSTR_MAX + 1];
	g_autoptr(GByteArray) body = g_byte_array_new();

	if (!pr_block_name_decode(msg->body, msg->length, idstr, error))
		return FALSE;
	const PrRamBlock *block = pr_ram_find(ram, idstr);
	if (!block) {
		g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_PROTOCOL,
			    "the source asks for the received bitmap of \"%s\", which is not here",
			    idstr);
		return FALSE;
	}
	/* Rails go on placing pages, and the encoder reads the bitmap more than once. */
	g_autofree unsigned long *received = pr_bitmap_snapshot(block->received, block->n_pages);
	/* For the snapshot, the encoded bitmap and, if that is compressed, its input. */
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

/* *ret_run: the guest has yet to be started here: RUN was lost with the last path. */
static gboolean step_resumed(PrDestination *destination, gboolean *ret_run, GError **error)
{
	PrSession *session = destination->session;

	pr_session_lock(session);
	PrAction action =
		pr_session_step_locked(session, PR_EVENT_RESUMED, PR_ROLE_DESTINATION, "recovered");
	if (action == PR_ACTION_REFUSE)
		pr_session_copy_failure(session, error);
	*ret_run = action == PR_ACTION_RUN || !destination->guest_started;
	pr_session_unlock(session);
	return action != PR_ACTION_REFUSE;
}

gboolean pr_destination_handle_resume(PrConn *conn, const PrMsg *msg, GError **error)
{
	PrDestination *destination = pr_conn_destination(conn);
	g_autoptr(GByteArray) body = g_byte_array_new();
	gboolean run;

	if (!conn->granted)
		pr_destination_use_grants(conn);
	pr_u32_encode(body, PR_RESUME_ACK_VALUE);
	if (!pr_send(conn, PR_RP_RESUME_ACK, body, error))
		return FALSE;
	pr_crash_point(PR_CRASH_DESTINATION_RESUME_ACKED);
	if (!step_resumed(destination, &run, error))
		return FALSE;
	pr_destination_attach_all(destination, conn);
	if (run)
		pr_destination_run(destination);
	pr_destination_check_complete(destination);
	return TRUE;
}
