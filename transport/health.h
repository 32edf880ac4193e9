/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The health of a path: whether it may be used, and when it may be connected again. No I/O, no
 * clock: events and times are passed in.
 *
 * A path that was lost is connected again after a pause, which doubles from 0.1 to 2 s. It is on
 * probation then, until PR_HEALTH_PROBES probes in a row were answered and its hold-down is over.
 * The hold-down doubles from 5 to 60 s with each loss of a path that was up. It begins at 5 s
 * again for a path that stayed fit for ten times its hold-down. A path that has never failed
 * needs one probe.
 *
 * A path on probation is still better than none: a side that has no fit path uses it.
 */
#pragma once

#include <glib.h>

#define PR_HEALTH_PROBES	5
#define PR_HEALTH_RETRY_MIN	(100 * 1000) /* times in microseconds */
#define PR_HEALTH_RETRY_MAX	(2 * G_USEC_PER_SEC)
#define PR_HEALTH_HOLD_DOWN_MIN (5 * G_USEC_PER_SEC)
#define PR_HEALTH_HOLD_DOWN_MAX (60 * G_USEC_PER_SEC)
#define PR_HEALTH_FORGIVENESS	10 /* hold-downs */

typedef enum PrPathState {
	PR_PATH_IDLE,	    /* known, and not connected */
	PR_PATH_LISTENING,  /* destination: a source may connect */
	PR_PATH_CONNECTING, /* being connected as a standby */
	PR_PATH_PROBATION,  /* connected, and not trusted yet */
	PR_PATH_STANDBY,    /* connected, and answers probes */
	PR_PATH_ACTIVE,	    /* carries the migration */
	PR_PATH_FAILED,	    /* lost, or could not be connected */
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
	PR_HEALTH_CLOSED, /* by one of the two sides; the path did not fail */
	PR_HEALTH_N_EVENTS
} PrHealthEvent;

/* Times: us, monotonic. All zero for a new path. */
typedef struct PrHealth {
	PrPathState state;
	gint64 since;	   /* the last change of state */
	gint64 retry_at;   /* not to be connected earlier */
	gint64 hold_until; /* end of the hold-down: if connected, on probation until then */
	gint64 hold_down;  /* how long the current or last hold-down is */
	guint failures;	   /* in a row, since it was last fit */
	guint probes;	   /* answered in a row */
	gboolean listens;  /* its state while it is not connected: listening, else idle */
} PrHealth;

/* TRUE: the state has changed. */
gboolean pr_health_step(PrHealth *health, PrHealthEvent event, gint64 now);
