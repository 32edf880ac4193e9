/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Commands that the monitor answers later: when the migration has come to a stop, or when an
 * asynchronous command has ended (async-command.h). All calls are made on the monitor's thread.
 */
#pragma once

#include <glib.h>

typedef enum PrMonitorError {
	PR_MONITOR_ERROR_SOCKET, /* the QMP socket can't be created; names its path and why */
} PrMonitorError;
#define PR_MONITOR_ERROR pr_monitor_error_quark()
GQuark pr_monitor_error_quark(void);

typedef struct PrMonitor PrMonitor;

/* The answer to an HMP line: a text (may be empty), or an error. Called once. */
typedef void (*PrAnswer)(const char *text, const GError *error, void *opaque);

/* A command that is not answered yet. Owned by the monitor's thread. */
typedef struct PrWait {
	PrMonitor *monitor;
	PrAnswer answer;
	void *opaque;
	guint64 since;	  /* events before this one belong to an earlier migration */
	gboolean started; /* a busy state followed: the command has taken effect */
	/* The asynchronous command's pointer to this wait; it becomes NULL when the client leaves.
	 * NULL: this command waits for the migration. */
	struct PrWait **async;
} PrWait;

/* The number of events so far. Read it before running the command that pr_monitor_wait() waits
 * for. */
guint64 pr_monitor_mark(PrMonitor *monitor);
/* Answers when the migration has completed, failed, been cancelled or paused. */
PrWait *pr_monitor_wait(PrMonitor *monitor, guint64 since, PrAnswer answer, void *opaque);
/* Frees the wait without an answer. An asynchronous command still runs to its end. */
void pr_monitor_unwait(PrWait *wait);
