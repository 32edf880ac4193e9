/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The heartbeat of a control channel: when to send one, how long the peer has been silent, how long a
 * round trip takes. No I/O, no clock: times are passed in, in microseconds of the monotonic clock.
 * Used by one thread.
 *
 * Silence is what we could have heard: time in which our own thread did not run (SIGSTOP, a machine
 * with more work than processors) is not held against the peer.
 */
#pragma once

#include <glib.h>
#include <stdint.h>

#include "transport/wire/wire.h"

typedef struct PrHeartbeat {
	gint64 interval, timeout;
	gint64 next_send;
	gint64 last_heard;   /* moved on by the time that we did not run */
	gint64 wake_by;	     /* when we meant to run again */
	uint64_t peer_stamp; /* of the last heartbeat received, 0: none yet */
	gint64 peer_stamp_at;
} PrHeartbeat;

void pr_heartbeat_init(PrHeartbeat *heartbeat, guint interval_ms, guint timeout_ms, gint64 now);
/* How long to sleep at most. */
gint64 pr_heartbeat_sleep(PrHeartbeat *heartbeat, gint64 now);
/* To be called after each sleep, before anything else. What follows until the next sleep is judged by this
 * same time, so that a stop in between counts as waking up late, too. */
void pr_heartbeat_woke(PrHeartbeat *heartbeat, gint64 now);
/* Something came from the peer, or we chose not to listen. */
void pr_heartbeat_heard(PrHeartbeat *heartbeat, gint64 now);
gint64 pr_heartbeat_silence(const PrHeartbeat *heartbeat, gint64 now);
gboolean pr_heartbeat_is_dead(const PrHeartbeat *heartbeat, gint64 now);

gboolean pr_heartbeat_is_due(const PrHeartbeat *heartbeat, gint64 now);
/* The next heartbeat to send. */
void pr_heartbeat_make(PrHeartbeat *heartbeat, gint64 now, PrHeartbeatBody *ret);
/* Takes one that came in; returns the round trip, 0 if it tells none. */
uint64_t pr_heartbeat_take(PrHeartbeat *heartbeat, gint64 now, const PrHeartbeatBody *body);
