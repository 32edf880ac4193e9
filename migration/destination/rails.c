/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Several rails
 *
 * The destination pulls over its fit standbys at the same time as over the path in use, when they are of the same
 * transport (a plain socket that is listed as a last resort is no rail) and capability multi-rail is on. Faults are
 * served over the path in use alone. A standby that pulls stays a standby in everything else: its control channel
 * and its urgent lanes, which are probed, are its thread's (standby.c); its bulk lane is its stripe's (pull.c).
 *
 * The thread that has the standby begins its stripe after a probe was answered, and ends it before it gives the
 * connection away or closes it:
 *  - to be activated, or because nothing is to be pulled there now: the stripe posts no more, and what it has posted
 *    comes in, within heartbeat-timeout; else the path is dead.
 *  - lost: the stripe lets go at once, the path is fenced, then the claims of its READs are forgotten and whoever
 *    wants the pages is woken. The path in use and the other stripes go on all the while.
 * When the path in use is lost, stripes post no more until there is another one; their READs land as ever (pull.c).
 *
 * So a late READ harms nobody: its pages are claimed until it has landed or its own path is fenced, whatever becomes
 * of the path in use and of the epoch in between.
 */
#include "migration/session/session.h"

/* With pull_lock held. */
static PrPull *pull_of(PrMigration *m)
{
	g_mutex_lock(&m->lock);
	PrPull *pull = m->pull;
	g_mutex_unlock(&m->lock);
	return pull;
}

static void set_rail(PrConn *conn, guint id)
{
	PrMigration *m = conn->m;

	g_mutex_lock(&m->lock);
	conn->stripe = id;
	conn->pulls = id != 0;
	g_mutex_unlock(&m->lock);
}

/* Whether its path is fit, and where to count what it carries. */
static gboolean is_fit(PrConn *conn, uint64_t **ret_bytes)
{
	PrMigration *m = conn->m;

	g_mutex_lock(&m->lock);
	PrPathRecord *record = pr_path_record(m, conn->name);
	gboolean fit = conn->standby && !conn->failure && conn->granted &&
		       record->health.state == PR_PATH_STANDBY;
	g_mutex_unlock(&m->lock);
	*ret_bytes = &record->bytes;
	return fit;
}

void pr_rail_begin(PrConn *conn)
{
	PrMigration *m = conn->m;
	uint64_t *bytes;

	if (conn->stripe || !is_fit(conn, &bytes))
		return;
	g_mutex_lock(&m->pull_lock);
	PrPull *pull = pull_of(m);
	if (pull && pr_pull_wants_rail(pull, conn->path)) {
		g_autoptr(GError) error = NULL;
		guint id = pr_pull_add_rail(pull, conn->path, bytes, &error);

		if (id != 0) {
			set_rail(conn, id);
			g_info("path %s: pulls, too", conn->name);
		} else {
			g_info("path %s: can't pull along: %s", conn->name, error->message);
		}
	}
	g_mutex_unlock(&m->pull_lock);
}

gboolean pr_rail_drain(PrConn *conn, GError **error)
{
	PrMigration *m = conn->m;
	gint64 deadline = g_get_monotonic_time() +
			  (gint64)pr_param(m->params, PR_PARAM_HEARTBEAT_TIMEOUT) * 1000;

	if (!conn->stripe)
		return TRUE;
	/* Others must not wait as long. */
	g_mutex_lock(&m->pull_lock);
	g_autoptr(PrPull) pull = pull_of(m);
	if (pull)
		pr_pull_ref(pull);
	g_mutex_unlock(&m->pull_lock);
	gboolean rested = !pull || pr_pull_drain_rail(pull, conn->stripe, deadline);
	if (rested) {
		pr_rail_stop(conn);
		pr_rail_reclaim(conn);
	}
	if (!rested)
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_SILENT,
			    "path %s: pages that are to come over it do not come", conn->name);
	return rested;
}

gboolean pr_rail_review(PrConn *conn, GError **error)
{
	PrMigration *m = conn->m;
	gint64 within_us = (gint64)pr_param(m->params, PR_PARAM_HEARTBEAT_TIMEOUT) * 1000;

	if (!conn->stripe)
		return TRUE;
	g_mutex_lock(&m->pull_lock);
	PrPull *pull = pull_of(m);
	gboolean wanted = pull && pr_pull_wants_rail(pull, conn->path);
	gboolean moves = !pull || pr_pull_rail_moves(pull, conn->stripe, within_us);
	g_mutex_unlock(&m->pull_lock);
	if (!moves)
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_SILENT,
			    "path %s: the bulk lane does not answer", conn->name);
	return moves && (wanted || pr_rail_drain(conn, error));
}

void pr_rail_stop(PrConn *conn)
{
	PrMigration *m = conn->m;

	if (!conn->stripe)
		return;
	g_mutex_lock(&m->pull_lock);
	PrPull *pull = pull_of(m);
	if (pull)
		pr_pull_end_rail(pull, conn->stripe);
	g_mutex_unlock(&m->pull_lock);
}

void pr_rail_reclaim(PrConn *conn)
{
	PrMigration *m = conn->m;

	if (!conn->stripe)
		return;
	g_mutex_lock(&m->pull_lock);
	PrPull *pull = pull_of(m);
	if (pull)
		pr_pull_reclaim_rail(pull, conn->stripe);
	set_rail(conn, 0);
	g_mutex_unlock(&m->pull_lock);
}

/* ---- what the source hears of it ---- */

gboolean pr_rail_send_rails(PrMigration *m, PrConn *conn, GError **error)
{
	g_autoptr(GByteArray) body = g_byte_array_new();
	PrRail rails[PR_RAILS_MAX];
	guint n;

	g_mutex_lock(&m->lock);
	n = MIN(m->standbys->len, PR_RAILS_MAX);
	for (guint i = 0; i < n; i++) {
		const PrConn *standby = m->standbys->pdata[i];
		rails[i] = (PrRail){
			.epoch = standby->lanes_epoch,
			.bytes = pr_path_bytes(pr_path_record(m, standby->name)),
			.pulls = standby->pulls,
		};
	}
	g_mutex_unlock(&m->lock);
	if (n == 0)
		return TRUE;
	pr_rails_encode(body, rails, n);
	return pr_send(conn, PR_RP_RAILS, body, error);
}

/* With the lock held. */
static void note_rail(PrMigration *m, const PrRail *rail)
{
	for (guint i = 0; i < m->standbys->len; i++) {
		PrConn *conn = m->standbys->pdata[i];

		if (conn->lanes_epoch != rail->epoch)
			continue;
		conn->pulls = rail->pulls;
		__atomic_store_n(&pr_path_record(m, conn->name)->bytes, rail->bytes,
				 __ATOMIC_RELAXED);
	}
}

gboolean pr_rail_take_rails(PrMigration *m, const PrMsg *msg, GError **error)
{
	g_autofree PrRail *rails = NULL;
	guint n;

	if (!pr_rails_decode(msg->body, msg->length, &rails, &n, error))
		return FALSE;
	g_mutex_lock(&m->lock);
	for (guint i = 0; i < n; i++)
		note_rail(m, &rails[i]);
	g_mutex_unlock(&m->lock);
	return TRUE;
}
