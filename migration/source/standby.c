/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Standby paths
 *
 * While one path carries the migration, every other one that the source knows is kept connected, control
 * channel and lanes, with the source's memory registered and granted: failing over to it costs one
 * message each way (ACTIVATE, ACTIVATED) before the bitmaps are exchanged. It also means that whoever loses
 * the path in use can say so at once (LOST), and that a standby that dies is known before it is needed.
 *
 * Source: a keeper for each listed path, a thread that connects it whenever it is not the one in use,
 * again and again; how soon, and when the path is to be trusted, is in transport/health.h. The owner takes a
 * keeper's connection when it needs one. From the beginning a standby has its return-path thread, which stays
 * with it. The guest's RAM does not change any more, so what is granted once is granted for good.
 *
 * Destination: a thread for each standby reads its control channel and probes both lanes, every
 * probe-interval: a READ of nothing has to come back within heartbeat-timeout. That covers both directions of
 * the data path; heartbeats cover those of the control channel. Where the bulk lane pulls (rails.c) its own READs
 * take the probe's place. With ACTIVATE the stripe is ended, and the connection goes over to the load thread, which
 * fences the old one first: until then neither lane is given to the fault thread or the first pull thread.
 *
 * Nothing here ends a migration: a standby that fails is closed, and that is all.
 */
#include <poll.h>
#include <string.h>

#include "migration/session/session.h"
#include "util/try-alloc.h"

#define LOOK_US	     (200 * 1000) /* between two looks whether standbys are still wanted */
#define STANDBYS_MAX 16		  /* that a source may have here */

static const PrWatchPoint connecting = {"connecting a standby path", 15000};
static const PrWatchPoint attending = {"attending to a standby path", 2000};

struct PrKeeper {
	PrMigration *m;
	PrUri *uri; /* constant */
	GCancellable *cancel;
	GThread *thread;
	PrConn *conn;	 /* PrMigration.lock: listed as a standby, and up */
	gboolean ending; /* PrMigration.lock */
};

/* ---- the source ---- */

/* Or is about to be. With the lock held. */
static gboolean is_in_use(PrKeeper *keeper)
{
	const PrMigration *m = keeper->m;

	return g_strcmp0(m->claimed, keeper->uri->text) == 0 ||
	       (m->conn && strcmp(m->conn->name, keeper->uri->text) == 0);
}

static gboolean is_wanted(PrKeeper *keeper)
{
	PrMigration *m = keeper->m;

	return pr_state_is_postcopy(m->sm.state) && !is_in_use(keeper) &&
	       pr_capability(m->params, PR_CAP_STANDBY_PATHS);
}

static gboolean is_over(PrKeeper *keeper)
{
	return keeper->ending || keeper->m->quit || pr_state_is_over(keeper->m->sm.state);
}

static void poll_wait(PrMigration *m, gint64 until)
{
	g_cond_wait_until(&m->changed, &m->lock, MIN(until, g_get_monotonic_time() + LOOK_US));
}

/* Waits until the path is to be connected. FALSE: never again. */
static gboolean wait_until_due(PrKeeper *keeper)
{
	PrMigration *m = keeper->m;

	g_mutex_lock(&m->lock);
	for (;;) {
		gint64 due = pr_path_record(m, keeper->uri->text)->health.retry_at;

		if (is_over(keeper) || (is_wanted(keeper) && g_get_monotonic_time() >= due))
			break;
		poll_wait(m, is_wanted(keeper) ? due : G_MAXINT64);
	}
	gboolean go_on = !is_over(keeper);
	if (go_on)
		pr_path_step(m, keeper->uri->text, PR_HEALTH_CONNECTS, "to be a standby");
	g_mutex_unlock(&m->lock);
	pr_session_flush_events(m);
	return go_on;
}

/* A standby is no more. */
static void note_end(PrConn *conn, const GError *error)
{
	PrMigration *m = conn->m;

	g_mutex_lock(&m->lock);
	/* The same path may be in use, over a connection that was made otherwise. */
	if (!m->conn || strcmp(m->conn->name, conn->name) != 0)
		pr_path_ended(m, conn->name, conn->failure ? conn->failure : error);
	if (conn->standby)
		pr_conn_unlist(conn);
	g_mutex_unlock(&m->lock);
	pr_session_flush_events(m);
}

/* Offers the connection to the owner, until it is taken, fails, or is not wanted any more. From its first
 * answered probe on it may be taken. */
static void offer(PrKeeper *keeper, PrConn *conn)
{
	PrMigration *m = keeper->m;
	g_autoptr(GError) closed = g_error_new_literal(PR_PATH_ERROR, PR_PATH_ERROR_LOCAL_REQUEST,
						       "no standby is needed");

	g_mutex_lock(&m->lock);
	keeper->conn = conn;
	pr_path_step(m, conn->name, PR_HEALTH_CONNECTED, "connected as a standby");
	g_mutex_unlock(&m->lock);
	pr_session_flush_events(m);
	/* Has it probed. If that fails, so does the connection. */
	pr_source_ping(conn, PR_PING_READY, NULL);

	g_mutex_lock(&m->lock);
	while (keeper->conn && !conn->failure && !is_over(keeper) && is_wanted(keeper))
		poll_wait(m, G_MAXINT64);
	gboolean ours = keeper->conn != NULL;
	keeper->conn = NULL;
	g_mutex_unlock(&m->lock);
	if (!ours)
		return;
	pr_send_reason_nowait(conn, PR_MSG_HOLD, closed->message);
	note_end(conn, closed);
	pr_conn_close(conn);
}

static gpointer keeper_thread(gpointer opaque)
{
	PrKeeper *keeper = opaque;
	PrMigration *m = keeper->m;
	gboolean completed;

	g_autoptr(PrWatch) watch = pr_watch_new(m->watchdog, "standby");

	while (pr_watch_idle(watch), wait_until_due(keeper)) {
		g_autoptr(GError) error = NULL;

		pr_watch_enter(watch, &connecting);
		PrConn *conn = pr_source_connect(m, keeper->uri, PR_RESUME_STANDBY, keeper->cancel,
						 &completed, &error);

		if (conn && pr_source_send_grants(conn, &error)) {
			pr_watch_idle(watch);
			offer(keeper, conn);
			continue;
		}
		if (conn) {
			note_end(conn, error);
			pr_conn_close(conn);
			continue;
		}
		g_mutex_lock(&m->lock);
		/* The owner may have connected it meanwhile; then this attempt says nothing of the path. */
		if (!is_in_use(keeper))
			pr_path_ended(m, keeper->uri->text, error);
		g_mutex_unlock(&m->lock);
		pr_session_flush_events(m);
	}
	return NULL;
}

static gboolean has_keeper(PrMigration *m, const PrUri *uri)
{
	for (guint i = 0; i < m->keepers->len; i++)
		if (strcmp(((PrKeeper *)m->keepers->pdata[i])->uri->text, uri->text) == 0)
			return TRUE;
	return FALSE;
}

static void add_keeper(PrMigration *m, const PrUri *uri)
{
	PrKeeper *keeper = g_new0(PrKeeper, 1);

	keeper->m = m;
	keeper->uri = pr_uri_copy(uri);
	keeper->cancel = g_cancellable_new();
	g_ptr_array_add(m->keepers, keeper);
}

static void keeper_free(PrKeeper *keeper)
{
	g_object_unref(keeper->cancel);
	pr_uri_free(keeper->uri);
	g_free(keeper);
}

void pr_standby_keep(PrMigration *m)
{
	guint first = m->keepers->len;

	g_mutex_lock(&m->lock);
	for (guint i = 0; m->uris->len > 1 && i < m->uris->len; i++)
		if (!has_keeper(m, m->uris->pdata[i]))
			add_keeper(m, m->uris->pdata[i]);
	g_mutex_unlock(&m->lock);
	for (guint i = first; i < m->keepers->len;) {
		PrKeeper *keeper = m->keepers->pdata[i];
		g_autoptr(GError) error = NULL;

		keeper->thread = pr_thread_try("standby", keeper_thread, keeper, &error);
		if (keeper->thread) {
			i++;
			continue;
		}
		/* After the next recovery it is tried again. */
		g_warning("path %s: no standby: %s", keeper->uri->text, error->message);
		keeper_free(keeper);
		g_ptr_array_remove_index(m->keepers, i);
	}
}

void pr_standby_stop(PrMigration *m)
{
	g_mutex_lock(&m->lock);
	for (guint i = 0; i < m->keepers->len; i++)
		((PrKeeper *)m->keepers->pdata[i])->ending = TRUE;
	g_cond_broadcast(&m->changed);
	g_mutex_unlock(&m->lock);

	for (guint i = 0; i < m->keepers->len; i++)
		g_cancellable_cancel(((PrKeeper *)m->keepers->pdata[i])->cancel);
	for (guint i = 0; i < m->keepers->len; i++) {
		PrKeeper *keeper = m->keepers->pdata[i];

		g_thread_join(keeper->thread);
		keeper_free(keeper);
	}
	g_ptr_array_set_size(m->keepers, 0);
}

static PrKeeper *find_keeper(PrMigration *m, const PrUri *uri)
{
	for (guint i = 0; i < m->keepers->len; i++) {
		PrKeeper *keeper = m->keepers->pdata[i];

		if (strcmp(keeper->uri->text, uri->text) == 0)
			return keeper;
	}
	return NULL;
}

guint pr_standby_rank(PrMigration *m, const PrUri *uri)
{
	const PrKeeper *keeper = find_keeper(m, uri);
	const PrHealth *health = &pr_path_record(m, uri->text)->health;

	if (!keeper || !keeper->conn || keeper->conn->failure || !health->probes)
		return 0;
	return health->state == PR_PATH_STANDBY ? 2 : 1;
}

/* The standby of a path, which is the caller's from then on; NULL: it has none. Claims the path: a standby
 * that would be up a moment later gives way. */
static PrConn *take(PrMigration *m, const PrUri *uri)
{
	PrKeeper *keeper = find_keeper(m, uri);
	PrConn *conn = NULL;

	g_mutex_lock(&m->lock);
	if (pr_standby_rank(m, uri) > 0) {
		conn = g_steal_pointer(&keeper->conn);
		pr_conn_unlist(conn);
	}
	m->claimed = g_strdup(uri->text);
	g_cond_broadcast(&m->changed);
	g_mutex_unlock(&m->lock);
	return conn;
}

void pr_standby_unclaim(PrMigration *m)
{
	g_mutex_lock(&m->lock);
	g_clear_pointer(&m->claimed, g_free);
	g_cond_broadcast(&m->changed);
	g_mutex_unlock(&m->lock);
}

static gboolean send_activate(PrConn *conn, PrResume resume, GError **error)
{
	PrMigration *m = conn->m;
	g_autoptr(GByteArray) body = g_byte_array_new();

	g_mutex_lock(&m->lock);
	conn->epoch = ++m->binding.epoch;
	PrActivate activate = {.epoch = conn->epoch, .resume = resume};
	g_mutex_unlock(&m->lock);
	pr_activate_encode(body, &activate);
	return pr_send(conn, PR_CMD_ACTIVATE, body, error);
}

static gboolean wait_activated(PrConn *conn, PrHelloAck *ret, GError **error)
{
	PrMigration *m = conn->m;
	gint64 deadline = g_get_monotonic_time() +
			  (gint64)pr_param(m->params, PR_PARAM_HANDSHAKE_TIMEOUT) * 1000;
	gboolean in_time = TRUE;

	g_mutex_lock(&m->lock);
	while (!conn->ack && !conn->failure && !m->failure && in_time)
		in_time = g_cond_wait_until(&m->changed, &m->lock, deadline);
	gboolean answered = conn->ack != NULL;
	if (answered)
		*ret = *conn->ack;
	else if (conn->failure)
		g_propagate_error(error, g_error_copy(conn->failure));
	else if (m->failure)
		pr_migration_copy_failure(m, error);
	else
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_TIMEOUT,
			    "path %s: the destination does not answer ACTIVATE", conn->name);
	g_mutex_unlock(&m->lock);
	return answered && pr_control_check_ack(conn->control, ret, error);
}

PrConn *pr_standby_activate(PrMigration *m, const PrUri *uri, PrResume resume,
			    gboolean *ret_completed, GError **error)
{
	PrConn *conn = take(m, uri);
	PrHelloAck ack = {0};

	if (!conn)
		return NULL;
	if (send_activate(conn, resume, error) && wait_activated(conn, &ack, error)) {
		if (ack.status == PR_HELLO_COMPLETED) {
			*ret_completed = TRUE;
			g_mutex_lock(&m->lock);
			m->progress = ack.progress;
			g_mutex_unlock(&m->lock);
		} else if (pr_conn_adopt(conn, error)) {
			return conn;
		}
	}
	if (error && *error)
		note_end(conn, *error);
	pr_conn_close(conn);
	return NULL;
}

/* ---- what comes over a standby ---- */

gboolean pr_standby_take_lost(PrMigration *m, const PrMsg *msg, const char *peer, GError **error)
{
	PrLost lost;

	if (!pr_lost_decode(msg->body, msg->length, &lost, error))
		return FALSE;
	g_autoptr(GError) why =
		g_error_new(PR_PATH_ERROR, lost.held ? PR_PATH_ERROR_HELD : PR_PATH_ERROR_PEER,
			    "the %s has paused: %s", peer, lost.reason);
	g_mutex_lock(&m->lock);
	/* Of an older one we know already. */
	if (m->conn && m->conn->epoch == lost.epoch)
		pr_migration_failed_locked(m, why);
	g_mutex_unlock(&m->lock);
	pr_session_flush_events(m);
	return TRUE;
}

gboolean pr_standby_take_probed(PrConn *conn, const PrMsg *msg, GError **error)
{
	PrMigration *m = conn->m;
	PrProbed probed;

	if (!pr_probed_decode(msg->body, msg->length, &probed, error))
		return FALSE;
	g_mutex_lock(&m->lock);
	conn->rtt_us = probed.rtt_us;
	if (conn->standby)
		pr_path_step(m, conn->name, PR_HEALTH_PROBED, "answers probes");
	g_mutex_unlock(&m->lock);
	pr_session_flush_events(m);
	return TRUE;
}

gboolean pr_standby_take_activated(PrConn *conn, const PrMsg *msg, GError **error)
{
	PrMigration *m = conn->m;
	PrHelloAck ack;

	if (!pr_hello_ack_decode(msg->body, msg->length, &ack, error))
		return FALSE;
	g_mutex_lock(&m->lock);
	if (!conn->ack)
		conn->ack = g_memdup2(&ack, sizeof(ack));
	g_cond_broadcast(&m->changed);
	g_mutex_unlock(&m->lock);
	return TRUE;
}

void pr_standby_tell_lost(PrMigration *m, uint64_t epoch, const GError *error)
{
	PrLost lost = {.epoch = epoch, .held = m->held};
	g_autoptr(GByteArray) body = g_byte_array_new();

	g_strlcpy(lost.reason, error->message, sizeof(lost.reason));
	pr_lost_encode(body, &lost);
	for (guint i = 0; i < m->standbys->len; i++)
		pr_control_send_nowait(((PrConn *)m->standbys->pdata[i])->control, PR_MSG_LOST,
				       body);
}

/* ---- the destination ---- */

/* What the thread of one standby has. */
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

/* One probe there and back. */
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
	PrMigration *m = conn->m;
	g_autoptr(GByteArray) body = g_byte_array_new();
	gint64 bound = (gint64)pr_param(m->params, PR_PARAM_HEARTBEAT_TIMEOUT) * 1000;

	if (!pr_rail_review(conn, error))
		return FALSE;
	gint64 began = g_get_monotonic_time();
	guint n_probed = 0;
	for (PrLaneId lane = 0; lane < conn->path->n_lanes; lane++) {
		/* The bulk lane of a standby that pulls is in use, and shows by that how it is. */
		if (lane == PR_LANE_BULK && conn->stripe)
			continue;
		if (!probe_lane(conn, lane, began + bound, error))
			return FALSE;
		n_probed++;
	}
	gint64 now = g_get_monotonic_time();
	PrProbed probed = {.count = ++self->probes, .rtt_us = (now - began) / n_probed};
	self->probe_at = now + (gint64)pr_param(m->params, PR_PARAM_PROBE_INTERVAL) * 1000;
	g_mutex_lock(&m->lock);
	conn->rtt_us = probed.rtt_us;
	pr_path_step(m, conn->name, PR_HEALTH_PROBED, "answers probes");
	g_mutex_unlock(&m->lock);
	pr_session_flush_events(m);
	pr_rail_begin(conn);
	pr_probed_encode(body, &probed);
	return pr_send(conn, PR_RP_PROBED, body, error);
}

/* The source's memory may be read from now on. */
static gboolean take_ready(Standby *self, const PrMsg *msg, GError **error)
{
	uint32_t value;

	if (!pr_u32_decode(msg->body, msg->length, &value, error))
		return FALSE;
	if (!self->conn->granted)
		pr_destination_use_grants(self->conn);
	self->probe_at = g_get_monotonic_time();
	return TRUE;
}

/* *ret_taken: the load thread has the connection. */
static gboolean take_activate(Standby *self, const PrMsg *msg, gboolean *ret_taken, GError **error)
{
	PrHelloAck ack = {.status = PR_HELLO_OK};
	PrActivate activate;

	if (!pr_activate_decode(msg->body, msg->length, &activate, error))
		return FALSE;
	if (!pr_rail_drain(self->conn, error))
		return FALSE;
	self->hello.epoch = activate.epoch;
	self->hello.resume = activate.resume;
	*ret_taken = pr_destination_activate(self->conn, &self->hello, self->listener, &ack);
	return *ret_taken || pr_destination_send_activated(self->conn, &ack, error);
}

static gboolean take_message(Standby *self, const PrMsg *msg, gboolean *ret_taken, GError **error)
{
	PrMigration *m = self->conn->m;

	switch (msg->type) {
	case PR_CMD_GRANT:
		return pr_destination_take_grant(m, self->conn, msg, error);
	case PR_CMD_PING:
		return take_ready(self, msg, error);
	case PR_CMD_ACTIVATE:
		return take_activate(self, msg, ret_taken, error);
	case PR_MSG_LOST:
		return pr_standby_take_lost(m, msg, "source", error);
	case PR_MSG_PAUSE:
	case PR_MSG_HOLD:
	case PR_MSG_ERROR:
		return pr_take_reason(msg, "source", error);
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

/* Until it fails, or is taken (TRUE). */
static gboolean serve(Standby *self, GError **error)
{
	gboolean taken = FALSE;

	self->probe_at = G_MAXINT64;
	while (!taken) {
		g_autoptr(GError) local = NULL;
		pr_watch_idle(self->watch);
		g_autoptr(PrMsg) msg =
			pr_control_recv(self->conn->control, ms_until(self->probe_at), &local);
		gboolean ok;

		pr_watch_enter(self->watch, &attending);
		if (msg)
			ok = take_message(self, msg, &taken, &local);
		else if (g_error_matches(local, PR_PATH_ERROR, PR_PATH_ERROR_TIMEOUT))
			g_clear_error(&local), ok = probe(self, &local);
		else
			ok = FALSE;
		if (!ok) {
			g_propagate_error(error, g_steal_pointer(&local));
			return FALSE;
		}
	}
	return TRUE;
}

static gboolean bring_up(Standby *self, GError **error)
{
	PrConn *conn = self->conn;
	PrMigration *m = conn->m;

	if (!pr_destination_accept(conn, self->listener, /* standby= */ TRUE, error))
		return FALSE;
	g_mutex_lock(&m->lock);
	pr_path_step(m, conn->name, PR_HEALTH_CONNECTED, "connected as a standby");
	g_mutex_unlock(&m->lock);
	pr_session_flush_events(m);
	return TRUE;
}

static gpointer standby_thread(gpointer opaque)
{
	Standby *self = opaque;
	PrConn *conn = self->conn;
	PrMigration *m = conn->m;
	g_autoptr(GError) error = NULL;
	g_autoptr(PrWatch) watch = pr_watch_new(m->watchdog, "standby");

	self->watch = watch;
	pr_watch_enter(watch, &connecting);
	if (!bring_up(self, &error) || !serve(self, &error)) {
		g_info("standby path %s: %s", conn->name, error->message);
		note_end(conn, error);
		pr_conn_close(conn);
	}
	standby_free(self);
	g_clear_pointer(&watch, pr_watch_free); /* the migration may be gone after this */
	pr_migration_thread_ends(m);
	return NULL;
}

/* With the lock held. */
static void judge(PrMigration *m, const PrHello *hello, PrHelloAck *ack)
{
	g_autoptr(GError) error = NULL;

	if (m->sm.role != PR_ROLE_DESTINATION || !pr_destination_same_migration(m, hello))
		pr_refuse(ack, "there is no such migration here to stand by for");
	else if (m->quit || !pr_state_is_postcopy(m->sm.state))
		pr_refuse(ack, "this migration is %s and needs no standby",
			  pr_state_name(m->sm.state));
	else if (m->standbys->len >= STANDBYS_MAX)
		pr_refuse(ack, "there are %u standby paths already", m->standbys->len);
	else if (!pr_ram_check_blocks(m->ram, hello->blocks, hello->n_blocks, &error))
		pr_refuse(ack, "%s", error->message);
}

void pr_standby_admit(PrMigration *m, PrControl *control, const PrHello *hello,
		      PrListener *listener)
{
	g_autofree char *name = pr_destination_path_name(control, listener);
	PrHelloAck ack = {.status = PR_HELLO_OK};
	g_autoptr(GError) error = NULL;

	g_mutex_lock(&m->lock);
	judge(m, hello, &ack);
	/* From here on the RAM stays until the thread has ended. */
	m->n_threads += ack.status == PR_HELLO_OK;
	g_mutex_unlock(&m->lock);
	if (ack.status != PR_HELLO_OK) {
		pr_note_refusal(m, "standby path", control, ack.reason);
		pr_control_answer(control, &ack, NULL);
		pr_control_free(control);
		return;
	}
	Standby *self = g_new0(Standby, 1);
	self->listener = listener;
	pr_hello_copy(&self->hello, hello);
	self->conn = pr_conn_new(m, pr_listener_uri(listener), name, hello->epoch);
	self->conn->control = control;
	self->conn->peer_can = hello->capabilities;
	self->conn->cancel = g_cancellable_new();
	GThread *thread = pr_thread_try("standby", standby_thread, self, &error);
	if (thread) {
		g_thread_unref(thread);
		return;
	}
	pr_refuse(&ack, "%s", error->message);
	pr_control_answer(control, &ack, NULL);
	pr_conn_free(self->conn);
	standby_free(self);
	pr_migration_thread_ends(m);
}
