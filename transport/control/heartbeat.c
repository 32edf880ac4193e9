/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "transport/control/heartbeat.h"

#define LATE_US 10000 /* a thread that is later did not run: the scheduler's grain is less */

void pr_heartbeat_init(PrHeartbeat *heartbeat, guint interval_ms, guint timeout_ms, gint64 now)
{
	*heartbeat = (PrHeartbeat){
		.interval = (gint64)interval_ms * 1000,
		.timeout = (gint64)timeout_ms * 1000,
		.next_send = now,
		.last_heard = now,
		.wake_by = now,
	};
}

gint64 pr_heartbeat_sleep(PrHeartbeat *heartbeat, gint64 now)
{
	gint64 at = MIN(heartbeat->next_send, heartbeat->last_heard + heartbeat->timeout);

	heartbeat->wake_by = at;
	return MAX(at - now, 0);
}

void pr_heartbeat_woke(PrHeartbeat *heartbeat, gint64 now)
{
	gint64 late = now - heartbeat->wake_by;

	if (late > LATE_US)
		heartbeat->last_heard = MIN(heartbeat->last_heard + late, now);
}

void pr_heartbeat_heard(PrHeartbeat *heartbeat, gint64 now)
{
	heartbeat->last_heard = now;
}

gint64 pr_heartbeat_silence(const PrHeartbeat *heartbeat, gint64 now)
{
	return now - heartbeat->last_heard;
}

gboolean pr_heartbeat_is_dead(const PrHeartbeat *heartbeat, gint64 now)
{
	return pr_heartbeat_silence(heartbeat, now) >= heartbeat->timeout;
}

gboolean pr_heartbeat_is_due(const PrHeartbeat *heartbeat, gint64 now)
{
	return now >= heartbeat->next_send;
}

void pr_heartbeat_make(PrHeartbeat *heartbeat, gint64 now, PrHeartbeatBody *ret)
{
	heartbeat->next_send = now + heartbeat->interval;
	*ret = (PrHeartbeatBody){.stamp = now};
	if (heartbeat->peer_stamp) {
		ret->echo = heartbeat->peer_stamp;
		ret->echo_age = now - heartbeat->peer_stamp_at;
	}
}

uint64_t pr_heartbeat_handle(PrHeartbeat *heartbeat, gint64 now, const PrHeartbeatBody *body)
{
	uint64_t since;

	heartbeat->peer_stamp = body->stamp;
	heartbeat->peer_stamp_at = now;
	/* A peer may send anything. An echo from the future, or an age beyond its own, is
	 * ignored. */
	if (!body->echo || body->echo > (uint64_t)now)
		return 0;
	since = (uint64_t)now - body->echo;
	return body->echo_age < since ? since - body->echo_age : 0;
}
