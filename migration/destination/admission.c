/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Who may come in at the destination: judges the HELLO of a source, and the ACTIVATE of one that has a standby.
 * Whoever is found good is left to the load thread as the pending_peer. In the listeners' thread, and in those of
 * standbys.
 */
#include <string.h>

#include "migration/session/session.h"

#define TIDY_WAIT_US (10 * G_USEC_PER_SEC) /* for an ended migration to be tidied up */

gboolean pr_destination_same_migration(PrMigration *m, const PrHello *hello)
{
	return memcmp(m->binding.uuid, hello->uuid, PR_UUID_BYTES) == 0 &&
	       memcmp(m->binding.secret, hello->secret, PR_SECRET_BYTES) == 0;
}

void pr_refuse(PrHelloAck *ack, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	g_vsnprintf(ack->reason, sizeof(ack->reason), format, args);
	va_end(args);
	ack->status = PR_HELLO_REFUSED;
}

void pr_note_refusal(PrMigration *m, const char *what, PrControl *control, const char *reason)
{
	g_autofree char *more = NULL;
	guint left_out;

	if (!pr_log_ratelimit_allows(&m->refusals, g_get_monotonic_time(), &left_out))
		return;
	if (left_out)
		more = g_strdup_printf(" (and %u more, of which nothing was said)", left_out);
	g_message("refused a %s from %s: %s%s", what, pr_control_peer(control), reason,
		  more ? more : "");
}

/* A human has paused this side: a source that comes by itself is to wait for a human, too. */
static void hold(PrHelloAck *ack)
{
	pr_refuse(ack, "this side was paused by hand; resume it by hand (migrate -r)");
	ack->status = PR_HELLO_HELD;
}

/* With the lock held. */
static void refuse_guest_gone(PrMigration *m, PrHelloAck *ack)
{
	pr_refuse(ack, "the guest is gone at the destination, there is nothing to resume: %s",
		  m->guest_gone);
	ack->status = PR_HELLO_HELD;
}

PrProgress pr_destination_progress(PrMigration *m, const PrFaultStats *stats)
{
	uint64_t received = pr_ram_received_bytes(m->ram), zero = pr_ram_zero_bytes(m->ram);

	return (PrProgress){
		.received_pages = received / PR_TARGET_PAGE,
		.postcopy_requests = stats->requests,
		.postcopy_bytes = received - zero,
		.remaining = m->ram->total_bytes - received,
		.zero_pages = zero / PR_TARGET_PAGE,
	};
}

/* What a source hears that comes to resume what is complete. With the lock held. */
static void tell_completed(PrMigration *m, PrHelloAck *ack)
{
	if (m->faults)
		pr_fault_stats(m->faults, &m->fault_stats);
	ack->status = PR_HELLO_COMPLETED;
	ack->progress = pr_destination_progress(m, &m->fault_stats);
}

/* Decides with the lock held; a pending_peer of the running migration pauses it. */
static void judge_resume(PrMigration *m, const PrHello *hello, PrHelloAck *ack)
{
	PrState state = m->sm.state;
	g_autoptr(GError) superseded = NULL;

	if (m->sm.role != PR_ROLE_DESTINATION || !pr_destination_same_migration(m, hello))
		pr_refuse(ack, "there is no such migration here to resume");
	else if (state == PR_STATE_COMPLETED)
		tell_completed(m, ack);
	else if (!pr_state_is_postcopy(state))
		pr_refuse(ack, "this migration is %s and can't be resumed", pr_state_name(state));
	else if (hello->epoch <= m->binding.epoch)
		pr_refuse(ack,
			  "epoch %" G_GUINT64_FORMAT
			  " is over; the current one is %" G_GUINT64_FORMAT,
			  hello->epoch, m->binding.epoch);
	else if (m->guest_gone)
		refuse_guest_gone(m, ack);
	else if (m->held && hello->resume == PR_RESUME_AUTOMATIC)
		hold(ack);
	if (ack->status == PR_HELLO_OK)
		pr_migration_set_held(m, FALSE);
	if (ack->status != PR_HELLO_OK || state == PR_STATE_POSTCOPY_PAUSED)
		return;
	superseded =
		g_error_new(PR_PATH_ERROR, PR_PATH_ERROR_PEER,
			    "the source has come back with epoch %" G_GUINT64_FORMAT, hello->epoch);
	pr_migration_failed_locked(m, superseded);
}

static void judge_new(PrMigration *m, const PrHello *hello, PrHelloAck *ack)
{
	gint64 deadline = g_get_monotonic_time() + TIDY_WAIT_US;

	/* The one before may be tidying up still, perhaps over another path of the same source. */
	while ((m->sm.state == PR_STATE_FAILING || m->sm.state == PR_STATE_CANCELLING) && !m->quit)
		if (!g_cond_wait_until(&m->changed, &m->lock, deadline))
			break;
	if (m->quit)
		pr_refuse(ack, "the engine is quitting");
	else if (m->sm.role == PR_ROLE_SOURCE && !pr_state_is_over(m->sm.state))
		pr_refuse(ack, "this engine is the source of a migration");
	else if (m->sm.role == PR_ROLE_DESTINATION && m->sm.state == PR_STATE_COMPLETED)
		pr_refuse(ack, "a guest has arrived here already");
	else if (!m->thread || m->pending_peer || m->sm.role == PR_ROLE_SOURCE ||
		 pr_migration_step_locked(m, PR_EVENT_START, PR_ROLE_DESTINATION,
					  "a source has connected") == PR_ACTION_REFUSE)
		pr_refuse(ack, "another migration is %s here", pr_state_name(m->sm.state));
	if (ack->status != PR_HELLO_OK)
		return;
	memcpy(m->binding.uuid, hello->uuid, PR_UUID_BYTES);
	memcpy(m->binding.secret, hello->secret, PR_SECRET_BYTES);
	g_clear_pointer(&m->error_desc, g_free);
	memset(&m->fault_stats, 0, sizeof(m->fault_stats));
	m->pages_at_pause = 0;
	m->held = FALSE;
	m->guest_started = FALSE;
}

static PrPendingPeer *pending_peer_new(const PrHello *hello, PrListener *listener)
{
	PrPendingPeer *pending_peer = g_new0(PrPendingPeer, 1);

	pending_peer->listener = listener;
	pr_hello_copy(&pending_peer->hello, hello);
	return pending_peer;
}

/* The load thread has it from now on. Returns whom it pushes out. With the lock held. */
static PrPendingPeer *enqueue(PrMigration *m, PrPendingPeer *pending_peer)
{
	PrPendingPeer *old = m->pending_peer;

	/* The epoch is taken now, so that whoever comes next has to be newer still. */
	m->binding.epoch = pending_peer->hello.epoch;
	m->pending_peer = pending_peer;
	g_cond_broadcast(&m->changed);
	return old;
}

void pr_destination_hello(PrControl *control, const PrHello *hello, PrListener *listener,
			  void *opaque)
{
	PrMigration *m = opaque;
	PrPendingPeer *old = NULL;
	PrHelloAck ack = {.status = PR_HELLO_OK};

	if (hello->role == PR_HELLO_SOURCE && hello->resume == PR_RESUME_STANDBY) {
		pr_standby_admit(m, control, hello, listener);
		return;
	}
	g_mutex_lock(&m->lock);
	if (hello->role != PR_HELLO_SOURCE)
		pr_refuse(&ack, "this is a destination; it takes only sources");
	else if (hello->resume)
		judge_resume(m, hello, &ack);
	else
		judge_new(m, hello, &ack);
	if (ack.status == PR_HELLO_OK) {
		PrPendingPeer *pending_peer = pending_peer_new(hello, listener);

		pending_peer->control = control;
		old = enqueue(m, pending_peer);
	}
	g_mutex_unlock(&m->lock);
	pr_session_flush_events(m);
	pr_pending_peer_free(old);
	if (ack.status == PR_HELLO_OK)
		return;
	if (ack.status != PR_HELLO_COMPLETED)
		pr_note_refusal(m, "connection", control, ack.reason);
	pr_control_answer(control, &ack, NULL);
	pr_control_free(control);
}

gboolean pr_destination_activate(PrConn *conn, const PrHello *hello, PrListener *listener,
				 PrHelloAck *ret)
{
	PrMigration *m = conn->m;
	PrPendingPeer *old = NULL;

	g_mutex_lock(&m->lock);
	if (conn->failure || !conn->granted)
		pr_refuse(ret, "this standby path is not up");
	else
		judge_resume(m, hello, ret);
	if (ret->status == PR_HELLO_OK) {
		PrPendingPeer *pending_peer = pending_peer_new(hello, listener);

		pr_conn_unlist(conn);
		conn->epoch = hello->epoch;
		pending_peer->standby = conn;
		old = enqueue(m, pending_peer);
	}
	g_mutex_unlock(&m->lock);
	pr_session_flush_events(m);
	pr_pending_peer_free(old);
	return ret->status == PR_HELLO_OK;
}

gboolean pr_destination_send_activated(PrConn *conn, const PrHelloAck *ack, GError **error)
{
	g_autoptr(GByteArray) body = g_byte_array_new();

	pr_hello_ack_encode(body, ack);
	return pr_send(conn, PR_RP_ACTIVATED, body, error);
}

char *pr_destination_path_name(PrControl *control, PrListener *listener)
{
	const PrUri *uri = pr_listener_uri(listener);
	g_autofree char *host = pr_control_local_host(control);
	PrUri local = *uri;

	local.host = host;
	return pr_uri_address(&local);
}
