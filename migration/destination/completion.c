/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/destination/completion.h"

#include "migration/core/crash-point.h"
#include "migration/destination/rails.h"
#include "migration/memory/state-memfd.h"
#include "migration/session/messages.h"

static const PrWatchPoint starting = {"starting the guest", 1000};

PrProgress pr_destination_progress(const PrDestination *destination, const PrFaultStats *stats)
{
	const PrRam *ram = destination->session->ram;
	uint64_t received = pr_ram_received_bytes(ram), zero = pr_ram_zero_bytes(ram);

	return (PrProgress){
		.received_pages = received / PR_TARGET_PAGE,
		.postcopy_requests = stats->requests,
		.postcopy_bytes = received - zero,
		.remaining = ram->total_bytes - received,
		.zero_pages = zero / PR_TARGET_PAGE,
	};
}

void pr_destination_send_progress(PrDestination *destination, PrConn *conn)
{
	g_autoptr(GByteArray) body = g_byte_array_new();
	PrFaultStats stats;

	pr_fault_stats(destination->faults, &stats);
	PrProgress progress = pr_destination_progress(destination, &stats);
	pr_progress_encode(body, &progress);
	/* A failure reports itself. */
	if (pr_destination_send_rails(conn, NULL))
		pr_send(conn, PR_RP_PROGRESS, body, NULL);
}

/* The guest runs here, and every page is in place. Only one thread can find that so. With the lock
 * held. */
static gboolean complete_locked(PrDestination *destination)
{
	PrSession *session = destination->session;

	/* Before the guest has been started there is nothing to complete; RUN checks again. */
	if (!destination->guest_started || session->sm.state != PR_STATE_POSTCOPY_ACTIVE ||
	    pr_session_step_locked(session, PR_EVENT_SHUT, PR_ROLE_DESTINATION,
				   "every page is in place") != PR_ACTION_RELEASE)
		return FALSE;
	pr_state_memfd_set_stage(session->ram->state_memfd, PR_STATE_MEMFD_COMPLETED);
	return TRUE;
}

/* If it is lost, the source learns it when it comes to resume: PR_HELLO_COMPLETED. */
static void send_shut(PrDestination *destination, PrConn *conn)
{
	g_autoptr(GByteArray) body = g_byte_array_new();

	pr_destination_send_progress(destination, conn);
	pr_u32_encode(body, 0);
	pr_send(conn, PR_RP_SHUT, body, NULL);
	pr_crash_point(PR_CRASH_DESTINATION_SHUT_SENT);
}

void pr_destination_check_complete(PrDestination *destination)
{
	PrSession *session = destination->session;

	if (!pr_ram_complete(session->ram))
		return;
	pr_session_lock(session);
	PrConn *conn = session->conn;
	/* The event comes after SHUT: whoever hears that the migration has completed may end this
	 * engine. */
	pr_session_hold_events(session);
	gboolean completed = complete_locked(destination);
	pr_session_unlock(session);
	if (completed) {
		pr_crash_point(PR_CRASH_DESTINATION_COMPLETED_NOTED);
		if (conn)
			send_shut(destination, conn);
	}
	pr_session_release_events(session);
}

gboolean pr_destination_try_run(PrDestination *destination, GError **error)
{
	PrSession *session = destination->session;
	PrStateMemfd *state = session->ram->state_memfd;

	pr_state_memfd_set_stage(state, PR_STATE_MEMFD_RUN);
	pr_crash_point(PR_CRASH_DESTINATION_RUN_NOTED);
	if (destination->guest_was_running && !session->guest->ops->run(session->guest, error))
		return FALSE;
	pr_crash_point(PR_CRASH_DESTINATION_RUNNING);
	pr_state_memfd_set_stage(state, PR_STATE_MEMFD_STARTED);
	pr_crash_point(PR_CRASH_DESTINATION_STARTED_NOTED);
	return TRUE;
}

void pr_destination_run(PrDestination *destination)
{
	PrSession *session = destination->session;
	g_autoptr(GError) error = NULL;

	pr_watch_enter(destination->watch, &starting);
	if (!pr_destination_try_run(destination, &error))
		g_critical("the guest has arrived but could not be started, start it by hand: %s",
			   error->message);
	pr_session_lock(session);
	destination->guest_started = TRUE;
	pr_session_unlock(session);
}
