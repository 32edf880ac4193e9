/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What pr_migration_query() tells: a snapshot under the lock. */
#include <string.h>

#include "migration/session/session.h"

/* A VMM has to be asked before any of its threads can wait for a page. Without an answer there are fewer
 * statistics, and nothing else is lost. */
void pr_migration_begin_times(PrMigration *m)
{
	g_autoptr(GError) error = NULL;
	g_autoptr(GArray) vcpus = m->guest->ops->vcpu_threads(m->guest, &error);
	PrBlocktime *times, *old;

	if (!vcpus)
		g_info("no blocktime of vCPUs: %s", error->message);
	times = pr_blocktime_new(vcpus ? (uint32_t *)vcpus->data : NULL, vcpus ? vcpus->len : 0);
	g_mutex_lock(&m->lock);
	old = m->times;
	m->times = times;
	g_mutex_unlock(&m->lock);
	pr_blocktime_free(old);
	if (vcpus)
		pr_state_memfd_set_vcpus(m->ram->state_memfd, (uint32_t *)vcpus->data, vcpus->len);
}

/* Bytes of guest RAM that travelled so far. */
uint64_t pr_migration_transferred(PrMigration *m)
{
	if (m->sm.role == PR_ROLE_DESTINATION)
		return m->ram ? pr_ram_received_bytes(m->ram) - pr_ram_zero_bytes(m->ram) : 0;
	return m->progress.postcopy_bytes;
}

void pr_migration_sample_rate(PrMigration *m, uint64_t bytes, gint64 now)
{
	guint last = (m->rate_next + PR_RATE_SAMPLES - 1) % PR_RATE_SAMPLES;

	if (m->rate_time[last] != 0 && now - m->rate_time[last] < G_USEC_PER_SEC / 12)
		return;
	m->rate_time[m->rate_next] = now;
	m->rate_bytes[m->rate_next] = bytes;
	m->rate_next = (m->rate_next + 1) % PR_RATE_SAMPLES;
}

/* Bytes a second over the samples of the last second or so. */
static double rate(PrMigration *m, uint64_t bytes, gint64 now)
{
	for (guint i = 0; i < PR_RATE_SAMPLES; i++) {
		guint at = (m->rate_next + i) % PR_RATE_SAMPLES;
		gint64 age = now - m->rate_time[at];
		if (m->rate_time[at] == 0 || age > 1500 * 1000 || m->rate_bytes[at] > bytes)
			continue;
		return age > 0 ? (double)(bytes - m->rate_bytes[at]) * G_USEC_PER_SEC / (double)age
			       : 0;
	}
	return 0;
}

static uint64_t ms_between(gint64 from, gint64 to)
{
	return from != 0 && to > from ? (uint64_t)(to - from) / 1000 : 0;
}

static void query_times(PrMigration *m, PrMigrationInfo *ret, gint64 now)
{
	const PrStateMachine *sm = &m->sm;
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
	gboolean here = m->sm.role == PR_ROLE_DESTINATION;
	uint64_t zero;

	ret->page_size = PR_TARGET_PAGE;
	if (!m->ram)
		return;
	ret->total = m->ram->total_bytes;
	ret->transferred = pr_migration_transferred(m);
	if (here) {
		zero = pr_ram_zero_bytes(m->ram) / PR_TARGET_PAGE;
		ret->remaining = m->ram->total_bytes - pr_ram_received_bytes(m->ram);
		ret->postcopy_requests = m->fault_stats.requests;
	} else {
		zero = m->progress.zero_pages;
		ret->remaining =
			m->progress.received_pages ? m->progress.remaining : m->ram->total_bytes;
		ret->postcopy_requests = m->progress.postcopy_requests;
	}
	ret->duplicate = zero;
	ret->normal = ret->transferred / PR_TARGET_PAGE;
	if (m->sm.state == PR_STATE_POSTCOPY_ACTIVE) {
		double bytes = rate(m, ret->transferred, now);
		ret->mbps = bytes * 8 / 1e6;
		ret->expected_ms =
			bytes > 0 ? (uint64_t)((double)ret->remaining * 1000 / bytes) : 0;
	}
}

static void query_faults(PrMigration *m, PrMigrationInfo *ret, gint64 now_us)
{
	if (m->faults)
		pr_fault_stats(m->faults, &m->fault_stats);
	const PrFaultStats *stats = &m->fault_stats;

	ret->faults = stats->resolved;
	ret->fault_latency_ns = stats->resolved ? stats->total_ns / stats->resolved : 0;
	ret->fault_latency_max_ns = stats->max_ns;
	memcpy(ret->latency_dist, stats->dist, sizeof(ret->latency_dist));
	ret->fault_repeats = stats->repeats;
	ret->readahead_pages = stats->ahead_pages;
	ret->readahead_waited = stats->ahead_waited;
	if (m->times)
		pr_blocktime_read(m->times, now_us * 1000, &ret->blocktime);
}

static void query_verify(PrMigration *m, PrMigrationInfo *ret)
{
	if (m->verify)
		pr_verify_stats(m->verify, &m->verify_stats);
	ret->fenced = m->fence == PR_FENCE_ON;
	ret->verifies = m->verifies;
	ret->verified_pages = m->verify_stats.pages;
	ret->corrupt_reads = m->verify_stats.corrupt;
	ret->last_corrupt = g_strdup(m->last_corrupt);
}

static void path_info_free(gpointer data)
{
	PrPathInfo *info = data;

	g_free(info->uri);
	g_free(info->device);
	g_free(info->last_error);
	g_free(info);
}

static PrConn *conn_over(PrMigration *m, const char *name)
{
	if (m->conn && strcmp(m->conn->name, name) == 0)
		return m->conn;
	for (guint i = 0; i < m->standbys->len; i++) {
		PrConn *conn = g_ptr_array_index(m->standbys, i);

		if (strcmp(conn->name, name) == 0)
			return conn;
	}
	return NULL;
}

/* Bytes that have travelled on the connection in use. */
static uint64_t bytes_since_connected(PrMigration *m)
{
	uint64_t closed = 0, all = pr_migration_transferred(m);

	for (guint i = 0; i < m->records->len; i++)
		closed += pr_path_bytes(g_ptr_array_index(m->records, i));
	return all - MIN(all, closed);
}

static void query_paths(PrMigration *m, PrMigrationInfo *ret, gint64 now)
{
	ret->paths = g_ptr_array_new_with_free_func(path_info_free);
	for (guint i = 0; i < m->records->len; i++) {
		const PrPathRecord *record = g_ptr_array_index(m->records, i);
		PrConn *conn = conn_over(m, record->name);
		PrPathInfo *info = g_new0(PrPathInfo, 1);

		info->uri = g_strdup(record->name);
		info->state = record->health.state;
		info->device = g_strdup(record->device);
		info->last_error = g_strdup(record->last_error);
		info->since_ms = ms_between(record->health.since, now);
		info->rtt_us = conn ? pr_control_rtt_us(conn->control) : 0;
		info->data_rtt_us = conn ? conn->rtt_us : 0;
		info->bytes = pr_path_bytes(record);
		info->pulls = conn && (conn == m->conn || conn->pulls);
		if (conn && conn == m->conn)
			info->bytes += bytes_since_connected(m);
		ret->rails += m->conn && info->pulls;
		g_ptr_array_add(ret->paths, info);
	}
}

void pr_migration_query(PrMigration *m, PrMigrationInfo *ret)
{
	gint64 now = g_get_monotonic_time();

	memset(ret, 0, sizeof(*ret));
	g_mutex_lock(&m->lock);
	ret->role = m->sm.role;
	ret->state = m->sm.state;
	ret->reason = g_strdup(m->reason);
	ret->error_desc = g_strdup(m->error_desc);
	ret->epoch = m->binding.epoch;
	ret->pages_at_pause = m->pages_at_pause;
	const uint8_t *u = m->binding.uuid;
	g_snprintf(ret->uuid, sizeof(ret->uuid),
		   "%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", u[0],
		   u[1], u[2], u[3], u[4], u[5], u[6], u[7], u[8], u[9], u[10], u[11], u[12], u[13],
		   u[14], u[15]);
	query_faults(m, ret, now);
	query_verify(m, ret);
	if (m->sm.role != PR_ROLE_NONE)
		query_times(m, ret, now);
	query_ram(m, ret, now);
	query_paths(m, ret, now);
	g_mutex_unlock(&m->lock);
	ret->stalls = pr_watchdog_stalls(m->watchdog, &ret->last_stall);
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
