/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/session/events.h"

typedef struct Event {
	PrState state;
	char *path; /* NULL: a change of state */
	PrPathState path_state;
	char *device;
	char *reason;
} Event;

static void event_free(Event *event)
{
	g_free(event->path);
	g_free(event->device);
	g_free(event->reason);
	g_free(event);
}

void pr_events_init(PrEvents *self, const PrMigrationHooks *hooks)
{
	self->hooks = *hooks;
	g_queue_init(&self->queue);
}

void pr_events_clear(PrEvents *self)
{
	g_queue_clear_full(&self->queue, (GDestroyNotify)event_free);
}

static void queue(PrEvents *self, Event event)
{
	g_queue_push_tail(&self->queue, g_memdup2(&event, sizeof(event)));
}

void pr_events_queue_state(PrEvents *self, PrState state, const char *reason)
{
	queue(self, (Event){.state = state, .reason = g_strdup(reason)});
}

void pr_events_queue_path(PrEvents *self, const char *path, PrPathState state, const char *device,
			  const char *reason)
{
	queue(self, (Event){
			    .path = g_strdup(path),
			    .path_state = state,
			    .device = g_strdup(device),
			    .reason = g_strdup(reason),
		    });
}

static void report(const PrMigrationHooks *hooks, const Event *event)
{
	if (!event->path)
		hooks->on_state(event->state, event->reason, hooks->opaque);
	else if (hooks->on_path)
		hooks->on_path(event->path, event->path_state, event->device, event->reason,
			       hooks->opaque);
}

void pr_events_flush(PrEvents *self, GMutex *lock)
{
	while (!self->flushing && !self->n_holds && !g_queue_is_empty(&self->queue)) {
		Event *event = g_queue_pop_head(&self->queue);

		self->flushing = TRUE;
		g_mutex_unlock(lock);
		report(&self->hooks, event);
		event_free(event);
		g_mutex_lock(lock);
		self->flushing = FALSE;
	}
}
