/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The destination's story. The load thread waits for a pending peer: a source whose HELLO was
 * accepted (admission.c). It answers that source, carries out its commands until the connection
 * ends, and fences the connection. Then it waits for the next peer (paused), or tidies up. From
 * POSTCOPY_ADVISE on the workers are beside it (workers.c).
 *
 * Fencing: the workers stop using the path, every READ that was posted has come back, the path is
 * destroyed. Only then are the claims of lost READs freed and the next HELLO is answered. So
 * nothing lands late from that path. Standbys that are rails (rails.c) fence their own paths; their
 * READs that are under way keep their claims meanwhile. So the received bitmap that the next source
 * gets never says too much.
 */
#include "migration/destination/destination.h"

#include <string.h>

#include "guest/process.h"
#include "migration/core/crash-point.h"
#include "migration/destination/accept.h"
#include "migration/destination/admission.h"
#include "migration/destination/commands.h"
#include "migration/destination/live-grants.h"
#include "migration/destination/refusal.h"
#include "migration/destination/workers.h"
#include "migration/memory/state-memfd.h"

#define SHUT_WAIT_MS 5000 /* for the source to close the connection after SHUT */
#define GONE_POLL_US                                                                               \
	(100 * 1000) /* between two checks whether the process of a dead guest has ended */

/* What the load thread does, and how long that may take. Where a parameter bounds it, that applies
 * instead. */
static const PrWatchPoint carrying_out = {"carrying out a command of the source", 2000};
static const PrWatchPoint preparing = {"preparing the guest", 1000};
static const PrWatchPoint accepting = {"waiting for the source's data lanes", 6000};
static const PrWatchPoint fencing = {"fencing a connection", 3000};
static const PrWatchPoint tidying = {"turning the fault mode off", 1000};

/* ---- one source is served ---- */

/* After SHUT the source closes the connection; if it does not, this side does. */
static gboolean shutdown_timed_out(PrSession *session)
{
	pr_session_lock(session);
	gboolean timed_out = pr_state_is_over(session->sm.state) &&
			     g_get_monotonic_time() - session->sm.ended > SHUT_WAIT_MS * 1000ll;
	pr_session_unlock(session);
	return timed_out;
}

static void carry_out_commands(PrDestination *destination, PrConn *conn)
{
	while (!shutdown_timed_out(destination->session)) {
		g_autoptr(GError) error = NULL;
		pr_watch_idle(destination->watch);
		g_autoptr(PrMsg) msg = pr_control_recv(conn->control, SHUT_WAIT_MS, &error);
		pr_watch_enter(destination->watch, &carrying_out);
		if (!msg && g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_TIMEOUT))
			continue;
		if (!msg || !pr_destination_handle_command(conn, msg, &error)) {
			pr_conn_failed(error, conn);
			return;
		}
	}
}

/* A new migration begins: this side's guest has to have the source's RAM blocks. */
static gboolean admit_guest(PrDestination *destination, PrConn *conn, const PrHello *hello,
			    GError **error)
{
	PrSession *session = destination->session;
	guint n;

	pr_watch_enter(destination->watch, &preparing);
	const PrGuestBlock *blocks =
		session->guest->ops->prepare(session->guest, PR_GUEST_DESTINATION, &n, error);
	g_autoptr(PrRam) ram = blocks ? pr_ram_new(blocks, n, PR_GUEST_DESTINATION, error) : NULL;

	if (!ram || !pr_ram_check_blocks(ram, hello->blocks, hello->n_blocks, error))
		return FALSE;
	/* Connections of the last attempt that are being closed may use its RAM. */
	pr_conn_await_threads(session);
	pr_session_forget_fence(session);
	pr_session_lock(session);
	PrRam *old = session->ram;
	session->ram = g_steal_pointer(&ram);
	session->verifies = pr_capability(session->params, PR_CAP_VERIFY) &&
			    (conn->peer_can & PR_HELLO_CAN_VERIFY) != 0;
	destination->verify_stats = (PrVerifyStats){0};
	g_clear_pointer(&destination->last_corrupt, g_free);
	pr_session_unlock(session);
	pr_ram_free(old);
	pr_destination_reset_blocktime(destination);
	return TRUE;
}

/* The migration goes on: the guest has to be the same one. */
static gboolean readmit_guest(PrConn *conn, const PrHello *hello, GError **error)
{
	PrSession *session = conn->session;
	g_autofree char *reason = g_strdup_printf("connected again over %s", conn->name);
	PrBinding binding;

	if (!pr_ram_check_blocks(session->ram, hello->blocks, hello->n_blocks, error))
		return FALSE;
	pr_conn_binding(conn, &binding);
	binding.epoch = hello->epoch;
	pr_state_memfd_set_identity(session->ram->state_memfd, &binding);
	pr_crash_point(PR_CRASH_DESTINATION_READMITTED);
	return pr_session_step(session, PR_EVENT_CONNECTED, reason, error);
}

static gboolean check_scheme(const PrConn *conn, const PrHello *hello, GError **error)
{
	const char *scheme = conn->uri->scheme;

	if (strcmp(pr_scheme_transport(hello->scheme), pr_scheme_transport(scheme)) == 0)
		return TRUE;
	g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_MISMATCH,
		    "the source comes over \"%s\", but this port is for \"%s\"", hello->scheme,
		    scheme);
	return FALSE;
}

/* A new attempt begins, unless the state has changed since the peer was accepted. */
static gboolean begin_attempt(PrConn *conn, const PrHello *hello, GError **error)
{
	PrSession *session = conn->session;
	PrState expected = hello->resume ? PR_STATE_POSTCOPY_PAUSED : PR_STATE_SETUP;

	pr_session_lock(session);
	gboolean begun = session->sm.state == expected;
	if (begun) {
		pr_session_begin_attempt(session);
		g_set_object(&conn->cancel, session->cancel);
	} else {
		pr_session_copy_failure(session, error);
	}
	pr_session_unlock(session);
	return begun;
}

/* Whether this peer may go on; else *error is the reason that it is refused with. */
static gboolean admit(PrDestination *destination, PrConn *conn, const PrHello *hello,
		      GError **error)
{
	if (!begin_attempt(conn, hello, error) || !check_scheme(conn, hello, error))
		return FALSE;
	return hello->resume ? readmit_guest(conn, hello, error)
			     : admit_guest(destination, conn, hello, error);
}

static void refuse(PrConn *conn, gboolean standby, const GError *why)
{
	PrHelloAck ack = pr_hello_refusal(PR_HELLO_REFUSED, "%s", why->message);

	if (standby)
		pr_destination_send_activated(conn, &ack, NULL);
	else
		pr_control_answer(conn->control, &ack, NULL);
}

/* Makes a standby the connection in use, and answers its ACTIVATE. */
static gboolean take_over(PrConn *conn, GError **error)
{
	PrHelloAck ack = pr_hello_accepted();

	return pr_conn_adopt(conn, error) && pr_destination_send_activated(conn, &ack, error);
}

static gboolean bring_up(PrDestination *destination, PrConn *conn, PrPendingPeer *peer,
			 gboolean standby, GError **error)
{
	pr_watch_enter(destination->watch, &accepting);
	return standby ? take_over(conn, error)
		       : pr_destination_accept(conn, peer->listener, /* standby= */ FALSE, error);
}

/* After this, nothing of this connection touches guest RAM. */
static void fence(PrDestination *destination, PrConn *conn)
{
	pr_watch_enter(destination->watch, &fencing);
	pr_conn_shutdown(conn);
	pr_live_grants_stop(conn);
	pr_destination_detach(destination);
	pr_conn_close(conn);
	if (destination->pull) {
		pr_ram_clear_ungranted(destination->session->ram);
		pr_pull_reclaim_inflight(destination->pull);
	}
}

static PrConn *take_connection(PrDestination *destination, PrPendingPeer *peer)
{
	if (peer->standby)
		return g_steal_pointer(&peer->standby);
	return pr_destination_conn_new(destination, g_steal_pointer(&peer->control), peer->listener,
				       &peer->hello);
}

static void serve(PrDestination *destination, PrPendingPeer *peer)
{
	PrSession *session = destination->session;
	g_autoptr(GError) error = NULL;
	gboolean standby = peer->standby != NULL;
	PrConn *conn = take_connection(destination, peer);

	if (!admit(destination, conn, &peer->hello, &error)) {
		refuse(conn, standby, error);
		pr_session_attempt_failed(session, error);
	} else if (!bring_up(destination, conn, peer, standby, &error)) {
		pr_session_attempt_failed(session, error);
	} else {
		carry_out_commands(destination, conn);
	}
	fence(destination, conn);
}

/* ---- the end ---- */

/* The agent keeps no state of a migration that has come to nothing. Said before the fault mode is
 * off, so that an engine that finds it off knows why. */
static void note_ended(PrSession *session)
{
	if (!session->ram || !session->ram->state_memfd)
		return;
	pr_state_memfd_set_stage(session->ram->state_memfd, PR_STATE_MEMFD_ENDED);
	pr_crash_point(PR_CRASH_DESTINATION_ENDED_NOTED);
}

/* The migration has ended: the fault mode of the guest is turned off. */
static void tidy_up(PrDestination *destination)
{
	PrSession *session = destination->session;
	const PrGuestOps *guest = session->guest->ops;
	g_autoptr(GError) error = NULL;
	PrState state = pr_session_state(session);
	gboolean undone = state == PR_STATE_FAILING || state == PR_STATE_CANCELLING;

	pr_watch_enter(destination->watch, &tidying);
	pr_destination_stop_workers(destination);
	if (undone)
		note_ended(session);
	if (destination->uffd >= 0 && !guest->uffd_disable(session->guest, &error))
		g_warning("turning the fault mode off: %s", error->message);
	else if (undone)
		guest->store_state_fd(session->guest, -1, NULL);
	pr_crash_point(PR_CRASH_DESTINATION_RELEASED);
	/* The userfaultfd of a process that has ended is closed later (release_dead_guest). */
	if (!g_error_matches(error, PR_GUEST_ERROR, PR_GUEST_ERROR_DIED))
		pr_destination_close_uffd(destination);
	if (undone)
		pr_session_step(session, PR_EVENT_CLEANED_UP, "ready for another try", NULL);
}

/* A guest whose process has ended can't be recovered (admission.c). But threads of the kernel may
 * wait for its pages, as KVM's do for asynchronous page faults. They, the guest's memory, and
 * perhaps the end of its process wait as long as a userfaultfd of the process is open. */
static void release_dead_guest(PrDestination *destination)
{
	PrGuest *guest = destination->session->guest;

	pr_destination_leave(destination);
	if (guest->ops->close_uffd)
		guest->ops->close_uffd(guest);
	g_info("the guest's process has ended: its page faults are served no more");
}

/* A lost QMP socket also counts as the guest's death, so the process itself is checked. With the
 * lock held. */
static void await_end_of_process(PrDestination *destination)
{
	PrSession *session = destination->session;

	pr_session_unlock(session);
	if (!pr_process_uses_memory(destination->guest_process))
		release_dead_guest(destination);
	pr_session_lock(session);
	if (destination->uffd >= 0)
		g_cond_wait_until(&session->changed, &session->lock,
				  g_get_monotonic_time() + GONE_POLL_US);
}

/* FALSE: the thread is to end. *ret NULL: there is no peer, but a migration to tidy up. */
static gboolean wait_for_peer(PrDestination *destination, PrPendingPeer **ret)
{
	PrSession *session = destination->session;

	pr_watch_idle(destination->watch);
	pr_session_lock(session);
	while (!session->quit && !destination->pending_peer && session->sm.role != PR_ROLE_SOURCE &&
	       session->sm.state != PR_STATE_CANCELLING) {
		if (session->guest_gone && destination->uffd >= 0)
			await_end_of_process(destination);
		else
			/* Ended by a peer, a cancellation, another role, the guest's death, or the
			 * engine's end. */
			g_cond_wait(&session->changed, &session->lock);
	}
	gboolean go_on = !session->quit && session->sm.role != PR_ROLE_SOURCE;
	*ret = go_on ? g_steal_pointer(&destination->pending_peer) : NULL;
	pr_session_unlock(session);
	return go_on;
}

/* ---- the owner ---- */

gpointer pr_load_thread(gpointer opaque)
{
	PrDestination *destination = opaque;
	PrSession *session = destination->session;
	g_autoptr(PrWatch) watch = pr_watch_new(session->watchdog, "load");
	PrPendingPeer *peer;

	destination->watch = watch;
	while (wait_for_peer(destination, &peer)) {
		if (peer)
			serve(destination, peer);
		pr_pending_peer_free(peer);
		if (!pr_state_is_postcopy(pr_session_state(session)))
			tidy_up(destination);
	}
	pr_destination_leave(destination);
	return NULL;
}

void pr_destination_init(PrDestination *destination, PrSession *session)
{
	destination->session = session;
	g_mutex_init(&destination->refusals.lock);
	g_mutex_init(&destination->pull_lock);
	destination->listeners = g_ptr_array_new();
	destination->uffd = -1;
}

void pr_destination_clear(PrDestination *destination)
{
	pr_pending_peer_free(g_steal_pointer(&destination->pending_peer));
	g_ptr_array_unref(destination->listeners);
	pr_blocktime_free(destination->times);
	g_free(destination->guest_process);
	g_free(destination->last_corrupt);
	g_mutex_clear(&destination->refusals.lock);
	g_mutex_clear(&destination->pull_lock);
}
