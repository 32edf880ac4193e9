/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Each standby has a thread, which reads its control channel and probes its lanes every
 * probe-interval: a READ of nothing has to come back within heartbeat-timeout. That covers both
 * directions of the data path; heartbeats cover those of the control channel. Where the standby is
 * a rail (rails.c), the READs on its bulk lane take the place of that lane's probe.
 *
 * With ACTIVATE the thread drains the rail and leaves the connection to the owner, which fences the
 * old one first. Until then no lane of the standby is given to the fault threads or the first pull
 * thread.
 */
#include "migration/destination/standby.h"

#include <poll.h>

#include "migration/destination/accept.h"
#include "migration/destination/admission.h"
#include "migration/destination/grants.h"
#include "migration/destination/rails.h"
#include "migration/destination/refusal.h"
#include "migration/session/messages.h"
#include "util/try-alloc.h"

#define STANDBYS_MAX 16 /* of one source */

static const PrWatchPoint connecting = {"connecting a standby path", 15000};
static const PrWatchPoint attending = {"attending to a standby path", 2000};

/* Of the thread of one standby. */
typedef struct Standby {
	PrConn *conn;
	PrListener *listener;
	PrHello hello; /* owned */
	PrWatch *watch;
	uint64_t probes; /* that were answered */
	gint64 probe_at; /* the next one is due; monotonic */
} Standby;

static void standby_free(Standby *self)
{
	pr_hello_clear(&self->hello);
	g_free(self);
}

/* Posts a READ of nothing, and waits until it has come back. */
static gboolean probe_lane(PrConn *conn, PrLaneId lane, gint64 deadline, GError **error)
{
	const PrTransportOps *ops = conn->path->ops;
	PrCompletion done;

	if (!ops->post_probe(conn->path, lane, lane))
		goto lost;
	while (ops->poll(conn->path, lane, &done, 1) == 0) {
		struct pollfd fd = {.fd = ops->wait_fd(conn->path, lane), .events = POLLIN};
		gint64 left = deadline - g_get_monotonic_time();

		if (left <= 0) {
			g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_SILENT,
				    "path %s: the data lanes do not answer", conn->name);
			return FALSE;
		}
		if (ops->arm(conn->path, lane))
			poll(&fd, 1, (int)(left / 1000 + 1));
	}
	if (done.ok)
		return TRUE;
lost:
	g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_LOST, "path %s: the data lanes are lost",
		    conn->name);
	return FALSE;
}

static gboolean probe(Standby *self, GError **error)
{
	PrConn *conn = self->conn;
	PrSession *session = conn->session;
	g_autoptr(GByteArray) body = g_byte_array_new();
	gint64 bound = (gint64)pr_param(session->params, PR_PARAM_HEARTBEAT_TIMEOUT) * 1000;

	if (!pr_rail_review(conn, error))
		return FALSE;
	gint64 began = g_get_monotonic_time();
	guint n_probed = 0;
	for (PrLaneId lane = 0; lane < conn->path->n_lanes; lane++) {
		/* The READs of a rail show how its bulk lane is. */
		if (lane == PR_LANE_BULK && conn->rail)
			continue;
		if (!probe_lane(conn, lane, began + bound, error))
			return FALSE;
		n_probed++;
	}
	gint64 now = g_get_monotonic_time();
	PrProbed probed = {.count = ++self->probes, .rtt_us = (now - began) / n_probed};
	self->probe_at = now + (gint64)pr_param(session->params, PR_PARAM_PROBE_INTERVAL) * 1000;
	pr_session_lock(session);
	conn->rtt_us = probed.rtt_us;
	pr_path_step(&session->paths, conn->name, PR_HEALTH_PROBED, "answers probes");
	pr_session_unlock(session);
	pr_rail_begin(conn);
	pr_probed_encode(body, &probed);
	return pr_send(conn, PR_RP_PROBED, body, error);
}

/* PING: all grants were sent; the source's memory may be read from now on. */
static gboolean handle_ready(Standby *self, const PrMsg *msg, GError **error)
{
	uint32_t value;

	if (!pr_u32_decode(msg->body, msg->length, &value, error))
		return FALSE;
	if (!self->conn->granted)
		pr_destination_use_grants(self->conn);
	self->probe_at = g_get_monotonic_time();
	return TRUE;
}

/* *ret_activated: the owner has the connection now. */
static gboolean handle_activate(Standby *self, const PrMsg *msg, gboolean *ret_activated,
				GError **error)
{
	PrActivate activate;

	if (!pr_activate_decode(msg->body, msg->length, &activate, error) ||
	    !pr_rail_drain(self->conn, error))
		return FALSE;
	self->hello.epoch = activate.epoch;
	self->hello.resume = activate.resume;
	PrHelloAck ack = pr_destination_activate(self->conn, &self->hello, self->listener);
	*ret_activated = ack.status == PR_HELLO_OK;
	return *ret_activated || pr_destination_send_activated(self->conn, &ack, error);
}

/* HOLD: the source closes the standby, which is not the path's fault. Always FALSE. */
static gboolean handle_close(const PrMsg *msg, GError **error)
{
	char reason[PR_REASON_MAX + 1];

	if (pr_reason_decode(msg->body, msg->length, reason, error))
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_PAUSED_BY_OPERATOR,
			    "closed by the source: %s", reason);
	return FALSE;
}

static gboolean handle_message(Standby *self, const PrMsg *msg, gboolean *ret_activated,
			       GError **error)
{
	switch (msg->type) {
	case PR_CMD_GRANT:
		return pr_destination_handle_grant(self->conn, msg, error);
	case PR_CMD_PING:
		return handle_ready(self, msg, error);
	case PR_CMD_ACTIVATE:
		return handle_activate(self, msg, ret_activated, error);
	case PR_MSG_LOST:
		return pr_handle_lost(self->conn->session, msg, "source", error);
	case PR_MSG_HOLD:
		return handle_close(msg, error);
	case PR_MSG_PAUSE:
	case PR_MSG_ERROR:
		return pr_handle_reason(msg, "source", error);
	default:
		g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_PROTOCOL,
			    "the source sent %s over a standby path", pr_msg_name(msg->type));
		return FALSE;
	}
}

static guint ms_until(gint64 when)
{
	gint64 now = g_get_monotonic_time();

	if (when == G_MAXINT64)
		return G_MAXUINT;
	return when <= now ? 0 : (guint)((when - now + 999) / 1000);
}

/* One message, or one probe when that is due first. */
static gboolean serve_once(Standby *self, gboolean *ret_activated, GError **error)
{
	g_autoptr(GError) local = NULL;

	pr_watch_idle(self->watch);
	g_autoptr(PrMsg) msg =
		pr_control_recv(self->conn->control, ms_until(self->probe_at), &local);
	pr_watch_enter(self->watch, &attending);
	if (msg)
		return handle_message(self, msg, ret_activated, error);
	if (g_error_matches(local, PR_PATH_ERROR, PR_PATH_ERROR_TIMEOUT))
		return probe(self, error);
	g_propagate_error(error, g_steal_pointer(&local));
	return FALSE;
}

/* Until the standby is activated. FALSE: it has failed. */
static gboolean serve(Standby *self, GError **error)
{
	gboolean activated = FALSE;

	self->probe_at = G_MAXINT64;
	while (!activated)
		if (!serve_once(self, &activated, error))
			return FALSE;
	return TRUE;
}

static gboolean bring_up(Standby *self, GError **error)
{
	PrConn *conn = self->conn;
	PrSession *session = conn->session;

	if (!pr_destination_accept(conn, self->listener, /* standby= */ TRUE, error))
		return FALSE;
	pr_session_lock(session);
	pr_path_step(&session->paths, conn->name, PR_HEALTH_CONNECTED, "connected as a standby");
	pr_session_unlock(session);
	return TRUE;
}

static gpointer standby_thread(gpointer opaque)
{
	Standby *self = opaque;
	PrConn *conn = self->conn;
	PrSession *session = conn->session;
	g_autoptr(GError) error = NULL;
	g_autoptr(PrWatch) watch = pr_watch_new(session->watchdog, "standby");

	self->watch = watch;
	pr_watch_enter(watch, &connecting);
	if (!bring_up(self, &error) || !serve(self, &error)) {
		g_info("standby path %s: %s", conn->name, error->message);
		pr_conn_standby_ended(conn, error);
		pr_conn_close(conn);
	}
	standby_free(self);
	g_clear_pointer(&watch, pr_watch_free); /* the migration may be gone after this */
	pr_session_thread_ends(session);
	return NULL;
}

/* With the lock held. */
static PrHelloAck judge(PrDestination *destination, const PrHello *hello)
{
	const PrSession *session = destination->session;
	g_autoptr(GError) error = NULL;

	if (session->sm.role != PR_ROLE_DESTINATION ||
	    !pr_destination_same_migration(destination, hello))
		return pr_hello_refusal(PR_HELLO_REFUSED,
					"there is no such migration here to stand by for");
	if (session->quit || !pr_state_is_postcopy(session->sm.state))
		return pr_hello_refusal(PR_HELLO_REFUSED,
					"this migration is %s and needs no standby",
					pr_state_name(session->sm.state));
	if (session->standbys->len >= STANDBYS_MAX)
		return pr_hello_refusal(PR_HELLO_REFUSED, "there are %u standby paths already",
					session->standbys->len);
	if (!pr_ram_check_blocks(session->ram, hello->blocks, hello->n_blocks, &error))
		return pr_hello_refusal(PR_HELLO_REFUSED, "%s", error->message);
	return pr_hello_accepted();
}

static Standby *standby_new(PrConn *conn, const PrHello *hello, PrListener *listener)
{
	Standby *self = g_new0(Standby, 1);

	conn->cancel = g_cancellable_new();
	self->conn = conn;
	self->listener = listener;
	pr_hello_copy(&self->hello, hello);
	return self;
}

void pr_standby_admit(PrDestination *destination, PrControl *control, const PrHello *hello,
		      PrListener *listener)
{
	PrSession *session = destination->session;
	g_autoptr(GError) error = NULL;

	pr_session_lock(session);
	PrHelloAck ack = judge(destination, hello);
	/* From here on the RAM stays until the thread has ended. */
	session->n_threads += ack.status == PR_HELLO_OK;
	pr_session_unlock(session);
	if (ack.status != PR_HELLO_OK) {
		pr_destination_log_refusal(destination, "standby path", control, ack.reason);
		pr_control_answer(control, &ack, NULL);
		pr_control_free(control);
		return;
	}
	PrConn *conn = pr_destination_conn_new(destination, control, listener, hello);
	Standby *self = standby_new(conn, hello, listener);
	GThread *thread = pr_thread_try("standby", standby_thread, self, &error);
	if (thread) {
		g_thread_unref(thread);
		return;
	}
	ack = pr_hello_refusal(PR_HELLO_REFUSED, "%s", error->message);
	pr_control_answer(control, &ack, NULL);
	pr_conn_free(conn);
	standby_free(self);
	pr_session_thread_ends(session);
}
