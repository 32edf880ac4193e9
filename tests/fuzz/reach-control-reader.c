/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "tests/fuzz/reach.h"

#include "transport/control/reader.c"

gboolean reach_control_read(PrControl *control)
{
	gsize received = 0;
	ReadResult result = READ_GOT;

	if (has_send_error(control))
		end_after_send_error(control);
	while (result == READ_GOT && g_queue_is_empty(&control->queue) &&
	       !pr_control_has_ended(control))
		result = receive_once(control, &received);
	send_postponed(control);
	if (pr_control_has_ended(control) && !control->reported)
		report(control);
	return result != READ_EMPTY;
}

int reach_control_fd(PrControl *control)
{
	return control->fd;
}

PrControl *reach_control_of(GCond *cond)
{
	return (PrControl *)((char *)cond - offsetof(PrControl, changed));
}
