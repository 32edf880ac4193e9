/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Standby paths
 *
 * While one path carries the migration, every other path that the source knows is kept connected:
 * control channel and lanes, with the source's memory registered and granted. Failing over to a
 * standby costs one message each way (ACTIVATE, ACTIVATED) before the bitmaps are exchanged. The
 * side that loses the path in use can say so at once over the standbys (LOST), and a standby that
 * dies is known before it is needed.
 *
 * Source: a keeper for each listed path. It is a thread that connects the path whenever it is not
 * the one in use, again and again; how soon, and when the path is to be trusted, is in
 * transport/health.h. The owner takes a keeper's connection when it needs one. A standby has its
 * return-path thread from the beginning, and keeps it. The guest's RAM does not change any more, so
 * grants are valid for good.
 *
 * Destination: destination/standby.c.
 *
 * No failure here ends a migration: a standby that fails is closed.
 */
#include "migration/source/standby.h"

#include <string.h>

#include "migration/session/messages.h"
#include "migration/source/connect.h"
#include "migration/source/grants.h"
#include "util/try-alloc.h"

#define POLL_US (200 * 1000) /* between two checks whether standbys are still wanted */

static const PrWatchPoint connecting = {"connecting a standby path", 15000};

struct PrKeeper {
	/* constant */
	PrSource *source;
	PrUri *uri;
	GCancellable *cancel;
	GThread *thread; /* the owner's */
	/* PrSession.lock */
	PrConn *conn; /* listed as a standby, and up; the owner may take it */
	gboolean ending;
};

/* ---- a keeper; what says nothing of the lock is called with it ---- */

/* The path is in use, or is about to be. */
static gboolean is_in_use(const PrKeeper *keeper)
{
	const PrSource *source = keeper->source;
	const PrConn *conn = source->session->conn;

	return g_strcmp0(source->claimed, keeper->uri->text) == 0 ||
	       (conn && strcmp(conn->name, keeper->uri->text) == 0);
}

static gboolean is_wanted(const PrKeeper *keeper)
{
	const PrSession *session = keeper->source->session;

	return pr_state_is_postcopy(session->sm.state) && !is_in_use(keeper) &&
	       pr_capability(session->params, PR_CAP_STANDBY_PATHS);
}

static gboolean is_over(const PrKeeper *keeper)
{
	const PrSession *session = keeper->source->session;

	return keeper->ending || session->quit || pr_state_is_over(session->sm.state);
}

static void poll_wait(PrSession *session, gint64 until)
{
	g_cond_wait_until(&session->changed, &session->lock,
			  MIN(until, g_get_monotonic_time() + POLL_US));
}

/* Waits until the path is to be connected. FALSE: never again. Without the lock. */
static gboolean wait_until_due(PrKeeper *keeper)
{
	PrSession *session = keeper->source->session;

	pr_session_lock(session);
	for (;;) {
		gint64 due = pr_path_record(&session->paths, keeper->uri->text)->health.retry_at;

		if (is_over(keeper) || (is_wanted(keeper) && g_get_monotonic_time() >= due))
			break;
		poll_wait(session, is_wanted(keeper) ? due : G_MAXINT64);
	}
	gboolean go_on = !is_over(keeper);
	if (go_on)
		pr_path_step(&session->paths, keeper->uri->text, PR_HEALTH_CONNECTS,
			     "to be a standby");
	pr_session_unlock(session);
	return go_on;
}

/* Why the source closes a standby that has not failed. */
static const char *why_closed(const PrKeeper *keeper)
{
	const PrSession *session = keeper->source->session;

	if (session->sm.state == PR_STATE_COMPLETED)
		return "migration completed; standby closed";
	return is_over(keeper) ? "the migration has ended; standby closed"
			       : "the standby is not wanted any more";
}

/* Ends a standby, from the keeper's thread. Without the lock. */
static void end_standby(PrConn *conn, const GError *why)
{
	pr_conn_standby_ended(conn, why);
	pr_conn_close(conn);
}

/* Offers the connection to the owner, until the owner takes it, it fails, or it is not wanted any
 * more. The owner may take it after its first answered probe. Without the lock. */
static void offer(PrKeeper *keeper, PrConn *conn)
{
	PrSession *session = keeper->source->session;

	pr_session_lock(session);
	keeper->conn = conn;
	pr_path_step(&session->paths, conn->name, PR_HEALTH_CONNECTED, "connected as a standby");
	pr_session_unlock(session);
	/* The destination begins to probe. If the PING fails, so does the connection. */
	pr_source_send_ping(conn, PR_PING_READY, NULL);

	pr_session_lock(session);
	while (keeper->conn && !conn->failure && !is_over(keeper) && is_wanted(keeper))
		poll_wait(session, G_MAXINT64);
	gboolean ours = keeper->conn != NULL;
	keeper->conn = NULL;
	g_autoptr(GError) closed =
		g_error_new_literal(PR_PATH_ERROR, PR_PATH_ERROR_LOCAL_REQUEST, why_closed(keeper));
	pr_session_unlock(session);
	if (!ours)
		return;
	pr_send_reason_nowait(conn, PR_MSG_HOLD, closed->message);
	end_standby(conn, closed);
}

/* If the owner has connected the path meanwhile, this attempt says nothing about the path. Without
 * the lock. */
static void note_failure(PrKeeper *keeper, const GError *error)
{
	PrSession *session = keeper->source->session;

	pr_session_lock(session);
	if (!is_in_use(keeper))
		pr_path_ended(&session->paths, keeper->uri->text, error);
	pr_session_unlock(session);
}

/* Connects the path, and offers it as long as it is up. Without the lock. */
static void keep_once(PrKeeper *keeper, PrWatch *watch)
{
	g_autoptr(GError) error = NULL;
	PrConn *conn;

	pr_watch_enter(watch, &connecting);
	switch (pr_source_connect(keeper->source, keeper->uri, PR_RESUME_STANDBY, keeper->cancel,
				  &conn, &error)) {
	case PR_CONNECT_UP:
		break;
	case PR_CONNECT_COMPLETED:
		g_set_error(&error, PR_PATH_ERROR, PR_PATH_ERROR_LOCAL_REQUEST,
			    "path %s: the destination has every page already", keeper->uri->text);
		note_failure(keeper, error);
		return;
	default:
		note_failure(keeper, error);
		return;
	}
	if (!pr_source_send_all_grants(conn, &error)) {
		end_standby(conn, error);
		return;
	}
	pr_watch_idle(watch);
	offer(keeper, conn);
}

static gpointer keeper_thread(gpointer opaque)
{
	PrKeeper *keeper = opaque;
	g_autoptr(PrWatch) watch = pr_watch_new(keeper->source->session->watchdog, "standby");

	pr_watch_idle(watch);
	while (wait_until_due(keeper)) {
		keep_once(keeper, watch);
		pr_watch_idle(watch);
	}
	return NULL;
}

/* ---- the owner ---- */

static PrKeeper *find_keeper(PrSource *source, const PrUri *uri)
{
	for (guint i = 0; i < source->keepers->len; i++) {
		PrKeeper *keeper = source->keepers->pdata[i];

		if (strcmp(keeper->uri->text, uri->text) == 0)
			return keeper;
	}
	return NULL;
}

static void add_keeper(PrSource *source, const PrUri *uri)
{
	PrKeeper *keeper = g_new0(PrKeeper, 1);

	keeper->source = source;
	keeper->uri = pr_uri_copy(uri);
	keeper->cancel = g_cancellable_new();
	g_ptr_array_add(source->keepers, keeper);
}

static void keeper_free(PrKeeper *keeper)
{
	g_object_unref(keeper->cancel);
	pr_uri_free(keeper->uri);
	g_free(keeper);
}

void pr_standby_keep(PrSource *source)
{
	PrSession *session = source->session;
	guint first = source->keepers->len;

	pr_session_lock(session);
	for (guint i = 0; source->uris->len > 1 && i < source->uris->len; i++)
		if (!find_keeper(source, source->uris->pdata[i]))
			add_keeper(source, source->uris->pdata[i]);
	pr_session_unlock(session);
	for (guint i = first; i < source->keepers->len;) {
		PrKeeper *keeper = source->keepers->pdata[i];
		g_autoptr(GError) error = NULL;

		keeper->thread = pr_thread_try("standby", keeper_thread, keeper, &error);
		if (keeper->thread) {
			i++;
			continue;
		}
		/* It is tried again after the next recovery. */
		g_warning("path %s: no standby: %s", keeper->uri->text, error->message);
		keeper_free(keeper);
		g_ptr_array_remove_index(source->keepers, i);
	}
}

void pr_standby_stop(PrSource *source)
{
	PrSession *session = source->session;

	pr_session_lock(session);
	for (guint i = 0; i < source->keepers->len; i++)
		((PrKeeper *)source->keepers->pdata[i])->ending = TRUE;
	g_cond_broadcast(&session->changed);
	pr_session_unlock(session);

	for (guint i = 0; i < source->keepers->len; i++)
		g_cancellable_cancel(((PrKeeper *)source->keepers->pdata[i])->cancel);
	for (guint i = 0; i < source->keepers->len; i++) {
		PrKeeper *keeper = source->keepers->pdata[i];

		g_thread_join(keeper->thread);
		keeper_free(keeper);
	}
	g_ptr_array_set_size(source->keepers, 0);
}

PrStandbyRank pr_standby_rank(PrSource *source, const PrUri *uri)
{
	const PrKeeper *keeper = find_keeper(source, uri);
	const PrHealth *health = &pr_path_record(&source->session->paths, uri->text)->health;

	if (!keeper || !keeper->conn || keeper->conn->failure || !health->probes)
		return PR_STANDBY_NONE;
	return health->state == PR_PATH_STANDBY ? PR_STANDBY_FIT : PR_STANDBY_ON_PROBATION;
}

/* Takes the standby of a path; NULL: it has none. Claims the path: a standby that would be up a
 * moment later gives way. */
static PrConn *take_standby(PrSource *source, const PrUri *uri)
{
	PrSession *session = source->session;
	PrKeeper *keeper = find_keeper(source, uri);
	PrConn *conn = NULL;

	pr_session_lock(session);
	if (pr_standby_rank(source, uri) != PR_STANDBY_NONE) {
		conn = g_steal_pointer(&keeper->conn);
		pr_conn_unlist(conn);
	}
	source->claimed = g_strdup(uri->text);
	g_cond_broadcast(&session->changed);
	pr_session_unlock(session);
	return conn;
}

void pr_standby_unclaim(PrSource *source)
{
	PrSession *session = source->session;

	pr_session_lock(session);
	g_clear_pointer(&source->claimed, g_free);
	g_cond_broadcast(&session->changed);
	pr_session_unlock(session);
}

static gboolean send_activate(PrConn *conn, PrResume resume, GError **error)
{
	PrSession *session = conn->session;
	g_autoptr(GByteArray) body = g_byte_array_new();

	pr_session_lock(session);
	conn->epoch = ++session->binding.epoch;
	PrActivate activate = {.epoch = conn->epoch, .resume = resume};
	pr_session_unlock(session);
	pr_activate_encode(body, &activate);
	return pr_send(conn, PR_CMD_ACTIVATE, body, error);
}

static gboolean wait_activated(PrConn *conn, PrHelloAck *ret, GError **error)
{
	PrSession *session = conn->session;
	gint64 deadline = g_get_monotonic_time() +
			  (gint64)pr_param(session->params, PR_PARAM_HANDSHAKE_TIMEOUT) * 1000;
	gboolean in_time = TRUE;

	pr_session_lock(session);
	while (!conn->ack && !conn->failure && !session->failure && in_time)
		in_time = g_cond_wait_until(&session->changed, &session->lock, deadline);
	gboolean answered = conn->ack != NULL;
	if (answered)
		*ret = *conn->ack;
	else if (conn->failure)
		g_propagate_error(error, g_error_copy(conn->failure));
	else if (session->failure)
		pr_session_copy_failure(session, error);
	else
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_TIMEOUT,
			    "path %s: the destination does not answer ACTIVATE", conn->name);
	pr_session_unlock(session);
	return answered && pr_control_check_ack(conn->control, ret, error);
}

/* Asks the destination to go on over this connection. */
static PrConnectOutcome activate(PrConn *conn, PrResume resume, GError **error)
{
	PrHelloAck ack = {0};

	if (!send_activate(conn, resume, error) || !wait_activated(conn, &ack, error))
		return PR_CONNECT_FAILED;
	if (ack.status == PR_HELLO_COMPLETED) {
		pr_source_note_completed(pr_conn_source(conn), &ack);
		return PR_CONNECT_COMPLETED;
	}
	return pr_conn_adopt(conn, error) ? PR_CONNECT_UP : PR_CONNECT_FAILED;
}

PrConnectOutcome pr_standby_activate(PrSource *source, const PrUri *uri, PrResume resume,
				     PrConn **ret_conn, GError **error)
{
	PrConn *conn = take_standby(source, uri);
	g_autoptr(GError) why = NULL;

	if (!conn)
		return PR_CONNECT_NONE;
	PrConnectOutcome outcome = activate(conn, resume, &why);
	if (outcome == PR_CONNECT_UP) {
		*ret_conn = conn;
		return outcome;
	}
	if (outcome == PR_CONNECT_FAILED) {
		pr_conn_standby_ended(conn, why);
		g_propagate_error(error, g_steal_pointer(&why));
	}
	pr_conn_close(conn);
	return outcome;
}
