/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A connection from its making to its end: the one in use, or a standby. */
#include "migration/session/session.h"

#define DRAIN_MS 1000
#define LAST_WORDS_US                                                                              \
	(300 * 1000) /* that a lost data path waits for the reason on the control channel */

PrConn *pr_conn_new(PrMigration *m, const PrUri *uri, const char *name, uint64_t epoch)
{
	PrConn *conn = g_new0(PrConn, 1);

	conn->m = m;
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
	g_mutex_lock(&conn->m->lock);
	*ret = conn->m->binding;
	g_mutex_unlock(&conn->m->lock);
	/* The migration's own may be that of a pending_peer already. */
	ret->epoch = conn->lanes_epoch;
}

/* Whether a failure now means that the guest stays at the source. With the lock held. */
static gboolean may_still_stay(PrMigration *m)
{
	return m->sm.role == PR_ROLE_SOURCE && !pr_state_is_postcopy(m->sm.state);
}

/* A destination that gives up says why on the control channel and closes the data path as well. Whichever is seen
 * first, the operator of the source has to hear the reason. */
static void path_failed(const GError *error, void *opaque)
{
	PrConn *conn = opaque;
	PrMigration *m = conn->m;
	gint64 until = g_get_monotonic_time() + LAST_WORDS_US;

	g_mutex_lock(&m->lock);
	/* Ended by what the control channel says, or by the time. */
	while (m->conn == conn && may_still_stay(m) && !m->failure &&
	       g_cond_wait_until(&m->changed, &m->lock, until))
		;
	pr_conn_failed_locked(conn, error);
	g_mutex_unlock(&m->lock);
	pr_session_flush_events(m);
}

PrPathSetup pr_conn_setup(PrConn *conn, const PrBinding *binding, uint16_t data_port)
{
	PrMigration *m = conn->m;

	return (PrPathSetup){
		.uri = conn->uri,
		.data_port = data_port,
		.tls = m->security.tls,
		.binding = *binding,
		.regions = m->ram->regions,
		.n_regions = m->ram->n_blocks,
		.n_lanes = conn->n_lanes,
		.timeout_ms = (guint)pr_param(m->params, PR_PARAM_HANDSHAKE_TIMEOUT),
		.cancel = conn->cancel,
		.on_failed = path_failed,
		.allocate = pr_destination_allocate,
		.allocate_opaque = m,
		.opaque = conn,
	};
}

/* PrControlEarly. The load thread may be waiting for a guest that waits for what is told here. */
static gboolean take_early(const PrMsg *msg, void *opaque)
{
	switch (msg->type) {
	case PR_CMD_HASHES:
		return pr_hashes_take(opaque, msg, NULL);
	case PR_CMD_GRANT:
	case PR_CMD_RAM_ZERO:
		return pr_live_grants_handle(opaque, msg);
	default:
		return FALSE;
	}
}

static gboolean start_control(PrConn *conn, GError **error)
{
	const PrParams *params = conn->m->params;

	pr_control_set_early(conn->control, take_early, conn);
	pr_control_set_watchdog(conn->control, conn->m->watchdog);
	return pr_control_start(conn->control, (guint)pr_param(params, PR_PARAM_HEARTBEAT_INTERVAL),
				(guint)pr_param(params, PR_PARAM_HEARTBEAT_TIMEOUT), pr_conn_failed,
				conn, error);
}

/* With the lock held: whether there is still a use for it. */
static gboolean may_go_on(PrConn *conn, GError **error)
{
	if (conn->failure)
		g_propagate_error(error, g_error_copy(conn->failure));
	else if (!conn->standby && conn->m->failure)
		pr_migration_copy_failure(conn->m, error);
	else
		return TRUE;
	return FALSE;
}

gboolean pr_conn_publish(PrConn *conn, GError **error)
{
	PrMigration *m = conn->m;

	g_mutex_lock(&m->lock);
	gboolean go_on = may_go_on(conn, error);
	if (go_on)
		m->conn = conn;
	g_mutex_unlock(&m->lock);
	if (!go_on || start_control(conn, error))
		return go_on;
	g_mutex_lock(&m->lock);
	if (m->conn == conn)
		pr_session_detach_conn(m);
	g_mutex_unlock(&m->lock);
	return FALSE;
}

gboolean pr_conn_adopt(PrConn *conn, GError **error)
{
	PrMigration *m = conn->m;

	g_mutex_lock(&m->lock);
	gboolean go_on = may_go_on(conn, error);
	if (go_on) {
		m->conn = conn;
		pr_path_step(m, conn->name, PR_HEALTH_ACTIVATED, "in use");
	}
	g_mutex_unlock(&m->lock);
	pr_session_flush_events(m);
	return go_on;
}

gboolean pr_conn_stand_by(PrConn *conn, GError **error)
{
	PrMigration *m = conn->m;

	g_mutex_lock(&m->lock);
	gboolean wanted = !m->quit && pr_state_is_postcopy(m->sm.state);
	if (wanted) {
		conn->standby = TRUE;
		g_ptr_array_add(m->standbys, conn);
	} else {
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_LOCAL_REQUEST,
			    "the migration is %s", pr_state_name(m->sm.state));
	}
	g_mutex_unlock(&m->lock);
	if (!wanted || start_control(conn, error))
		return wanted;
	g_mutex_lock(&m->lock);
	if (conn->standby)
		pr_conn_unlist(conn);
	g_mutex_unlock(&m->lock);
	return FALSE;
}

void pr_conn_unlist(PrConn *conn)
{
	conn->standby = FALSE;
	g_ptr_array_remove(conn->m->standbys, conn);
	g_cond_broadcast(&conn->m->changed);
}

gboolean pr_conn_set_path(PrConn *conn, PrDataPath *path, GError **error)
{
	PrMigration *m = conn->m;

	g_mutex_lock(&m->lock);
	conn->path = path;
	gboolean go_on = may_go_on(conn, error);
	pr_path_set_device(m, conn->name, path);
	if (go_on && !conn->standby)
		pr_path_step(m, conn->name, PR_HEALTH_ACTIVATED, "connected");
	g_mutex_unlock(&m->lock);
	pr_session_flush_events(m);
	return go_on;
}

void pr_conn_failed_locked(PrConn *conn, const GError *error)
{
	PrMigration *m = conn->m;

	if (m->conn == conn) {
		pr_migration_failed_locked(m, error);
	} else if (!conn->failure) {
		/* A standby, or one that is not in use yet: whoever has it looks here. */
		conn->failure = g_error_copy(error);
		pr_conn_shutdown(conn);
		g_cond_broadcast(&m->changed);
	}
}

void pr_conn_failed(const GError *error, void *opaque)
{
	PrConn *conn = opaque;
	PrMigration *m = conn->m;

	g_mutex_lock(&m->lock);
	pr_conn_failed_locked(conn, error);
	g_mutex_unlock(&m->lock);
	pr_session_flush_events(m);
}

void pr_conn_shutdown(PrConn *conn)
{
	g_autoptr(GError) closing = g_error_new_literal(PR_PATH_ERROR, PR_PATH_ERROR_LOST,
							"the connection is being closed");

	pr_control_shutdown(conn->control, closing);
	if (conn->path)
		conn->path->ops->shutdown(conn->path);
}

/* Memory has to be unpinned, the peer's last words are waited for: nobody needs to wait for that. */
static gpointer free_thread(gpointer opaque)
{
	PrConn *conn = opaque;
	PrMigration *m = conn->m;

	pr_conn_free(conn);
	pr_migration_thread_ends(m);
	return NULL;
}

void pr_conn_close(PrConn *conn)
{
	PrMigration *m = conn->m;

	pr_conn_shutdown(conn);
	if (conn->return_path)
		g_thread_join(conn->return_path);
	pr_rail_stop(conn);

	g_mutex_lock(&m->lock);
	if (m->conn == conn) {
		pr_session_detach_conn(m);
		pr_path_step(m, conn->name, PR_HEALTH_CLOSED, "not in use any more");
	}
	if (conn->standby)
		pr_conn_unlist(conn);
	/* What its threads still report is too late: what they would shut down is being freed. */
	if (!conn->failure)
		conn->failure =
			g_error_new_literal(PR_PATH_ERROR, PR_PATH_ERROR_LOCAL_REQUEST, "closed");
	g_mutex_unlock(&m->lock);
	pr_session_flush_events(m);

	if (conn->path && !conn->path->ops->drain(conn->path, DRAIN_MS)) {
		g_warning("path %s: not every READ came back within %d ms; destroying it",
			  conn->name, DRAIN_MS);
		/* That is the fence then, however long it takes. */
		pr_data_path_destroy(g_steal_pointer(&conn->path));
	}
	pr_rail_reclaim(conn);
	pr_migration_spawn(m, "closing", free_thread, conn);
}

/* ---- threads that end by themselves ---- */

void pr_migration_spawn(PrMigration *m, const char *name, GThreadFunc func, gpointer opaque)
{
	g_mutex_lock(&m->lock);
	m->n_threads++;
	g_mutex_unlock(&m->lock);
	GThread *thread = g_thread_try_new(name, func, opaque, NULL);
	if (thread)
		g_thread_unref(thread);
	else
		func(opaque); /* what nobody needs to wait for is waited for */
}

void pr_migration_thread_ends(PrMigration *m)
{
	g_mutex_lock(&m->lock);
	m->n_threads--;
	g_cond_broadcast(&m->changed);
	g_mutex_unlock(&m->lock);
}

/* With the lock held. */
static void end_standbys(PrMigration *m)
{
	for (guint i = 0; i < m->standbys->len; i++) {
		PrConn *conn = g_ptr_array_index(m->standbys, i);

		if (!conn->failure)
			conn->failure =
				g_error_new_literal(PR_PATH_ERROR, PR_PATH_ERROR_LOCAL_REQUEST,
						    "no standby is needed any more");
		g_cancellable_cancel(conn->cancel);
		pr_conn_shutdown(conn);
	}
	g_cond_broadcast(&m->changed);
}

void pr_migration_await_threads(PrMigration *m)
{
	g_mutex_lock(&m->lock);
	end_standbys(m);
	/* Ended by those threads, whose connections were just shut down. */
	while (m->n_threads > 0)
		g_cond_wait(&m->changed, &m->lock);
	g_mutex_unlock(&m->lock);
}
