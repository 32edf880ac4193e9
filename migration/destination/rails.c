/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Several rails
 *
 * The destination pulls over its fit standbys at the same time as over the path in use, when they
 * are of the same transport (a plain socket that is listed as a last resort is no rail) and
 * capability multi-rail is on. Faults are served over the path in use alone. A standby that is a
 * rail stays a standby in everything else: its thread has the control channel and the urgent lanes,
 * which are probed (standby.c). The rail's pull thread has the bulk lane (pull.c).
 *
 * The standby's thread begins the rail after a probe was answered. It ends the rail before it
 * leaves the connection to the owner, or closes it:
 *  - to be activated, or because nothing is to be pulled there: the rail posts no more, and the
 *    READs that it has posted come back within heartbeat-timeout. Otherwise the path is dead.
 *  - the path is lost: the rail stops at once, the path is fenced, then the claims of its READs are
 *    freed and the threads that wait for these pages are woken. The path in use and the other rails
 *    go on meanwhile. When the path in use is lost, rails post no more until there is another one;
 *    their READs land as before (pull.c).
 *
 * So a late READ does no harm: its pages are claimed until it has landed or its own path is fenced,
 * whatever happens to the path in use and to the epoch in between.
 */
#include "migration/destination/rails.h"

#include "migration/session/messages.h"

/* With pull_lock held, under which no event may be reported. */
static PrPull *pull_of(PrDestination *destination)
{
	GMutex *lock = &destination->session->lock;

	g_mutex_lock(lock);
	PrPull *pull = destination->pull;
	g_mutex_unlock(lock);
	return pull;
}

/* With pull_lock held. */
static void set_rail(PrConn *conn, guint id)
{
	GMutex *lock = &conn->session->lock;

	g_mutex_lock(lock);
	conn->rail = id;
	conn->pulls = id != 0;
	g_mutex_unlock(lock);
}

/* Whether its path is fit, and where to count what it carries. */
static gboolean is_fit(PrConn *conn, uint64_t **ret_bytes)
{
	PrSession *session = conn->session;

	pr_session_lock(session);
	PrPathRecord *record = pr_path_record(&session->paths, conn->name);
	gboolean fit = conn->standby && !conn->failure && conn->granted &&
		       record->health.state == PR_PATH_STANDBY;
	pr_session_unlock(session);
	*ret_bytes = &record->bytes;
	return fit;
}

void pr_rail_begin(PrConn *conn)
{
	PrDestination *destination = pr_conn_destination(conn);
	uint64_t *bytes;

	if (conn->rail || !is_fit(conn, &bytes))
		return;
	g_mutex_lock(&destination->pull_lock);
	PrPull *pull = pull_of(destination);
	if (pull && pr_pull_wants_rail(pull, conn->path)) {
		g_autoptr(GError) error = NULL;
		guint id = pr_pull_add_rail(pull, conn->path, bytes, &error);

		if (id != 0) {
			set_rail(conn, id);
			g_info("path %s: joins the bulk pull", conn->name);
		} else {
			g_info("path %s: can't join the bulk pull: %s", conn->name, error->message);
		}
	}
	g_mutex_unlock(&destination->pull_lock);
}

gboolean pr_rail_drain(PrConn *conn, GError **error)
{
	PrDestination *destination = pr_conn_destination(conn);
	gint64 deadline =
		g_get_monotonic_time() +
		(gint64)pr_param(conn->session->params, PR_PARAM_HEARTBEAT_TIMEOUT) * 1000;

	if (!conn->rail)
		return TRUE;
	/* Draining takes long, so it is done without pull_lock. */
	g_mutex_lock(&destination->pull_lock);
	g_autoptr(PrPull) pull = pull_of(destination);
	if (pull)
		pr_pull_ref(pull);
	g_mutex_unlock(&destination->pull_lock);
	if (pull && !pr_pull_drain_rail(pull, conn->rail, deadline)) {
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_SILENT,
			    "path %s: pages that were asked for over it do not come", conn->name);
		return FALSE;
	}
	pr_rail_stop(conn);
	pr_rail_reclaim(conn);
	return TRUE;
}

gboolean pr_rail_review(PrConn *conn, GError **error)
{
	PrDestination *destination = pr_conn_destination(conn);
	gint64 within_us =
		(gint64)pr_param(conn->session->params, PR_PARAM_HEARTBEAT_TIMEOUT) * 1000;

	if (!conn->rail)
		return TRUE;
	g_mutex_lock(&destination->pull_lock);
	PrPull *pull = pull_of(destination);
	gboolean wanted = pull && pr_pull_wants_rail(pull, conn->path);
	gboolean moves = !pull || pr_pull_rail_moves(pull, conn->rail, within_us);
	g_mutex_unlock(&destination->pull_lock);
	if (!moves)
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_SILENT,
			    "path %s: the bulk lane does not answer", conn->name);
	return moves && (wanted || pr_rail_drain(conn, error));
}

void pr_rail_stop(PrConn *conn)
{
	PrDestination *destination = pr_conn_destination(conn);

	if (!conn->rail)
		return;
	g_mutex_lock(&destination->pull_lock);
	PrPull *pull = pull_of(destination);
	if (pull)
		pr_pull_end_rail(pull, conn->rail);
	g_mutex_unlock(&destination->pull_lock);
}

void pr_rail_reclaim(PrConn *conn)
{
	PrDestination *destination = pr_conn_destination(conn);

	if (!conn->rail)
		return;
	g_mutex_lock(&destination->pull_lock);
	PrPull *pull = pull_of(destination);
	if (pull)
		pr_pull_reclaim_rail(pull, conn->rail);
	set_rail(conn, 0);
	g_mutex_unlock(&destination->pull_lock);
}

gboolean pr_destination_send_rails(PrConn *conn, GError **error)
{
	PrSession *session = conn->session;
	g_autoptr(GByteArray) body = g_byte_array_new();
	PrRail rails[PR_RAILS_MAX];

	pr_session_lock(session);
	guint n = MIN(session->standbys->len, PR_RAILS_MAX);
	for (guint i = 0; i < n; i++) {
		const PrConn *standby = session->standbys->pdata[i];
		const PrPathRecord *record = pr_path_record(&session->paths, standby->name);

		rails[i] = (PrRail){
			.epoch = standby->lanes_epoch,
			.bytes = pr_path_bytes(record),
			.pulls = standby->pulls,
		};
	}
	pr_session_unlock(session);
	if (n == 0)
		return TRUE;
	pr_rails_encode(body, rails, n);
	return pr_send(conn, PR_RP_RAILS, body, error);
}
