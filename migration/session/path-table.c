/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/session/path-table.h"

#include <string.h>

#include "guest/guest.h"

static void record_free(gpointer data)
{
	PrPathRecord *record = data;

	g_free(record->name);
	g_free(record->device);
	g_free(record->last_error);
	g_free(record);
}

void pr_path_table_init(PrPathTable *self, PrEvents *events, GCond *changed)
{
	self->records = g_ptr_array_new_with_free_func(record_free);
	self->events = events;
	self->changed = changed;
}

void pr_path_table_clear(PrPathTable *self)
{
	g_clear_pointer(&self->records, g_ptr_array_unref);
}

PrPathRecord *pr_path_record(PrPathTable *self, const char *name)
{
	for (guint i = 0; i < self->records->len; i++) {
		PrPathRecord *record = g_ptr_array_index(self->records, i);

		if (strcmp(record->name, name) == 0)
			return record;
	}
	PrPathRecord *record = g_new0(PrPathRecord, 1);
	record->name = g_strdup(name);
	record->health.since = g_get_monotonic_time();
	g_ptr_array_add(self->records, record);
	return record;
}

uint64_t pr_path_bytes(const PrPathRecord *record)
{
	return __atomic_load_n(&record->bytes, __ATOMIC_RELAXED);
}

void pr_path_step(PrPathTable *self, const char *name, PrHealthEvent event, const char *reason)
{
	PrPathRecord *record = pr_path_record(self, name);
	PrPathState old = record->health.state;

	if (event == PR_HEALTH_FAILED) {
		g_free(record->last_error);
		record->last_error = g_strdup(reason);
	}
	if (!pr_health_step(&record->health, event, g_get_monotonic_time()))
		return;
	g_info("path %s: %s -> %s (%s)", name, pr_path_state_name(old),
	       pr_path_state_name(record->health.state), reason);
	pr_events_queue_path(self->events, name, record->health.state, record->device, reason);
	g_cond_broadcast(self->changed);
}

void pr_path_ended(PrPathTable *self, const char *name, const GError *error)
{
	gboolean blameless =
		g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_LOCAL_REQUEST) ||
		g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_PAUSED_BY_OPERATOR) ||
		g_error_matches(error, G_IO_ERROR, G_IO_ERROR_CANCELLED) ||
		error->domain == PR_GUEST_ERROR;

	pr_path_step(self, name, blameless ? PR_HEALTH_CLOSED : PR_HEALTH_FAILED, error->message);
}

void pr_path_set_device(PrPathTable *self, const char *name, PrDataPath *path)
{
	PrPathRecord *record = pr_path_record(self, name);

	g_free(record->device);
	record->device = g_strdup(path->ops->device(path));
}
