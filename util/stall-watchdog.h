/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A watchdog over threads. Each thread that works says at named points what it does and since when, with a few
 * stores that nobody waits for; where it waits for an event that may take as long as it likes, it says that it is
 * idle. A thread of the watchdog's own looks at them all, and logs who has been at one point for longer than that
 * point allows, again at doubling intervals, and that it goes on again.
 *
 * Who is not blocked but runs, or waits for a CPU, is given four times as long.
 * When the watchdog itself was late, because the process was stopped or got no CPU, nobody is blamed for that
 * time. It takes its lock to look, for which threads come only to begin and to end, and logs without it.
 */
#pragma once

#include <glib.h>
#include <stdint.h>

typedef struct PrWatchdog PrWatchdog;
typedef struct PrWatch PrWatch; /* what one thread says */

typedef struct PrWatchPoint {
	const char *what; /* "stopping the guest" */
	guint ms;	  /* longer than this is worth a word */
} PrWatchPoint;

#define PR_WATCH_LOOK_MS 50 /* between two looks: so late it says it at most */

PrWatchdog *pr_watchdog_new(void);
/* Starts its thread; where there is none to be had, that is logged. */
void pr_watchdog_start(PrWatchdog *watchdog);
/* All watches were freed before. */
void pr_watchdog_free(PrWatchdog *watchdog);

/* What it has found so far: how often a thread was slow, and the last one in words (NULL: none yet; g_free()). */
guint64 pr_watchdog_stalls(PrWatchdog *watchdog, char **ret_last);

/* One look, at this time (us, monotonic), and what there is to say; for its thread, and for tests without one. */
typedef struct PrWatchWord {
	GLogLevelFlags level;
	char *text;
} PrWatchWord;
GArray *pr_watchdog_look(PrWatchdog *watchdog, gint64 now);

/* The calling thread's; name is not copied. watchdog may be NULL, and so may a watch everywhere below. */
PrWatch *pr_watch_new(PrWatchdog *watchdog, const char *name);
void pr_watch_free(PrWatch *watch);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrWatch, pr_watch_free)

/* It comes to a point; the point has to be static. */
void pr_watch_enter(PrWatch *watch, const PrWatchPoint *point);
void pr_watch_enter_at(PrWatch *watch, const PrWatchPoint *point, gint64 now_us);
/* It waits for whatever comes next. */
void pr_watch_idle(PrWatch *watch);
