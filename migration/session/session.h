/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A session: what the source's and the destination's half of a migration have in common. It holds
 * the state machine, the failure of the current attempt, the connection in use and the standbys.
 *
 * Threads. Each migration has one thread that owns its course: the migration thread on the source,
 * the load thread on the destination (PrSession.thread). It alone opens and closes the connection
 * in use and walks through the steps. Any thread may report a failure (pr_session_failed()): that
 * steps the state machine and shuts the connection down under the lock, which ends every wait of
 * the owner; the owner then tidies up.
 *
 * Lock order: PrSession.lock is taken last (PrDestination.pull_lock before it). With it held, the
 * engine makes no call that may block or call back. Shutting down a control channel or a data path
 * does neither.
 */
#pragma once

#include "migration/core/params.h"
#include "migration/core/state.h"
#include "migration/core/types.h"
#include "migration/memory/ram.h"
#include "migration/session/events.h"
#include "migration/session/path-table.h"
#include "transport/control/control.h"
#include "util/stall-watchdog.h"

typedef struct PrConn PrConn;

/* Whether the source's RAM is write-protected (source/fence.c). */
typedef enum PrFenceState {
	PR_FENCE_NONE,	  /* not yet, or not any more */
	PR_FENCE_ON,	  /* the RAM does not change until everything has moved */
	PR_FENCE_REFUSED, /* the kernel or the guest's process does not allow it */
} PrFenceState;

typedef struct PrFence {
	PrFenceState state;
	gint64 since;	 /* goes with ON: monotonic us; 0: since before this engine */
	char *refused;	 /* why the RAM is not write-protected, in words for both sides; or NULL */
	char *ran_again; /* what was last seen of a guest that ran after its hand-over; or NULL */
} PrFence;

#define PR_RATE_SAMPLES 16

/* How much guest RAM had travelled at some moments of the last second or two. */
typedef struct PrRate {
	gint64 time[PR_RATE_SAMPLES]; /* monotonic us; 0: no sample */
	uint64_t bytes[PR_RATE_SAMPLES];
	guint next;
} PrRate;

typedef struct PrSession {
	/* Constant after pr_session_init() and pr_migration_secure(), which come before any
	 * thread. */
	PrGuest *guest;
	PrParams *params;
	PrSecurity security;
	PrWatchdog *watchdog;

	GMutex lock;
	GCond changed; /* broadcast when something below changes that a thread may wait for */

	/* PrSession.lock: all that follows. */
	PrStateMachine sm;
	char *reason;		     /* of the last change of state */
	char *error_desc;	     /* why the migration failed, or NULL */
	GError *failure;	     /* of the current attempt: what its steps return */
	GCancellable *cancel;	     /* of the current attempt */
	gboolean quit;		     /* the engine is to end */
	gboolean paused_by_operator; /* automatic recovery waits until the operator resumes */
	char *guest_gone; /* why this side's guest process has ended; NULL: it is there */
	PrEvents events;
	PrPathTable paths;

	PrBinding binding;
	PrConn *conn;		  /* in use */
	GPtrArray *standbys;	  /* PrConn*, not owned */
	guint n_threads;	  /* detached threads that run; each counts down when it ends */
	GThread *thread;	  /* the owner; joined by the next one, or at the end */
	GThread *previous_thread; /* the one before, until the next one has joined it */

	/* The owner sets the pointer under the lock, and may read it without. PrRam has rules of
	 * its own. */
	PrRam *ram;
	gboolean verifies; /* both sides want pages verified */
	PrProgress
		progress; /* the source's: what has arrived, as the destination last reported it */
	uint64_t pages_at_pause;
	PrRate rate;
	PrFence fence;
} PrSession;

void pr_session_init(PrSession *session, PrGuest *guest, PrParams *params,
		     const PrMigrationHooks *hooks);
/* When no thread is left. */
void pr_session_clear(PrSession *session);

void pr_session_lock(PrSession *session);
/* Also reports the queued events: whichever thread unlocks next reports them, or the thread that
 * reports at that moment. So a caller may return before its own event was reported. */
void pr_session_unlock(PrSession *session);
/* Keeps events queued until the release. The first with the lock held, the second without. */
void pr_session_hold_events(PrSession *session);
void pr_session_release_events(PrSession *session);

/* ---- state; the calls that end in _locked are made with the lock held ---- */

/* Starts in this state, where another engine has ended. */
void pr_session_restore_locked(PrSession *session, PrRole role, PrState state, gboolean run,
			       const char *reason);
/* Steps the state machine; records the reason, queues the event. */
PrAction pr_session_step_locked(PrSession *session, PrEvent event, PrRole role, const char *reason);
/* The same without the lock. FALSE: the step was refused; `error` says why: by the failure that
 * came in between. */
gboolean pr_session_step(PrSession *session, PrEvent event, const char *reason, GError **error);
/* The operator has paused the migration, or lets it go on. */
void pr_session_set_paused_by_operator(PrSession *session, gboolean paused);
/* Reports something that the operator has to know and that changes no state; the second for what
 * must never happen. */
void pr_session_note_locked(PrSession *session, const char *what);
void pr_session_alarm_locked(PrSession *session, const char *what);
PrState pr_session_state(PrSession *session);
/* The command is not possible in this state; hint: what to do, or why. With the lock held. */
void pr_session_set_state_error(const PrSession *session, const char *command, const char *hint,
				GError **error);

/* ---- failures ---- */

/* Steps the state machine by the kind of error, and shuts the connection down. from: the connection
 * that it happened on; a failure of an older connection is ignored. NULL: the connection in use. */
void pr_session_failed(PrSession *session, PrConn *from, const GError *error);
/* The same for the connection in use. */
PrAction pr_session_failed_locked(PrSession *session, const GError *error);
/* The owner reports that a step of the current attempt has failed. Ignored if somebody reported a
 * failure already: the state machine may have moved on to the next attempt. */
void pr_session_attempt_failed(PrSession *session, const GError *error);
gboolean pr_session_attempt_has_failed(PrSession *session);
/* Why the current attempt can't go on; never leaves *error unset. With the lock held. */
void pr_session_copy_failure(PrSession *session, GError **error);
/* The owner begins an attempt: forgets the last failure, renews `cancel`. With the lock held. */
void pr_session_begin_attempt(PrSession *session);
/* The connection in use is it no longer. With the lock held. */
void pr_session_detach_conn(PrSession *session);

/* ---- what has travelled; with the lock held ---- */

/* Bytes of guest RAM that travelled so far. */
uint64_t pr_session_transferred(PrSession *session);
void pr_session_sample_rate(PrSession *session, uint64_t bytes, gint64 now);
/* Bytes a second over the samples of the last second or so. */
double pr_session_rate(const PrSession *session, uint64_t bytes, gint64 now);

/* ---- the write protection of the source's RAM ---- */

/* FALSE: the guest's RAM is still write-protected. */
gboolean pr_session_lift_fence(PrSession *session);
/* Either side, when a migration begins: the guest's process may have been a source before. */
void pr_session_forget_fence(PrSession *session);

/* ---- threads ---- */

/* Starts the thread that owns the course of the migration. */
gboolean pr_session_start_thread(PrSession *session, const char *name, GThreadFunc func,
				 gpointer opaque, GError **error);
/* A detached thread; pr_conn_await_threads() waits for all of them. Without memory for a
 * thread, func is called here. */
void pr_session_spawn(PrSession *session, const char *name, GThreadFunc func, gpointer opaque);
/* To be called by such a thread when it is done. */
void pr_session_thread_ends(PrSession *session);
