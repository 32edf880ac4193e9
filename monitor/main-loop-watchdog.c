/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "monitor/main-loop-watchdog.h"

static const PrWatchPoint dispatching = {"answering the monitor and other events", 100};

static PrWatch *loop_watch; /* owned by the loop's thread */

static gint watched_poll(GPollFD *fds, guint n, gint timeout)
{
	pr_watch_idle(loop_watch);
	gint ready = g_poll(fds, n, timeout);
	pr_watch_enter(loop_watch, &dispatching);
	return ready;
}

void pr_main_loop_watch(PrWatchdog *watchdog, GMainContext *context)
{
	g_clear_pointer(&loop_watch, pr_watch_free);
	loop_watch = pr_watch_new(watchdog, "main loop");
	g_main_context_set_poll_func(context, watchdog ? watched_poll : NULL);
}
