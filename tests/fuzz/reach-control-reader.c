/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "tests/fuzz/reach.h"

#include "transport/control/reader.c"

gboolean reach_control_read(PrControl *control)
{
	gsize received = 0;
	Look look = LOOK_GOT;

	if (has_send_error(control))
		end_after_send_error(control);
	while (look == LOOK_GOT && g_queue_is_empty(&control->queue) &&
	       !pr_control_has_ended(control))
		look = receive_once(control, &received);
	send_postponed(control);
	if (pr_control_has_ended(control) && !control->reported)
		report(control);
	return look != LOOK_EMPTY;
}

int reach_control_fd(PrControl *control)
{
	return control->fd;
}

PrControl *reach_control_of(GCond *cond)
{
	return (PrControl *)((char *)cond - offsetof(PrControl, changed));
}
