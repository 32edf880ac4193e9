/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the files of the monitor know of each other. */
#pragma once

#include <json-glib/json-glib.h>

#include "monitor/commands.h"
#include "monitor/monitor.h"

/* An HMP line has an answer: text (may be empty), or an error. Called once. */
typedef void (*PrAnswer)(const char *text, const GError *error, void *opaque);

typedef struct PrAsyncCommand PrAsyncCommand;

/* Somebody who waits until the migration has completed, failed, been cancelled or paused; or for an errand. */
typedef struct PrWait {
	PrMonitor *monitor;
	PrAnswer answer;
	void *opaque;
	guint64 since;	/* events before this one are of an earlier migration */
	gboolean begun; /* a change to a busy state was seen: the command has taken effect */
	PrAsyncCommand *errand; /* NULL: it waits for the migration */
} PrWait;

typedef struct PrQmpServer PrQmpServer;
typedef struct PrHmpSession PrHmpSession;

/* Owned by the thread of the main context, except where it says `lock`. */
struct PrMonitor {
	GMainContext *context;
	PrParams *params;
	PrMigration *migration;
	PrMonitorQuit on_quit;
	void *opaque;
	PrQmpServer *qmp;
	GPtrArray *sessions; /* PrHmpSession */
	GPtrArray *waits;    /* PrWait, those for the migration */
	GPtrArray *errands;  /* PrAsyncCommand */

	GMutex lock;
	GQueue events;	   /* lock; PrStateEvent, oldest first */
	guint64 n_events;  /* lock; ever queued */
	GSource *dispatch; /* lock; set while events wait for the main loop */
	gboolean closed;   /* lock; events are dropped */
};

/* How many events there have been; taken before the command that pr_monitor_wait() waits for. */
guint64 pr_monitor_mark(PrMonitor *monitor);
PrWait *pr_monitor_wait(PrMonitor *monitor, guint64 since, PrAnswer answer, void *opaque);
void pr_monitor_unwait(PrWait *wait);

/* async-command.c */
/* Runs a command that has listen(), and answers when it has ended. NULL with an error: it was not begun. */
PrWait *pr_async_command_begin(PrMonitor *monitor, const PrCommand *command, JsonObject *args,
			       PrAnswer answer, void *opaque, GError **error);
/* Whoever waited has gone; the errand goes on. */
void pr_async_command_forget(PrAsyncCommand *errand);
/* Has it give up its look-ups, waits for it and frees it; nobody is answered. */
void pr_async_command_free(PrAsyncCommand *errand);

/* qmp.c */
PrQmpServer *pr_qmp_server_new(PrMonitor *monitor, const char *path, GError **error);
/* Sends an event to every client that has negotiated. Takes the object. */
void pr_qmp_server_event(PrQmpServer *server, JsonObject *event);
void pr_qmp_server_free(PrQmpServer *server);

/* hmp.c */
/* Runs a line. Returns NULL when the answer was given already; else what waits for it. */
PrWait *pr_hmp_run(PrMonitor *monitor, const char *line, PrAnswer answer, void *opaque);
PrHmpSession *pr_hmp_session_new(PrMonitor *monitor, int in_fd, int out_fd, gboolean prompt);
void pr_hmp_session_free(PrHmpSession *session);
