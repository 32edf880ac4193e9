/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Events of a migration: changes of its state and of its paths. They are queued under the lock of
 * the session and reported without it, in the order of the changes, by whichever thread releases
 * the lock next.
 */
#pragma once

#include <glib.h>

#include "migration/core/state.h"
#include "transport/health.h"

/* Called from any thread, with no lock of the engine held. */
typedef struct PrMigrationHooks {
	void (*on_state)(PrState state, const char *reason, void *opaque);
	/* device: NULL where the path has no named device. The hook may be NULL. */
	void (*on_path)(const char *uri, PrPathState state, const char *device, const char *reason,
			void *opaque);
	void *opaque;
} PrMigrationHooks;

typedef struct PrEvents {
	PrMigrationHooks hooks; /* constant */
	/* PrSession.lock: */
	GQueue queue;	   /* of Event */
	gboolean flushing; /* a thread is reporting the queued events */
	guint n_holds;	   /* while above 0 events stay queued */
} PrEvents;

void pr_events_init(PrEvents *self, const PrMigrationHooks *hooks);
void pr_events_clear(PrEvents *self);

/* Both with the lock held. */
void pr_events_queue_state(PrEvents *self, PrState state, const char *reason);
void pr_events_queue_path(PrEvents *self, const char *path, PrPathState state, const char *device,
			  const char *reason);
/* Reports all queued events. Returns at once while another thread reports, which then reports
 * these, too, and while events are held. With `lock` held, which is released meanwhile. */
void pr_events_flush(PrEvents *self, GMutex *lock);
