/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The migration state machine. No I/O, no threads, no clock: it takes an event and the time, and
 * returns what the caller has to do. The caller serialises the calls.
 *
 *	source       none ─START→ setup ─READY→ active ─STOP→ device
 *	             ─LOADED→ postcopy-active ─SHUT→ completed
 *	destination  the same; it enters postcopy-active before RUN comes
 *	recovery     postcopy-active ─PATH_LOST→ postcopy-paused
 *	             ─RESUME→ postcopy-recover-setup (source only)
 *	             ─CONNECTED→ postcopy-recover ─RESUMED→ postcopy-active
 */
#pragma once

#include <glib.h>
#include <stdint.h>

typedef enum PrRole { PR_ROLE_NONE, PR_ROLE_SOURCE, PR_ROLE_DESTINATION } PrRole;

typedef enum PrState {
	/* No migration was requested yet; the destination may be listening. Exits: START. */
	PR_STATE_NONE,
	/* Connecting, exchanging HELLO and block tables, granting. Exits: READY, FAILED, CANCEL. */
	PR_STATE_SETUP,
	/* Both sides are ready to switch over; the source's guest still runs. */
	PR_STATE_ACTIVE,
	/* The source's guest is stopped, and its device state travels. Any failure resumes it. */
	PR_STATE_DEVICE,
	/* The guest belongs to the destination, and its pages follow. There is no way back: a
	 * failure only pauses. The destination enters this state when the device state is loaded,
	 * and lets the guest run when RUN comes. */
	PR_STATE_POSTCOPY_ACTIVE,
	/* The path is lost. The destination's guest runs on with the pages it has. All threads are
	 * halted. Left only by RESUME (source) or CONNECTED (destination). */
	PR_STATE_POSTCOPY_PAUSED,
	/* Source: a recovery was requested, and a path is being connected. Destination: never. */
	PR_STATE_POSTCOPY_RECOVER_SETUP,
	/* Connected again; bitmaps are exchanged. A failure leads back to paused. */
	PR_STATE_POSTCOPY_RECOVER,
	/* A cancel was requested: threads are ending, and the source's guest is being resumed. */
	PR_STATE_CANCELLING,
	/* As cancelling, because of an error. */
	PR_STATE_FAILING,
	/* Cancelled; the guest runs on the source. A new migration may start. */
	PR_STATE_CANCELLED,
	/* Ended by an error before RUN; the guest runs on the source. A new migration may start. */
	PR_STATE_FAILED,
	/* The destination has every page. */
	PR_STATE_COMPLETED,
	PR_N_STATES
} PrState;

/* QEMU's name: "postcopy-active", … */
const char *pr_state_name(PrState state);

typedef enum PrEvent {
	PR_EVENT_START,	     /* source: `migrate`; destination: the HELLO of a new migration */
	PR_EVENT_READY,	     /* the destination is ready for RAM and device state */
	PR_EVENT_STOP,	     /* source: about to stop the guest; destination: LISTEN */
	PR_EVENT_LOADED,     /* the device state is loaded; the source is about to send RUN */
	PR_EVENT_RUN,	     /* destination: RUN, or a recovery that implies it */
	PR_EVENT_PATH_LOST,  /* the path failed, the peer left it, or the operator paused */
	PR_EVENT_ERROR,	     /* another failure: guest, protocol, kernel, or the peer gave up */
	PR_EVENT_GIVEN_UP,   /* the peer has given up, and has neither seen nor sent RUN */
	PR_EVENT_CANCEL,     /* the operator cancels */
	PR_EVENT_CLEANED_UP, /* all that a cancel or failure had to undo is undone */
	PR_EVENT_RESUME,     /* source: `migrate -r` */
	PR_EVENT_CONNECTED,  /* the control channel of a recovery is up */
	PR_EVENT_RESUMED,    /* source: RESUME_ACK; destination: POSTCOPY_RESUME */
	PR_EVENT_SHUT,	     /* the destination has every page */
	PR_N_EVENTS
} PrEvent;

const char *pr_event_name(PrEvent event);

/* What the caller has to do about an event. */
typedef enum PrAction {
	PR_ACTION_NONE,	  /* nothing but the change of state, if it has changed */
	PR_ACTION_REFUSE, /* the event is not allowed in this state; nothing has changed */
	PR_ACTION_IGNORE, /* late news of something that is over; nothing has changed */
	PR_ACTION_UNDO,	  /* close the connection; source: resume the guest; destination: drop it */
	PR_ACTION_PAUSE,  /* close the connection, halt the threads, keep everything */
	PR_ACTION_RUN,	  /* destination: let the guest run, if it was running */
	PR_ACTION_RELEASE, /* the end: close the connection, turn the fault mode off */
} PrAction;

/* Times are of a monotonic clock, microseconds; 0: has not happened. */
typedef struct PrStateMachine {
	PrRole role;
	PrState state;
	gboolean run; /* destination: RUN was seen; only completion ends the migration */

	gint64 started, stopped, loaded, running, ended;
	gint64 paused;	   /* the current or last pause began */
	gint64 recovering; /* the current or last recovery was asked for */
	guint64 pauses, recoveries;
	gint64 time_paused;   /* sum of the pauses that are over */
	gint64 last_pause;    /* length of the last pause that is over */
	gint64 last_recovery; /* from RESUME or CONNECTED to postcopy-active, of the last one */
} PrStateMachine;

/* Applies an event at time `now`. Only PR_EVENT_START uses the role, and sets it. */
PrAction pr_state_step(PrStateMachine *sm, PrEvent event, PrRole role, gint64 now);

/* Sets up a machine whose past was in another process: paused, completed, or failing. run: RUN was
 * seen. The times before are not known. */
void pr_state_restore(PrStateMachine *sm, PrRole role, PrState state, gboolean run, gint64 now);

/* Whether the guest belongs to the destination: neither side may go back. */
gboolean pr_state_is_postcopy(PrState state);
gboolean pr_state_is_over(PrState state); /* none, cancelled, failed, completed */
/* Time spent in pauses, with the current one. */
gint64 pr_state_time_paused(const PrStateMachine *sm, gint64 now);
