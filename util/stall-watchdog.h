/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A watchdog that reports threads which hang. A thread calls pr_watch_enter() at named points: it
 * stores what it does and since when, without a lock. Before it waits for an event that may take
 * any time, it calls pr_watch_idle(). The watchdog's thread checks all watches. It logs which
 * thread has been at one point for longer than that point allows, again at doubling intervals,
 * and when that thread goes on.
 *
 * A thread that runs, or waits for a CPU, is given four times as long as one that is blocked.
 * When the watchdog itself was late, because the process was stopped or got no CPU, that time is
 * not held against any thread. The watchdog holds its lock while it checks, and logs without it.
 * Other threads take the lock only when a watch is made and freed.
 */
#pragma once

#include <glib.h>
#include <stdint.h>

typedef struct PrWatchdog PrWatchdog;
typedef struct PrWatch PrWatch; /* of one thread */

typedef struct PrWatchPoint {
	const char *what; /* "stopping the guest" */
	guint ms;	  /* longer than this is reported */
} PrWatchPoint;

#define PR_WATCH_CHECK_MS 50 /* between two checks: a report is late by this at most */

PrWatchdog *pr_watchdog_new(void);
/* Starts the watchdog's thread; a failure is logged. */
void pr_watchdog_start(PrWatchdog *watchdog);
/* All watches have to be freed before. */
void pr_watchdog_free(PrWatchdog *watchdog);

/* How often a thread was slow so far, and the last such report (NULL: none yet; g_free() it). */
guint64 pr_watchdog_stalls(PrWatchdog *watchdog, char **ret_last);

/* One check, at this time (us, monotonic). Returns the reports (PrWatchReport) to be logged. For
 * the watchdog's thread, and for tests without one. */
typedef struct PrWatchReport {
	GLogLevelFlags level;
	char *text;
} PrWatchReport;
GArray *pr_watchdog_check(PrWatchdog *watchdog, gint64 now);

/* A watch for the calling thread. `name` is not copied. `watchdog` may be NULL; then there is no
 * watch, and the functions below do nothing with NULL. */
PrWatch *pr_watch_new(PrWatchdog *watchdog, const char *name);
void pr_watch_free(PrWatch *watch);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrWatch, pr_watch_free)

/* The thread has come to this point, which has to be static. */
void pr_watch_enter(PrWatch *watch, const PrWatchPoint *point);
void pr_watch_enter_at(PrWatch *watch, const PrWatchPoint *point, gint64 now_us);
/* The thread is about to wait for an event that may take any time. */
void pr_watch_idle(PrWatch *watch);
