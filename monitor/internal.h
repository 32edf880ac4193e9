/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The monitor's struct, for the files of monitor/ only. */
#pragma once

#include "migration/core/params.h"
#include "migration/migration.h"
#include "monitor/waits.h"

/* Owned by the thread of the main context, but for the members behind `lock`. */
struct PrMonitor {
	GMainContext *context;
	PrParams *params;
	PrMigration *migration;
	void (*on_quit)(void *opaque); /* PrMonitorQuit */
	void *opaque;
	struct PrQmpServer *qmp;
	GPtrArray *sessions;	   /* PrHmpSession */
	GPtrArray *waits;	   /* PrWait, those for the migration */
	GPtrArray *async_commands; /* PrAsyncCommand */

	GMutex lock;	   /* protects all that follows */
	GQueue events;	   /* PrStateEvent, oldest first */
	guint64 n_events;  /* ever queued */
	GSource *dispatch; /* set while events wait for the main loop */
	gboolean closed;   /* events are dropped */
};
