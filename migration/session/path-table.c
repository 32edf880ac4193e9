/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What is known of each path, and the news of it. Everything with the lock held. */
#include <string.h>

#include "migration/session/session.h"

PrPathRecord *pr_path_record(PrMigration *m, const char *name)
{
	for (guint i = 0; i < m->records->len; i++) {
		PrPathRecord *record = g_ptr_array_index(m->records, i);

		if (strcmp(record->name, name) == 0)
			return record;
	}
	PrPathRecord *record = g_new0(PrPathRecord, 1);
	record->name = g_strdup(name);
	record->health.since = g_get_monotonic_time();
	g_ptr_array_add(m->records, record);
	return record;
}

void pr_path_record_free(gpointer data)
{
	PrPathRecord *record = data;

	g_free(record->name);
	g_free(record->device);
	g_free(record->last_error);
	g_free(record);
}

uint64_t pr_path_bytes(const PrPathRecord *record)
{
	return __atomic_load_n(&record->bytes, __ATOMIC_RELAXED);
}

void pr_path_step(PrMigration *m, const char *name, PrHealthEvent event, const char *reason)
{
	PrPathRecord *record = pr_path_record(m, name);
	PrPathState old = record->health.state;

	if (event == PR_HEALTH_FAILED) {
		g_free(record->last_error);
		record->last_error = g_strdup(reason);
	}
	if (!pr_health_step(&record->health, event, g_get_monotonic_time()))
		return;
	g_info("path %s: %s -> %s (%s)", name, pr_path_state_name(old),
	       pr_path_state_name(record->health.state), reason);
	pr_migration_note_path(m, record, reason);
	g_cond_broadcast(&m->changed);
}

void pr_path_ended(PrMigration *m, const char *name, const GError *error)
{
	gboolean blameless = g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_LOCAL_REQUEST) ||
			     g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_HELD) ||
			     g_error_matches(error, G_IO_ERROR, G_IO_ERROR_CANCELLED) ||
			     error->domain == PR_GUEST_ERROR;

	pr_path_step(m, name, blameless ? PR_HEALTH_CLOSED : PR_HEALTH_FAILED, error->message);
}

void pr_path_set_device(PrMigration *m, const char *name, PrDataPath *path)
{
	PrPathRecord *record = pr_path_record(m, name);

	g_free(record->device);
	record->device = g_strdup(path->ops->device(path));
}
