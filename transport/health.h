/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * How a path is doing, and when it may be used (again). No I/O, no clock: events and times come in.
 *
 * A path that was lost is connected again after a pause that doubles from 0.1 to 2 s, but it is not
 * trusted yet: it is on probation until PR_HEALTH_PROBES probes in a row were answered and its hold-down
 * is over, which doubles from 5 to 60 s with each loss of a path that was up. A path that stayed fit for
 * ten times its hold-down is forgiven. One that has never failed needs one probe.
 *
 * A path on probation is still better than none: who has no fit path takes it.
 */
#pragma once

#include <glib.h>

#define PR_HEALTH_PROBES      5
#define PR_HEALTH_RETRY_MIN   (100 * 1000) /* times in microseconds */
#define PR_HEALTH_RETRY_MAX   (2 * G_USEC_PER_SEC)
#define PR_HEALTH_HOLD_MIN    (5 * G_USEC_PER_SEC)
#define PR_HEALTH_HOLD_MAX    (60 * G_USEC_PER_SEC)
#define PR_HEALTH_FORGIVENESS 10 /* hold-downs */

typedef enum PrPathState {
	PR_PATH_IDLE,	    /* known, and nothing is done with it */
	PR_PATH_LISTENING,  /* destination: a source may come */
	PR_PATH_CONNECTING, /* being connected as a standby */
	PR_PATH_PROBATION,  /* connected, not to be trusted yet */
	PR_PATH_STANDBY,    /* connected, and answers probes */
	PR_PATH_ACTIVE,	    /* carries the migration */
	PR_PATH_FAILED,	    /* lost, or not to be reached */
	PR_PATH_N_STATES
} PrPathState;

const char *pr_path_state_name(PrPathState state);

typedef enum PrHealthEvent {
	PR_HEALTH_LISTENS,
	PR_HEALTH_CONNECTS,
	PR_HEALTH_CONNECTED,
	PR_HEALTH_PROBED, /* a probe was answered */
	PR_HEALTH_ACTIVATED,
	PR_HEALTH_FAILED,
	PR_HEALTH_CLOSED, /* by one of the two sides, through no fault of the path */
	PR_HEALTH_N_EVENTS
} PrHealthEvent;

/* Times are of a monotonic clock, microseconds; all zero for a path that is new. */
typedef struct PrHealth {
	PrPathState state;
	gint64 since;	   /* the last change of state */
	gint64 retry_at;   /* not to be connected before */
	gint64 hold_until; /* on probation until then, if connected */
	gint64 hold;	   /* the current or last hold-down's length */
	guint failures;	   /* in a row, since it was fit last */
	guint probes;	   /* answered in a row */
	gboolean listens;  /* where nothing is connected: listening, not idle */
} PrHealth;

/* TRUE: the state has changed. */
gboolean pr_health_step(PrHealth *health, PrHealthEvent event, gint64 now);
