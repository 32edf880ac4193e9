/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/destination/admission.h"

#include <string.h>

#include "migration/destination/completion.h"
#include "migration/destination/refusal.h"

#define TIDY_WAIT_US (10 * G_USEC_PER_SEC) /* for the owner to tidy up a migration that has ended */

/* ---- judging; all with the lock held ---- */

gboolean pr_destination_same_migration(const PrDestination *destination, const PrHello *hello)
{
	const PrBinding *binding = &destination->session->binding;

	return memcmp(binding->uuid, hello->uuid, PR_UUID_BYTES) == 0 &&
	       memcmp(binding->secret, hello->secret, PR_SECRET_BYTES) == 0;
}

static PrHelloAck completed(PrDestination *destination)
{
	if (destination->faults)
		pr_fault_stats(destination->faults, &destination->fault_stats);
	return (PrHelloAck){
		.status = PR_HELLO_COMPLETED,
		.progress = pr_destination_progress(destination, &destination->fault_stats),
	};
}

static PrHelloAck judge_resume(PrDestination *destination, const PrHello *hello)
{
	const PrSession *session = destination->session;
	PrState state = session->sm.state;

	if (session->sm.role != PR_ROLE_DESTINATION ||
	    !pr_destination_same_migration(destination, hello))
		return pr_hello_refusal(PR_HELLO_REFUSED,
					"there is no such migration here to resume");
	if (state == PR_STATE_COMPLETED)
		return completed(destination);
	if (!pr_state_is_postcopy(state))
		return pr_hello_refusal(PR_HELLO_REFUSED,
					"this migration is %s and can't be resumed",
					pr_state_name(state));
	if (hello->epoch <= session->binding.epoch)
		return pr_hello_refusal(PR_HELLO_REFUSED,
					"epoch %" G_GUINT64_FORMAT
					" is over; the current one is %" G_GUINT64_FORMAT,
					hello->epoch, session->binding.epoch);
	if (session->guest_gone)
		return pr_hello_refusal(
			PR_HELLO_PAUSED_BY_OPERATOR,
			"the guest is gone at the destination, there is nothing to resume: %s",
			session->guest_gone);
	/* A source that resumes by itself has to wait for its operator, too. */
	if (session->paused_by_operator && hello->resume == PR_RESUME_AUTOMATIC)
		return pr_hello_refusal(
			PR_HELLO_PAUSED_BY_OPERATOR,
			"this side was paused by hand; resume it by hand (migrate -r)");
	return pr_hello_accepted();
}

/* The source comes back: whatever connection is in use is lost. */
static void accept_resume(PrSession *session, const PrHello *hello)
{
	g_autoptr(GError) superseded =
		g_error_new(PR_PATH_ERROR, PR_PATH_ERROR_PEER,
			    "the source has come back with epoch %" G_GUINT64_FORMAT, hello->epoch);

	pr_session_set_paused_by_operator(session, FALSE);
	if (session->sm.state != PR_STATE_POSTCOPY_PAUSED)
		pr_session_failed_locked(session, superseded);
}

/* The owner may still be tidying up the last migration, which perhaps came over another path of the
 * same source. */
static void await_tidy_up(PrSession *session)
{
	gint64 deadline = g_get_monotonic_time() + TIDY_WAIT_US;

	while ((session->sm.state == PR_STATE_FAILING ||
		session->sm.state == PR_STATE_CANCELLING) &&
	       !session->quit && g_cond_wait_until(&session->changed, &session->lock, deadline))
		;
}

static PrHelloAck judge_new(PrDestination *destination)
{
	const PrSession *session = destination->session;
	PrState state = session->sm.state;
	PrRole role = session->sm.role;

	if (session->quit)
		return pr_hello_refusal(PR_HELLO_REFUSED, "the engine is quitting");
	if (role == PR_ROLE_SOURCE && !pr_state_is_over(state))
		return pr_hello_refusal(PR_HELLO_REFUSED,
					"this engine is the source of a migration");
	if (role == PR_ROLE_DESTINATION && state == PR_STATE_COMPLETED)
		return pr_hello_refusal(PR_HELLO_REFUSED, "a guest has arrived here already");
	if (!session->thread || destination->pending_peer || role == PR_ROLE_SOURCE)
		return pr_hello_refusal(PR_HELLO_REFUSED, "another migration is %s here",
					pr_state_name(state));
	return pr_hello_accepted();
}

static PrHelloAck accept_new(PrDestination *destination, const PrHello *hello)
{
	PrSession *session = destination->session;

	if (pr_session_step_locked(session, PR_EVENT_START, PR_ROLE_DESTINATION,
				   "a source has connected") == PR_ACTION_REFUSE)
		return pr_hello_refusal(PR_HELLO_REFUSED, "another migration is %s here",
					pr_state_name(session->sm.state));
	memcpy(session->binding.uuid, hello->uuid, PR_UUID_BYTES);
	memcpy(session->binding.secret, hello->secret, PR_SECRET_BYTES);
	g_clear_pointer(&session->error_desc, g_free);
	session->pages_at_pause = 0;
	session->paused_by_operator = FALSE;
	memset(&destination->fault_stats, 0, sizeof(destination->fault_stats));
	destination->guest_started = FALSE;
	return pr_hello_accepted();
}

static PrHelloAck judge_hello(PrDestination *destination, const PrHello *hello)
{
	PrHelloAck ack;

	if (hello->role != PR_HELLO_SOURCE)
		return pr_hello_refusal(PR_HELLO_REFUSED,
					"this is a destination; it takes only sources");
	if (hello->resume) {
		ack = judge_resume(destination, hello);
		if (ack.status == PR_HELLO_OK)
			accept_resume(destination->session, hello);
		return ack;
	}
	await_tidy_up(destination->session);
	ack = judge_new(destination);
	return ack.status == PR_HELLO_OK ? accept_new(destination, hello) : ack;
}

/* ---- the pending peer ---- */

static PrPendingPeer *pending_peer_new(const PrHello *hello, PrListener *listener)
{
	PrPendingPeer *peer = g_new0(PrPendingPeer, 1);

	peer->listener = listener;
	pr_hello_copy(&peer->hello, hello);
	return peer;
}

void pr_pending_peer_free(PrPendingPeer *peer)
{
	if (!peer)
		return;
	pr_control_free(peer->control);
	if (peer->standby)
		pr_conn_close(peer->standby);
	pr_hello_clear(&peer->hello);
	g_free(peer);
}

/* Leaves the peer to the owner; returns the peer that it replaces. With the lock held. */
static PrPendingPeer *enqueue(PrDestination *destination, PrPendingPeer *peer)
{
	PrSession *session = destination->session;
	PrPendingPeer *replaced = destination->pending_peer;

	/* The epoch counts from now on: the next peer has to bring a higher one. */
	session->binding.epoch = peer->hello.epoch;
	destination->pending_peer = peer;
	g_cond_broadcast(&session->changed);
	return replaced;
}

static void refuse(PrDestination *destination, PrControl *control, const PrHelloAck *ack)
{
	if (ack->status != PR_HELLO_COMPLETED)
		pr_destination_log_refusal(destination, "connection", control, ack->reason);
	pr_control_answer(control, ack, NULL);
	pr_control_free(control);
}

void pr_destination_admit(PrDestination *destination, PrControl *control, const PrHello *hello,
			  PrListener *listener)
{
	PrSession *session = destination->session;
	PrPendingPeer *replaced = NULL;

	pr_session_lock(session);
	PrHelloAck ack = judge_hello(destination, hello);
	if (ack.status == PR_HELLO_OK) {
		PrPendingPeer *peer = pending_peer_new(hello, listener);

		peer->control = control;
		replaced = enqueue(destination, peer);
	}
	pr_session_unlock(session);
	pr_pending_peer_free(replaced);
	if (ack.status != PR_HELLO_OK)
		refuse(destination, control, &ack);
}

PrHelloAck pr_destination_activate(PrConn *conn, const PrHello *hello, PrListener *listener)
{
	PrDestination *destination = pr_conn_destination(conn);
	PrSession *session = destination->session;
	PrPendingPeer *replaced = NULL;

	pr_session_lock(session);
	PrHelloAck ack = conn->failure || !conn->granted
				 ? pr_hello_refusal(PR_HELLO_REFUSED, "this standby path is not up")
				 : judge_resume(destination, hello);
	if (ack.status == PR_HELLO_OK) {
		PrPendingPeer *peer = pending_peer_new(hello, listener);

		accept_resume(session, hello);
		pr_conn_unlist(conn);
		conn->epoch = hello->epoch;
		peer->standby = conn;
		replaced = enqueue(destination, peer);
	}
	pr_session_unlock(session);
	pr_pending_peer_free(replaced);
	return ack;
}
