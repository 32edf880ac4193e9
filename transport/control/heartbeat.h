/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The heartbeat of a control channel: when to send one, how long the peer has been silent, and
 * how long a round trip takes. No I/O, no clock: times are passed in (us, monotonic). Used by one
 * thread.
 *
 * Silence is time in which this side could have heard the peer. Time in which this thread did not
 * run (SIGSTOP, a machine with too few CPUs) does not count.
 */
#pragma once

#include <glib.h>
#include <stdint.h>

#include "transport/wire/wire.h"

typedef struct PrHeartbeat {
	gint64 interval, timeout;
	gint64 next_send;
	gint64 last_heard;   /* plus the time since then in which this thread did not run */
	gint64 wake_by;	     /* when this thread was to run again */
	uint64_t peer_stamp; /* of the last heartbeat received, 0: none yet */
	gint64 peer_stamp_at;
} PrHeartbeat;

void pr_heartbeat_init(PrHeartbeat *heartbeat, guint interval_ms, guint timeout_ms, gint64 now);
/* How long the thread may sleep. */
gint64 pr_heartbeat_sleep(PrHeartbeat *heartbeat, gint64 now);
/* To be called after each sleep, before anything else. Use the same `now` for all calls until the
 * next sleep. Then a stop of the process in between counts as waking up late, too. */
void pr_heartbeat_woke(PrHeartbeat *heartbeat, gint64 now);
/* Bytes came from the peer, or this side chose not to read. */
void pr_heartbeat_heard(PrHeartbeat *heartbeat, gint64 now);
gint64 pr_heartbeat_silence(const PrHeartbeat *heartbeat, gint64 now);
gboolean pr_heartbeat_is_dead(const PrHeartbeat *heartbeat, gint64 now);

gboolean pr_heartbeat_is_due(const PrHeartbeat *heartbeat, gint64 now);
/* Makes the next heartbeat to send. */
void pr_heartbeat_make(PrHeartbeat *heartbeat, gint64 now, PrHeartbeatBody *ret);
/* Handles a heartbeat that came in. Returns the round trip (us); 0: this one gives none. */
uint64_t pr_heartbeat_handle(PrHeartbeat *heartbeat, gint64 now, const PrHeartbeatBody *body);
