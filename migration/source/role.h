/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The source of a migration. What it shares with the destination is in the session. "The owner" is
 * the migration thread, PrSession.thread.
 */
#pragma once

#include "migration/session/connection.h"
#include "migration/source/handover-record.h"

typedef struct PrSource {
	PrSession *session; /* constant */

	/* The owner alone. Before it starts, and after it has ended: the thread that starts or
	 * frees the migration. */
	PrWatch *watch;
	PrHandoverRecord *record; /* NULL: nothing is written down */
	GThread *fence_thread;	  /* write-protects the guest's RAM (fence.c); NULL: none runs */
	GPtrArray *keepers;	  /* PrKeeper* (standby.c) */
	gboolean holes_sent;	  /* the destination knows all holes */
	gboolean run_may_be_seen; /* this guest never runs here again */

	/* PrSession.lock */
	GPtrArray
		*uris; /* PrUri*: all known paths, preferred ones first; replaced, never changed */
	guint n_asked; /* so many of them were named by the last command */
	char *last_path;       /* text of the URI that connected last */
	char *claimed;	       /* text of the URI that the owner is connecting: no standby for it */
	PrResume resume;       /* which kind of recovery RECOVER_SETUP is */
	uint32_t pong;	       /* the last one received */
	guint bitmaps_due;     /* RECV_BITMAP answers that are missing */
	GArray *scan_requests; /* PrScanRequest; NULL: there is no scan */
	gboolean scanning;     /* not all RAM was scanned for the destination yet (ram-scan.c) */
} PrSource;

/* How an attempt to connect has ended. */
typedef enum PrConnectOutcome {
	PR_CONNECT_UP,	      /* there is a connection */
	PR_CONNECT_COMPLETED, /* the destination has every page, and needs no connection */
	PR_CONNECT_NONE,      /* there is no standby that could be activated */
	PR_CONNECT_FAILED,    /* *error says why */
} PrConnectOutcome;

static inline PrSource *pr_conn_source(const PrConn *conn)
{
	return conn->role;
}
