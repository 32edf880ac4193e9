/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* pr_migration_query(): a snapshot under the lock. */
#include <string.h>

#include "migration/internal.h"
#include "transport/transport.h"

static uint64_t ms_between(gint64 from, gint64 to)
{
	return from != 0 && to > from ? (uint64_t)(to - from) / 1000 : 0;
}

static void query_times(PrSession *session, PrMigrationInfo *ret, gint64 now)
{
	const PrStateMachine *sm = &session->sm;
	gboolean paused = pr_state_is_postcopy(sm->state) && sm->state != PR_STATE_POSTCOPY_ACTIVE;
	gint64 handed_over = sm->role == PR_ROLE_DESTINATION ? sm->running : sm->loaded;

	ret->total_time = ms_between(sm->started, sm->ended ? sm->ended : now);
	ret->setup_time = ms_between(sm->started, sm->stopped ? sm->stopped : now);
	ret->downtime = ms_between(sm->stopped, handed_over ? handed_over
						: sm->ended ? sm->ended
							    : now);
	ret->pauses = sm->pauses;
	ret->recoveries = sm->recoveries;
	ret->time_paused = (uint64_t)pr_state_time_paused(sm, now) / 1000;
	ret->last_pause = (uint64_t)(paused ? now - sm->paused : sm->last_pause) / 1000;
	ret->last_recovery = (uint64_t)sm->last_recovery / 1000;
}

static void query_ram(PrMigration *m, PrMigrationInfo *ret, gint64 now)
{
	PrSession *session = &m->session;
	gboolean here = session->sm.role == PR_ROLE_DESTINATION;
	uint64_t zero;

	ret->page_size = PR_TARGET_PAGE;
	if (!session->ram)
		return;
	ret->total = session->ram->total_bytes;
	ret->transferred = pr_session_transferred(session);
	if (here) {
		zero = pr_ram_zero_bytes(session->ram) / PR_TARGET_PAGE;
		ret->remaining = session->ram->total_bytes - pr_ram_received_bytes(session->ram);
		ret->postcopy_requests = m->destination.fault_stats.requests;
	} else {
		zero = session->progress.zero_pages;
		ret->remaining = session->progress.received_pages ? session->progress.remaining
								  : session->ram->total_bytes;
		ret->postcopy_requests = session->progress.postcopy_requests;
	}
	ret->duplicate = zero;
	ret->normal = ret->transferred / PR_TARGET_PAGE;
	if (session->sm.state == PR_STATE_POSTCOPY_ACTIVE) {
		double bytes = pr_session_rate(session, ret->transferred, now);
		ret->mbps = bytes * 8 / 1e6;
		ret->expected_ms =
			bytes > 0 ? (uint64_t)((double)ret->remaining * 1000 / bytes) : 0;
	}
}

static void query_faults(PrDestination *destination, PrMigrationInfo *ret, gint64 now_us)
{
	if (destination->faults)
		pr_fault_stats(destination->faults, &destination->fault_stats);
	const PrFaultStats *stats = &destination->fault_stats;

	ret->faults = stats->resolved;
	ret->fault_latency_ns = stats->resolved ? stats->total_ns / stats->resolved : 0;
	ret->fault_latency_max_ns = stats->max_ns;
	memcpy(ret->latency_dist, stats->dist, sizeof(ret->latency_dist));
	ret->fault_repeats = stats->repeats;
	ret->readahead_pages = stats->ahead_pages;
	ret->readahead_waited = stats->ahead_waited;
	if (destination->times)
		pr_blocktime_read(destination->times, now_us * 1000, &ret->blocktime);
}

static void query_verify(PrDestination *destination, PrMigrationInfo *ret)
{
	const PrSession *session = destination->session;

	if (destination->verify)
		pr_verify_stats(destination->verify, &destination->verify_stats);
	ret->fenced = session->fence.state == PR_FENCE_ON;
	ret->verifies = session->verifies;
	ret->verified_pages = destination->verify_stats.pages;
	ret->corrupt_reads = destination->verify_stats.corrupt;
	ret->last_corrupt = g_strdup(destination->last_corrupt);
}

static void path_info_free(gpointer data)
{
	PrPathInfo *info = data;

	g_free(info->uri);
	g_free(info->device);
	g_free(info->last_error);
	g_free(info);
}

static PrConn *conn_over(PrSession *session, const char *name)
{
	if (session->conn && strcmp(session->conn->name, name) == 0)
		return session->conn;
	for (guint i = 0; i < session->standbys->len; i++) {
		PrConn *conn = g_ptr_array_index(session->standbys, i);

		if (strcmp(conn->name, name) == 0)
			return conn;
	}
	return NULL;
}

/* Bytes that have travelled on the connection in use. */
static uint64_t bytes_since_connected(PrSession *session)
{
	uint64_t closed = 0, all = pr_session_transferred(session);

	for (guint i = 0; i < session->paths.records->len; i++)
		closed += pr_path_bytes(g_ptr_array_index(session->paths.records, i));
	return all - MIN(all, closed);
}

static void query_paths(PrSession *session, PrMigrationInfo *ret, gint64 now)
{
	ret->paths = g_ptr_array_new_with_free_func(path_info_free);
	for (guint i = 0; i < session->paths.records->len; i++) {
		const PrPathRecord *record = g_ptr_array_index(session->paths.records, i);
		PrConn *conn = conn_over(session, record->name);
		PrPathInfo *info = g_new0(PrPathInfo, 1);

		info->uri = g_strdup(record->name);
		info->state = record->health.state;
		info->device = g_strdup(record->device);
		info->last_error = g_strdup(record->last_error);
		info->since_ms = ms_between(record->health.since, now);
		info->rtt_us = conn ? pr_control_rtt_us(conn->control) : 0;
		info->data_rtt_us = conn ? conn->rtt_us : 0;
		info->bytes = pr_path_bytes(record);
		info->pulls = conn && (conn == session->conn || conn->pulls);
		if (conn && conn == session->conn)
			info->bytes += bytes_since_connected(session);
		ret->rails += session->conn && info->pulls;
		g_ptr_array_add(ret->paths, info);
	}
}

void pr_migration_query(PrMigration *m, PrMigrationInfo *ret)
{
	PrSession *session = &m->session;
	gint64 now = g_get_monotonic_time();

	memset(ret, 0, sizeof(*ret));
	pr_session_lock(session);
	ret->role = session->sm.role;
	ret->state = session->sm.state;
	ret->reason = g_strdup(session->reason);
	ret->error_desc = g_strdup(session->error_desc);
	ret->epoch = session->binding.epoch;
	ret->pages_at_pause = session->pages_at_pause;
	const uint8_t *u = session->binding.uuid;
	g_snprintf(ret->uuid, sizeof(ret->uuid),
		   "%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", u[0],
		   u[1], u[2], u[3], u[4], u[5], u[6], u[7], u[8], u[9], u[10], u[11], u[12], u[13],
		   u[14], u[15]);
	query_faults(&m->destination, ret, now);
	query_verify(&m->destination, ret);
	if (session->sm.role != PR_ROLE_NONE)
		query_times(session, ret, now);
	query_ram(m, ret, now);
	query_paths(session, ret, now);
	pr_session_unlock(session);
	ret->stalls = pr_watchdog_stalls(session->watchdog, &ret->last_stall);
}

void pr_migration_info_clear(PrMigrationInfo *info)
{
	g_free(info->reason);
	g_free(info->error_desc);
	g_free(info->last_stall);
	g_free(info->last_corrupt);
	g_clear_pointer(&info->paths, g_ptr_array_unref);
	g_clear_pointer(&info->blocktime.threads, g_array_unref);
	memset(info, 0, sizeof(*info));
}
