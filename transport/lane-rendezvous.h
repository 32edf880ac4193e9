/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Where the data lanes that come in at a listener meet the accept() calls that wait for them. Several
 * accept()s may wait at the same time, each for the lanes of its own incarnation: that of a recovery
 * and those of standby paths. For transport/ only; thread-safe.
 *
 * While somebody waits, what nobody waits for is refused at once. When nobody waits, it is held: at most
 * PR_DESK_HELD of them and for PR_DESK_HOLD_MS.
 */
#pragma once

#include "transport/backend.h"

#define PR_DESK_HELD	16
#define PR_DESK_HOLD_MS 5000

typedef struct PrPendingLanes PrPendingLanes;

/* Takes an arrival that nobody wants. From any thread that calls in here or the desk's own, with no
 * lock held. */
typedef void (*PrDeskRefuse)(gpointer arrival, const char *reason, gpointer opaque);

PrPendingLanes *pr_pending_lanes_new(PrDeskRefuse refuse, gpointer opaque, GError **error);
/* Refuses what is left. Nobody waits any more. */
void pr_pending_lanes_free(PrPendingLanes *desk);

/* Takes the arrival. */
void pr_pending_lanes_offer(PrPendingLanes *desk, gpointer arrival, const PrLaneHello *hello);
/* Gives back the held arrival for which `matches` holds, or NULL: it has come to nothing by itself. */
gpointer pr_pending_lanes_withdraw(PrPendingLanes *desk, GEqualFunc matches, gconstpointer what);

/* Lanes with this binding are expected, from now on and until they are not any more. Expecting twice is
 * as good as once. */
void pr_pending_lanes_expect(PrPendingLanes *desk, const PrBinding *binding);
void pr_pending_lanes_forget(PrPendingLanes *desk, const PrBinding *binding);
/* Waits for an arrival with the setup's binding, which is then the caller's. NULL when time is up or on
 * cancel. */
gpointer pr_pending_lanes_claim(PrPendingLanes *desk, const PrPathSetup *setup, gint64 deadline,
				PrLaneId *ret_lane, GError **error);
/* Refuses an arrival that was claimed. */
void pr_pending_lanes_refuse(PrPendingLanes *desk, gpointer arrival, const char *reason);
