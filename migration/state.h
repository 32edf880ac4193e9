/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The migration state machine. No I/O, no threads, no clock: it takes an event and the time and
 * returns what has to be done. The caller serialises calls (migration.c: PrMigration.lock).
 *
 *	source       none ─START→ setup ─READY→ active ─STOP→ device ─RUN→ postcopy-active ─SHUT→ completed
 *	destination  none ─START→ setup ─READY→ active ─STOP→ device ─LOADED→ postcopy-active ─SHUT→ completed
 *	recovery     postcopy-active ─FAILED→ postcopy-paused ─RESUME→ postcopy-recover-setup (source only)
 *	             ─CONNECTED→ postcopy-recover ─RESUMED→ postcopy-active
 */
#pragma once

#include <glib.h>
#include <stdint.h>

typedef enum PrRole { PR_ROLE_NONE, PR_ROLE_SOURCE, PR_ROLE_DESTINATION } PrRole;

typedef enum PrState {
	/* Nothing was asked for yet; the destination may be listening. Exits: START. */
	PR_STATE_NONE,
	/* Connecting, exchanging HELLO and block tables, granting. Exits: READY, FAILED, CANCEL. */
	PR_STATE_SETUP,
	/* Both sides are ready to switch over; the source's guest still runs. */
	PR_STATE_ACTIVE,
	/* The source's guest is stopped, its device state travels. Any failure resumes it. */
	PR_STATE_DEVICE,
	/* The guest belongs to the destination; its pages follow. Never left backwards: a failure
	 * only pauses. The destination enters it when the device state is loaded, and lets the
	 * guest run when RUN comes. */
	PR_STATE_POSTCOPY_ACTIVE,
	/* The path is lost; the destination's guest runs on with the pages it has. All threads are
	 * halted. Left only by RESUME (source) or CONNECTED (destination). */
	PR_STATE_POSTCOPY_PAUSED,
	/* Source: somebody asked for a recovery; connecting. Destination: never. */
	PR_STATE_POSTCOPY_RECOVER_SETUP,
	/* Connected again; bitmaps are exchanged. A failure goes back to paused. */
	PR_STATE_POSTCOPY_RECOVER,
	/* Cancel was asked for; threads are ending, the source's guest is being resumed. */
	PR_STATE_CANCELLING,
	/* Ended, the guest runs on the source. A new migration may start. */
	PR_STATE_CANCELLED,
	/* Ended by an error before RUN, the guest runs on the source. A new one may start. */
	PR_STATE_FAILED,
	/* The destination has every page. */
	PR_STATE_COMPLETED,
	PR_N_STATES
} PrState;

/* QEMU's name: "postcopy-active", … */
const char *pr_state_name(PrState state);
