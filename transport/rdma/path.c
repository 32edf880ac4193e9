/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The failing of a path. */
#include "transport/rdma/path.h"

static void stop_lane(PrVerbsLane *lane)
{
	struct ibv_qp_attr attr = {.qp_state = IBV_QPS_ERR};
	int err = lane->qp ? ibv_modify_qp(lane->qp, &attr, IBV_QP_STATE) : 0;

	if (err)
		g_info("queue pair 0x%x: %s", lane->qp->qp_num, g_strerror(err));
	pr_poll_set_wake(&lane->poll_set);
}

void pr_verbs_stop(PrDataPath *base)
{
	PrVerbsPath *path = (PrVerbsPath *)base;

	g_mutex_lock(&path->qp_lock);
	for (guint i = 0; i < base->n_lanes; i++)
		stop_lane(&path->lanes[i]);
	g_mutex_unlock(&path->qp_lock);
	pr_poll_set_wake(&path->events_waker);
}

void pr_verbs_fail(PrVerbsPath *path, const char *format, ...)
{
	g_autofree char *reason = NULL;
	va_list args;

	va_start(args, format);
	reason = g_strdup_vprintf(format, args);
	va_end(args);
	pr_path_life_fail(&path->life, "device %s: %s", pr_verbs_device_name(&path->device),
			  reason);
}
