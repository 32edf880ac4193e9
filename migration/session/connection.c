/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/session/connection.h"

#include <string.h>

#define DRAIN_MS 1000
#define LAST_WORDS_US                                                                              \
	(300 * 1000) /* that a lost data path waits for the reason on the control channel */

PrConn *pr_conn_new(PrSession *session, const PrConnOps *ops, void *role, const PrUri *uri,
		    const char *name, uint64_t epoch)
{
	PrConn *conn = g_new0(PrConn, 1);

	conn->session = session;
	conn->ops = ops;
	conn->role = role;
	conn->uri = pr_uri_copy(uri);
	conn->name = g_strdup(name ? name : uri->text);
	conn->epoch = conn->lanes_epoch = epoch;
	conn->grants = g_array_new(FALSE, FALSE, sizeof(PrGrant));
	g_mutex_init(&conn->grants_lock);
	return conn;
}

void pr_conn_free(PrConn *conn)
{
	pr_data_path_destroy(conn->path);
	pr_control_free(conn->control);
	g_clear_object(&conn->cancel);
	g_clear_error(&conn->failure);
	g_free(conn->ack);
	g_array_unref(conn->grants);
	g_mutex_clear(&conn->grants_lock);
	pr_uri_free(conn->uri);
	g_free(conn->name);
	g_free(conn);
}

void pr_conn_binding(PrConn *conn, PrBinding *ret)
{
	g_mutex_lock(&conn->session->lock);
	*ret = conn->session->binding;
	g_mutex_unlock(&conn->session->lock);
	/* The session's epoch may be a pending peer's already. */
	ret->epoch = conn->lanes_epoch;
}

/* Whether a failure now means that the guest stays at the source. With the lock held. */
static gboolean may_still_stay(PrSession *session)
{
	return session->sm.role == PR_ROLE_SOURCE && !pr_state_is_postcopy(session->sm.state);
}

/* A peer that gives up or pauses says why on the control channel, and closes the data path as well.
 * Whichever is seen first, the operator has to read the reason. */
static void path_failed(const GError *error, void *opaque)
{
	PrConn *conn = opaque;
	PrSession *session = conn->session;
	gboolean closed = g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_CLOSED);
	gint64 until = g_get_monotonic_time() + LAST_WORDS_US;

	pr_session_lock(session);
	/* Ended by what the control channel says, or by the time. */
	while (session->conn == conn && (closed || may_still_stay(session)) && !session->failure &&
	       g_cond_wait_until(&session->changed, &session->lock, until))
		;
	pr_conn_failed_locked(conn, error);
	pr_session_unlock(session);
}

PrPathSetup pr_conn_setup(PrConn *conn, const PrBinding *binding, uint16_t data_port)
{
	PrSession *session = conn->session;

	return (PrPathSetup){
		.uri = conn->uri,
		.data_port = data_port,
		.tls = session->security.tls,
		.binding = *binding,
		.regions = session->ram->regions,
		.n_regions = session->ram->n_blocks,
		.n_lanes = conn->n_lanes,
		.timeout_ms = (guint)pr_param(session->params, PR_PARAM_HANDSHAKE_TIMEOUT),
		.cancel = conn->cancel,
		.on_failed = path_failed,
		.allocate = conn->ops->allocate,
		.allocate_opaque = conn->role,
		.opaque = conn,
	};
}

/* PrControlEarly */
static gboolean handle_early(const PrMsg *msg, void *opaque)
{
	PrConn *conn = opaque;

	return conn->ops->early(conn, msg);
}

static gboolean start_control(PrConn *conn, GError **error)
{
	const PrParams *params = conn->session->params;

	pr_control_set_early(conn->control, handle_early, conn);
	pr_control_set_watchdog(conn->control, conn->session->watchdog);
	return pr_control_start(conn->control, (guint)pr_param(params, PR_PARAM_HEARTBEAT_INTERVAL),
				(guint)pr_param(params, PR_PARAM_HEARTBEAT_TIMEOUT), pr_conn_failed,
				conn, error);
}

/* With the lock held: whether there is still a use for it. */
static gboolean may_go_on(PrConn *conn, GError **error)
{
	if (conn->failure)
		g_propagate_error(error, g_error_copy(conn->failure));
	else if (!conn->standby && conn->session->failure)
		pr_session_copy_failure(conn->session, error);
	else
		return TRUE;
	return FALSE;
}

gboolean pr_conn_publish(PrConn *conn, GError **error)
{
	PrSession *session = conn->session;

	pr_session_lock(session);
	gboolean go_on = may_go_on(conn, error);
	if (go_on)
		session->conn = conn;
	pr_session_unlock(session);
	if (!go_on || start_control(conn, error))
		return go_on;
	pr_session_lock(session);
	if (session->conn == conn)
		pr_session_detach_conn(session);
	pr_session_unlock(session);
	return FALSE;
}

gboolean pr_conn_adopt(PrConn *conn, GError **error)
{
	PrSession *session = conn->session;

	pr_session_lock(session);
	gboolean go_on = may_go_on(conn, error);
	if (go_on) {
		session->conn = conn;
		pr_path_step(&session->paths, conn->name, PR_HEALTH_ACTIVATED, "in use");
	}
	pr_session_unlock(session);
	return go_on;
}

gboolean pr_conn_stand_by(PrConn *conn, GError **error)
{
	PrSession *session = conn->session;

	pr_session_lock(session);
	gboolean wanted = !session->quit && pr_state_is_postcopy(session->sm.state);
	if (wanted) {
		conn->standby = TRUE;
		g_ptr_array_add(session->standbys, conn);
	} else {
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_LOCAL_REQUEST,
			    "the migration is %s", pr_state_name(session->sm.state));
	}
	pr_session_unlock(session);
	if (!wanted || start_control(conn, error))
		return wanted;
	pr_session_lock(session);
	if (conn->standby)
		pr_conn_unlist(conn);
	pr_session_unlock(session);
	return FALSE;
}

void pr_conn_unlist(PrConn *conn)
{
	conn->standby = FALSE;
	g_ptr_array_remove(conn->session->standbys, conn);
	g_cond_broadcast(&conn->session->changed);
}

gboolean pr_conn_set_path(PrConn *conn, PrDataPath *path, GError **error)
{
	PrSession *session = conn->session;

	pr_session_lock(session);
	conn->path = path;
	gboolean go_on = may_go_on(conn, error);
	pr_path_set_device(&session->paths, conn->name, path);
	if (go_on && !conn->standby)
		pr_path_step(&session->paths, conn->name, PR_HEALTH_ACTIVATED, "connected");
	pr_session_unlock(session);
	return go_on;
}

void pr_conn_failed_locked(PrConn *conn, const GError *error)
{
	PrSession *session = conn->session;

	if (session->conn == conn) {
		pr_session_failed_locked(session, error);
	} else if (!conn->failure) {
		/* A standby, or one that is not in use yet: whoever has it looks here. */
		conn->failure = g_error_copy(error);
		pr_conn_shutdown(conn);
		g_cond_broadcast(&session->changed);
	}
}

void pr_conn_failed(const GError *error, void *opaque)
{
	PrConn *conn = opaque;
	PrSession *session = conn->session;

	pr_session_lock(session);
	pr_conn_failed_locked(conn, error);
	pr_session_unlock(session);
}

void pr_conn_shutdown(PrConn *conn)
{
	g_autoptr(GError) closing = g_error_new_literal(PR_PATH_ERROR, PR_PATH_ERROR_LOST,
							"the connection is being closed");

	pr_control_shutdown(conn->control, closing);
	if (conn->path)
		conn->path->ops->shutdown(conn->path);
}

/* Unpinning memory takes long, and the peer's last words may have to be waited for. */
static gpointer free_thread(gpointer opaque)
{
	PrConn *conn = opaque;
	PrSession *session = conn->session;

	pr_conn_free(conn);
	pr_session_thread_ends(session);
	return NULL;
}

/* The connection is neither in use nor a standby any more. */
static void withdraw(PrConn *conn)
{
	PrSession *session = conn->session;

	pr_session_lock(session);
	if (session->conn == conn) {
		pr_session_detach_conn(session);
		pr_path_step(&session->paths, conn->name, PR_HEALTH_CLOSED, "not in use any more");
	}
	if (conn->standby)
		pr_conn_unlist(conn);
	/* Its threads may still report failures, which must not shut down what is being freed. */
	if (!conn->failure)
		conn->failure =
			g_error_new_literal(PR_PATH_ERROR, PR_PATH_ERROR_LOCAL_REQUEST, "closed");
	pr_session_unlock(session);
}

/* When it returns, no READ can land any more. */
static void fence_path(PrConn *conn)
{
	if (!conn->path || conn->path->ops->drain(conn->path, DRAIN_MS))
		return;
	g_warning("path %s: not every READ came back within %d ms; destroying it", conn->name,
		  DRAIN_MS);
	pr_data_path_destroy(g_steal_pointer(&conn->path));
}

void pr_conn_close(PrConn *conn)
{
	pr_conn_shutdown(conn);
	if (conn->return_path)
		g_thread_join(conn->return_path);
	conn->ops->release(conn);
	withdraw(conn);
	fence_path(conn);
	conn->ops->fenced(conn);
	pr_session_spawn(conn->session, "closing", free_thread, conn);
}

void pr_conn_standby_ended(PrConn *conn, const GError *error)
{
	PrSession *session = conn->session;

	pr_session_lock(session);
	/* The same path may be in use, over another connection. */
	if (!session->conn || strcmp(session->conn->name, conn->name) != 0)
		pr_path_ended(&session->paths, conn->name, conn->failure ? conn->failure : error);
	if (conn->standby)
		pr_conn_unlist(conn);
	pr_session_unlock(session);
}

/* With the lock held. */
static void end_standbys(PrSession *session)
{
	for (guint i = 0; i < session->standbys->len; i++) {
		PrConn *conn = g_ptr_array_index(session->standbys, i);

		if (!conn->failure)
			conn->failure =
				g_error_new_literal(PR_PATH_ERROR, PR_PATH_ERROR_LOCAL_REQUEST,
						    "the migration ends; standby closed");
		g_cancellable_cancel(conn->cancel);
		pr_conn_shutdown(conn);
	}
	g_cond_broadcast(&session->changed);
}

void pr_conn_await_threads(PrSession *session)
{
	pr_session_lock(session);
	end_standbys(session);
	/* Ended by those threads, whose connections were just shut down. */
	while (session->n_threads > 0)
		g_cond_wait(&session->changed, &session->lock);
	pr_session_unlock(session);
}
