/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "monitor/monitor.h"

#include "monitor/async-command.h"
#include "monitor/hmp.h"
#include "monitor/internal.h"
#include "monitor/qmp.h"

/* A state change of the migration or of a path, queued by an engine thread for the main loop. */
typedef struct PrStateEvent {
	PrState state;
	char *path; /* NULL: a change of state */
	PrPathState path_state;
	char *device;
	char *reason;
	gint64 time; /* us since the epoch, when it happened */
	guint64 number;
} PrStateEvent;

static void state_event_free(PrStateEvent *event)
{
	g_free(event->path);
	g_free(event->device);
	g_free(event->reason);
	g_free(event);
}
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrStateEvent, state_event_free)

PrMonitor *pr_monitor_new(PrParams *params, GMainContext *context, PrMonitorQuit on_quit,
			  void *opaque)
{
	PrMonitor *monitor = g_new0(PrMonitor, 1);

	monitor->context = g_main_context_ref(context);
	monitor->params = params;
	monitor->on_quit = on_quit;
	monitor->opaque = opaque;
	monitor->sessions = g_ptr_array_new_with_free_func((GDestroyNotify)pr_hmp_session_free);
	monitor->waits = g_ptr_array_new();
	monitor->async_commands =
		g_ptr_array_new_with_free_func((GDestroyNotify)pr_async_command_free);
	g_mutex_init(&monitor->lock);
	g_queue_init(&monitor->events);
	return monitor;
}

void pr_monitor_attach(PrMonitor *monitor, PrMigration *migration)
{
	monitor->migration = migration;
}

gboolean pr_monitor_listen(PrMonitor *monitor, const char *path, GError **error)
{
	monitor->qmp = pr_qmp_server_new(monitor, path, error);
	return monitor->qmp != NULL;
}

void pr_monitor_hmp(PrMonitor *monitor, int in_fd, int out_fd, gboolean prompt)
{
	g_ptr_array_add(monitor->sessions, pr_hmp_session_new(monitor, in_fd, out_fd, prompt));
}

static char *describe_completion(const PrMigrationInfo *info)
{
	return g_strdup_printf("completed: %" G_GUINT64_FORMAT " KiB in %" G_GUINT64_FORMAT
			       " ms, downtime %" G_GUINT64_FORMAT " ms\n",
			       info->transferred / 1024, info->total_time, info->downtime);
}

/* The failure's cause comes first; the last change's reason says on which side the guest is now. */
static GError *describe_end(const PrStateEvent *event, const PrMigrationInfo *info)
{
	const char *reason = event->reason ? event->reason : "no reason given";

	if (event->state == PR_STATE_POSTCOPY_PAUSED)
		return g_error_new(PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_STATE,
				   "the migration is paused: %s; resume it with: migrate -r URI",
				   reason);
	if (event->state == PR_STATE_CANCELLED)
		return g_error_new(PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_CANCELLED,
				   "the migration has been cancelled: %s", reason);
	return g_error_new(PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_STATE,
			   "the migration has failed: %s%s%s",
			   info->error_desc ? info->error_desc : "", info->error_desc ? "; " : "",
			   reason);
}

/* Frees the wait, then answers. */
static void answer_wait(PrWait *wait, const PrStateEvent *event)
{
	g_auto(PrMigrationInfo) info = {0};
	g_autoptr(GError) error = NULL;
	g_autofree char *text = NULL;
	PrAnswer answer = wait->answer;
	void *opaque = wait->opaque;

	pr_migration_query(wait->monitor->migration, &info);
	pr_monitor_unwait(wait);
	if (event->state == PR_STATE_COMPLETED)
		text = describe_completion(&info);
	else
		error = describe_end(event, &info);
	answer(text, error, opaque);
}

static gboolean is_end(PrState state)
{
	return state == PR_STATE_COMPLETED || state == PR_STATE_FAILED ||
	       state == PR_STATE_CANCELLED || state == PR_STATE_POSTCOPY_PAUSED;
}

static void serve_waits(PrMonitor *monitor, const PrStateEvent *event)
{
	/* An answer may start a new wait, which must not see this event. */
	g_autoptr(GPtrArray) due = g_ptr_array_new();

	for (guint i = 0; i < monitor->waits->len; i++) {
		PrWait *wait = g_ptr_array_index(monitor->waits, i);

		if (event->number < wait->since)
			continue;
		if (!is_end(event->state))
			wait->started = TRUE;
		else if (wait->started)
			g_ptr_array_add(due, wait);
	}
	for (guint i = 0; i < due->len; i++)
		answer_wait(g_ptr_array_index(due, i), event);
}

static void send_event(PrMonitor *monitor, const PrStateEvent *event)
{
	JsonObject *object, *timestamp, *data;

	if (!monitor->qmp || !pr_capability(monitor->params, PR_CAP_EVENTS))
		return;
	object = json_object_new();
	timestamp = json_object_new();
	data = json_object_new();
	json_object_set_int_member(timestamp, "seconds", event->time / G_USEC_PER_SEC);
	json_object_set_int_member(timestamp, "microseconds", event->time % G_USEC_PER_SEC);
	if (event->path) {
		json_object_set_string_member(data, "uri", event->path);
		json_object_set_string_member(data, "state", pr_path_state_name(event->path_state));
		if (event->device)
			json_object_set_string_member(data, "device", event->device);
	} else {
		json_object_set_string_member(data, "status", pr_state_name(event->state));
	}
	if (event->reason)
		json_object_set_string_member(data, "reason", event->reason);
	json_object_set_object_member(object, "timestamp", timestamp);
	json_object_set_string_member(object, "event",
				      event->path ? "MIGRATION_PATH" : "MIGRATION");
	json_object_set_object_member(object, "data", data);
	pr_qmp_server_event(monitor->qmp, object);
}

static PrStateEvent *next_event(PrMonitor *monitor)
{
	G_GNUC_UNUSED g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&monitor->lock);
	PrStateEvent *event = g_queue_pop_head(&monitor->events);

	if (!event)
		g_clear_pointer(&monitor->dispatch, g_source_unref);
	return event;
}

static gboolean on_dispatch(gpointer opaque)
{
	PrMonitor *monitor = opaque;

	for (;;) {
		g_autoptr(PrStateEvent) event = next_event(monitor);

		if (!event)
			return G_SOURCE_REMOVE;
		send_event(monitor, event);
		if (!event->path)
			serve_waits(monitor, event);
	}
}

/* Takes the event. */
static void queue_event(PrMonitor *monitor, PrStateEvent *event)
{
	G_GNUC_UNUSED g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&monitor->lock);

	if (monitor->closed) {
		state_event_free(event);
		return;
	}
	event->time = g_get_real_time();
	event->number = monitor->n_events++;
	g_queue_push_tail(&monitor->events, event);
	if (monitor->dispatch)
		return;
	monitor->dispatch = g_idle_source_new();
	g_source_set_priority(monitor->dispatch, G_PRIORITY_DEFAULT);
	g_source_set_callback(monitor->dispatch, on_dispatch, monitor, NULL);
	g_source_attach(monitor->dispatch, monitor->context);
}

void pr_monitor_on_state(PrState state, const char *reason, void *opaque)
{
	PrStateEvent *event = g_new0(PrStateEvent, 1);

	event->state = state;
	event->reason = g_strdup(reason);
	queue_event(opaque, event);
}

void pr_monitor_on_path(const char *uri, PrPathState state, const char *device, const char *reason,
			void *opaque)
{
	PrStateEvent *event = g_new0(PrStateEvent, 1);

	event->path = g_strdup(uri);
	event->path_state = state;
	event->device = g_strdup(device);
	event->reason = g_strdup(reason);
	queue_event(opaque, event);
}

PrMigrationHooks pr_monitor_hooks(PrMonitor *monitor)
{
	return (PrMigrationHooks){pr_monitor_on_state, pr_monitor_on_path, monitor};
}

void pr_monitor_close(PrMonitor *monitor)
{
	g_clear_pointer(&monitor->qmp, pr_qmp_server_free);
	g_ptr_array_set_size(monitor->sessions, 0);
	g_ptr_array_set_size(monitor->async_commands, 0);
	g_mutex_lock(&monitor->lock);
	monitor->closed = TRUE;
	if (monitor->dispatch) {
		g_source_destroy(monitor->dispatch);
		g_clear_pointer(&monitor->dispatch, g_source_unref);
	}
	g_queue_clear_full(&monitor->events, (GDestroyNotify)state_event_free);
	g_mutex_unlock(&monitor->lock);
}

void pr_monitor_free(PrMonitor *monitor)
{
	if (!monitor)
		return;
	pr_monitor_close(monitor);
	g_ptr_array_unref(monitor->sessions);
	g_ptr_array_unref(monitor->waits);
	g_ptr_array_unref(monitor->async_commands);
	g_mutex_clear(&monitor->lock);
	g_main_context_unref(monitor->context);
	g_free(monitor);
}
