/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "monitor/waits.h"

#include "monitor/internal.h"

G_DEFINE_QUARK(pr_monitor_error, pr_monitor_error)

guint64 pr_monitor_mark(PrMonitor *monitor)
{
	G_GNUC_UNUSED g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&monitor->lock);

	return monitor->n_events;
}

PrWait *pr_monitor_wait(PrMonitor *monitor, guint64 since, PrAnswer answer, void *opaque)
{
	PrWait *wait = g_new0(PrWait, 1);

	wait->monitor = monitor;
	wait->answer = answer;
	wait->opaque = opaque;
	wait->since = since;
	g_ptr_array_add(monitor->waits, wait);
	return wait;
}

void pr_monitor_unwait(PrWait *wait)
{
	if (wait->async)
		*wait->async = NULL;
	else
		g_ptr_array_remove(wait->monitor->waits, wait);
	g_free(wait);
}
