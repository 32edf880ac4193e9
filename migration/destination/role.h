/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The destination of a migration. What it shares with the source is in the session. "The owner" is
 * the load thread, PrSession.thread.
 */
#pragma once

#include "migration/postcopy/fault.h"
#include "migration/postcopy/pull.h"
#include "migration/postcopy/verify.h"
#include "migration/session/connection.h"
#include "transport/control/peer-limits.h"

/* A source whose HELLO, or ACTIVATE, was accepted; the owner answers it. */
typedef struct PrPendingPeer {
	PrControl *control; /* of a HELLO */
	PrConn *standby;    /* of an ACTIVATE */
	PrListener *listener;
	PrHello hello; /* owned */
} PrPendingPeer;

typedef struct PrDestination {
	PrSession *session;	 /* constant */
	PrLogRatelimit refusals; /* has a lock of its own */
	GMutex pull_lock; /* for rails.c, and to end the pull threads; before PrSession.lock */

	/* The owner alone. Before it starts, and after it has ended: the thread that starts or
	 * frees the migration. */
	PrWatch *watch;
	int uffd;	     /* -1: none. Closed only after the workers, who read it, have ended */
	char *guest_process; /* whose uffd it is (guest/process.h); NULL: none */
	gboolean guest_was_running; /* on the source, when it was stopped */

	/* The owner sets these pointers under PrSession.lock, and may read them without. What they
	 * point to has rules of its own. */
	PrFaultService *faults;
	PrPull *pull;
	PrVerify *verify;   /* if pages are verified */
	PrBlocktime *times; /* outlives the fault threads */

	/* PrSession.lock */
	PrFaultStats fault_stats;   /* of fault threads that have ended */
	PrVerifyStats verify_stats; /* of a verify thread that has ended */
	char *last_corrupt;	    /* the last page that came in wrong, or NULL */
	GPtrArray *listeners;	    /* PrListener*; only added to until the end */
	gboolean opening;	    /* a migrate_incoming is opening the first of them */
	PrPendingPeer *pending_peer;
	gboolean guest_started; /* RUN has been carried out: only memory is missing */
} PrDestination;

static inline PrDestination *pr_conn_destination(const PrConn *conn)
{
	return conn->role;
}
