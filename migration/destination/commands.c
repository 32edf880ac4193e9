/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/destination/commands.h"

#include "migration/core/crash-point.h"
#include "migration/destination/completion.h"
#include "migration/destination/grants.h"
#include "migration/destination/live-grants.h"
#include "migration/destination/page-hashes.h"
#include "migration/destination/recover.h"
#include "migration/destination/workers.h"
#include "migration/memory/state-memfd.h"
#include "migration/session/messages.h"

static const PrWatchPoint loading = {"loading the device state", 3000};

static gboolean check_advise(const PrMsg *msg, GError **error)
{
	uint64_t summary, target;

	if (!pr_advise_decode(msg->body, msg->length, &summary, &target, error))
		return FALSE;
	if (target == PR_TARGET_PAGE)
		return TRUE;
	g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_MISMATCH,
		    "the source's guest has pages of %" G_GUINT64_FORMAT " bytes, ours of %u",
		    target, PR_TARGET_PAGE);
	return FALSE;
}

/* The agent keeps the state before the fault mode is on: an engine that finds the fault mode on
 * finds out why. */
static gboolean store_state(PrConn *conn, GError **error)
{
	PrSession *session = conn->session;
	PrStateMemfd *state = session->ram->state_memfd;
	PrBinding binding;

	pr_conn_binding(conn, &binding);
	pr_state_memfd_set_verifies(state, session->verifies);
	pr_state_memfd_set_identity(state, &binding);
	if (!session->guest->ops->store_state_fd(session->guest, pr_state_memfd_fd(state), error))
		return FALSE;
	pr_crash_point(PR_CRASH_DESTINATION_STATE_KEPT);
	return TRUE;
}

static gboolean prepare_load(PrGuest *guest, GError **error)
{
	return !guest->ops->prepare_load || guest->ops->prepare_load(guest, error);
}

/* POSTCOPY_ADVISE */
static gboolean handle_advise(PrConn *conn, const PrMsg *msg, GError **error)
{
	PrDestination *destination = pr_conn_destination(conn);
	PrSession *session = conn->session;

	if (!check_advise(msg, error) || !prepare_load(session->guest, error) ||
	    !store_state(conn, error) ||
	    !pr_destination_start_workers(destination, /* fresh= */ TRUE, error))
		return FALSE;
	if (conn->path->incremental_grants)
		pr_live_grants_start(conn);
	return pr_session_step(session, PR_EVENT_READY, "ready for RAM and device state", error);
}

/* EARLY_STATE. If the guest refuses it, the source hears why while its guest still runs. */
static gboolean handle_early_state(PrConn *conn, const PrMsg *msg, GError **error)
{
	PrGuest *guest = conn->session->guest;

	if (guest->ops->load_early)
		return guest->ops->load_early(guest, msg->body, msg->length, error);
	g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_MISMATCH,
		    "the source's guest is of another kind than this one (%s)", guest->ops->kind);
	return FALSE;
}

static gboolean handle_zero(PrConn *conn, const PrMsg *msg, GError **error)
{
	if (!pr_destination_handle_zero(conn, msg, error))
		return FALSE;
	pr_destination_check_complete(pr_conn_destination(conn));
	return TRUE;
}

/* POSTCOPY_LISTEN. Loading the device state touches RAM, so faults are served from here on. The
 * pull waits for RUN: it would lengthen the downtime. */
static gboolean handle_listen(PrConn *conn, const PrMsg *msg, GError **error)
{
	PrSession *session = conn->session;

	if (!pr_session_step(session, PR_EVENT_STOP, "the source's guest is stopped", error))
		return FALSE;
	if (!conn->granted)
		pr_destination_use_grants(conn);
	pr_destination_attach_faults(pr_conn_destination(conn), conn);
	pr_crash_point(PR_CRASH_DESTINATION_LISTENING);
	return session->guest->ops->load_begin(session->guest, error);
}

static void note_loaded(PrDestination *destination)
{
	PrStateMemfd *state = destination->session->ram->state_memfd;

	pr_crash_point(PR_CRASH_DESTINATION_LOADED);
	pr_state_memfd_set_was_running(state, destination->guest_was_running);
	pr_state_memfd_set_stage(state, PR_STATE_MEMFD_LOADED);
	pr_crash_point(PR_CRASH_DESTINATION_LOADED_NOTED);
}

/* PACKAGED: a piece of the device state. The source hands the guest over only after the PONG that
 * answers the PING behind the last piece. */
static gboolean handle_packaged(PrConn *conn, const PrMsg *msg, GError **error)
{
	PrDestination *destination = pr_conn_destination(conn);
	PrSession *session = conn->session;
	const PrGuestOps *guest = session->guest->ops;
	PrPackaged packaged;

	if (!pr_packaged_decode(msg->body, msg->length, &packaged, error))
		return FALSE;
	destination->guest_was_running = packaged.guest_running;
	pr_watch_enter(destination->watch, &loading);
	if (!packaged.last)
		return guest->load_data(session->guest, packaged.data, packaged.length, error);
	if (!guest->load_end(session->guest, error))
		return FALSE;
	note_loaded(destination);
	return pr_session_step(session, PR_EVENT_LOADED, "the device state is loaded", error);
}

static gboolean handle_ping(PrConn *conn, const PrMsg *msg, GError **error)
{
	uint32_t value;
	g_autoptr(GByteArray) body = g_byte_array_new();

	if (!pr_u32_decode(msg->body, msg->length, &value, error))
		return FALSE;
	pr_u32_encode(body, value);
	return pr_send(conn, PR_RP_PONG, body, error);
}

/* POSTCOPY_RUN: the guest is the destination's. */
static gboolean handle_run(PrConn *conn, const PrMsg *msg, GError **error)
{
	PrDestination *destination = pr_conn_destination(conn);
	PrSession *session = conn->session;

	pr_session_lock(session);
	PrAction action = pr_session_step_locked(session, PR_EVENT_RUN, PR_ROLE_DESTINATION, "RUN");
	if (action == PR_ACTION_REFUSE)
		pr_session_copy_failure(session, error);
	pr_session_unlock(session);
	if (action == PR_ACTION_REFUSE)
		return FALSE;
	if (action == PR_ACTION_RUN) {
		pr_destination_run(destination);
		pr_pull_attach(destination->pull, conn->path);
	}
	pr_destination_check_complete(destination);
	return TRUE;
}

static gboolean handle_reason(PrConn *conn, const PrMsg *msg, GError **error)
{
	return pr_handle_reason(msg, "source", error);
}

static gboolean handle_note(PrConn *conn, const PrMsg *msg, GError **error)
{
	return pr_handle_note(conn->session, msg, "source", error);
}

/* Over a connection that was a standby until just now. */
static gboolean handle_lost(PrConn *conn, const PrMsg *msg, GError **error)
{
	return pr_handle_lost(conn->session, msg, "source", error);
}

#define IN(state_) (1u << PR_STATE_##state_)
#define IN_POSTCOPY                                                                                \
	(IN(POSTCOPY_ACTIVE) | IN(POSTCOPY_PAUSED) | IN(POSTCOPY_RECOVER) | IN(COMPLETED))
#define IN_ANY (~0u)

/* The commands, and the states in which they make sense. A late one, of an epoch that has ended, is
 * carried out where that is harmless. HASHES come here when they are malformed: others are handled
 * early (accept.c). */
static const struct Command {
	uint16_t type;
	guint states;
	gboolean (*handle)(PrConn *conn, const PrMsg *msg, GError **error);
} commands[] = {
	{PR_CMD_GRANT, IN(ACTIVE) | IN(POSTCOPY_RECOVER) | IN(POSTCOPY_PAUSED),
	 pr_destination_handle_grant},
	{PR_CMD_POSTCOPY_ADVISE, IN(SETUP), handle_advise},
	{PR_CMD_EARLY_STATE, IN(ACTIVE), handle_early_state},
	{PR_CMD_PING, IN_ANY, handle_ping},
	{PR_CMD_RAM_ZERO, IN(ACTIVE) | IN(DEVICE) | IN_POSTCOPY, handle_zero},
	{PR_CMD_POSTCOPY_LISTEN, IN(ACTIVE), handle_listen},
	{PR_CMD_PACKAGED, IN(DEVICE), handle_packaged},
	{PR_CMD_POSTCOPY_RUN, IN_POSTCOPY, handle_run},
	{PR_CMD_RECV_BITMAP, IN(POSTCOPY_RECOVER), pr_destination_handle_recv_bitmap},
	{PR_CMD_POSTCOPY_RESUME, IN(POSTCOPY_RECOVER), pr_destination_handle_resume},
	{PR_CMD_HASHES, IN_ANY, pr_destination_handle_hashes},
	{PR_MSG_NOTE, IN_ANY, handle_note},
	{PR_MSG_LOST, IN_ANY, handle_lost},
	{PR_MSG_PAUSE, IN_ANY, handle_reason},
	{PR_MSG_HOLD, IN_ANY, handle_reason},
	{PR_MSG_ERROR, IN_ANY, handle_reason},
};

gboolean pr_destination_handle_command(PrConn *conn, const PrMsg *msg, GError **error)
{
	PrState state = pr_session_state(conn->session);

	for (guint i = 0; i < G_N_ELEMENTS(commands); i++)
		if (commands[i].type == msg->type && (commands[i].states & 1u << state))
			return commands[i].handle(conn, msg, error);
	g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_PROTOCOL,
		    "the source sent %s, which makes no sense to a destination that is %s",
		    pr_msg_name(msg->type), pr_state_name(state));
	return FALSE;
}
