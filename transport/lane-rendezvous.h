/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Matches the data lanes that come in at a backend's listener with the accept() calls that wait
 * for them. Several accept() calls may wait at the same time, each for the lanes of its own
 * binding: that of a recovery, and those of standby paths. For transport/ only; thread-safe.
 *
 * While any binding is expected, a lane of another binding is refused at once. While none is
 * expected, lanes are held: at most PR_PENDING_LANES_MAX, and each for PR_PENDING_LANES_MS.
 */
#pragma once

#include "transport/backend.h"

#define PR_PENDING_LANES_MAX 16
#define PR_PENDING_LANES_MS  5000

typedef struct PrPendingLanes PrPendingLanes;

/* Refuses a lane, and takes it. Called without a lock, by a thread that calls a function below or
 * by the thread that lets lanes expire. */
typedef void (*PrLaneRefuse)(gpointer lane, const char *reason, gpointer opaque);

PrPendingLanes *pr_pending_lanes_new(PrLaneRefuse refuse, gpointer opaque, GError **error);
/* Refuses the lanes that are still held. No accept() may wait any more. */
void pr_pending_lanes_free(PrPendingLanes *pending);

/* A lane has come in. Takes it. */
void pr_pending_lanes_offer(PrPendingLanes *pending, gpointer lane, const PrLaneHello *hello);
/* Gives back the held lane for which `matches` is true, because its peer has closed it; NULL:
 * there is none. */
gpointer pr_pending_lanes_withdraw(PrPendingLanes *pending, GEqualFunc matches, gconstpointer with);

/* Lanes with this binding are expected until pr_pending_lanes_forget(). Calling it twice has the
 * effect of once. */
void pr_pending_lanes_expect(PrPendingLanes *pending, const PrBinding *binding);
void pr_pending_lanes_forget(PrPendingLanes *pending, const PrBinding *binding);
/* Waits for a lane with the setup's binding, which is then the caller's. NULL at the deadline
 * (us, monotonic), or when cancelled. */
gpointer pr_pending_lanes_claim(PrPendingLanes *pending, const PrPathSetup *setup, gint64 deadline,
				PrLaneId *ret_lane, GError **error);
/* Refuses an arrival that was claimed. */
void pr_pending_lanes_refuse(PrPendingLanes *pending, gpointer arrival, const char *reason);
