/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A connection that a listener has accepted, and whose first frame is not complete. For the
 * listener's files only. */
#pragma once

#include "transport/control/internal.h"
#include "transport/control/peer-limits.h"

/* The steps in their order; a plain connection skips the third. */
typedef enum PrPendingStep {
	PR_PENDING_SILENT,   /* no byte has come in yet */
	PR_PENDING_TLS_TURN, /* has begun a TLS handshake, and waits for its turn at one here */
	PR_PENDING_TLS,	     /* a thread does the TLS handshake */
	PR_PENDING_FRAME,    /* its first frame comes in */
	PR_PENDING_DONE,     /* handed over, or refused: to be freed */
} PrPendingStep;

/* Of the listener's accept thread, but in PR_PENDING_TLS of that handshake's thread. */
typedef struct PrPendingConn {
	PrPendingStep step;
	int fd;		    /* up to PR_PENDING_TLS_TURN, so that a flood costs little; then -1 */
	PrControl *control; /* from then on */
	PrPeerHost host;
	gint64 deadline; /* of all steps together; us, monotonic */
	char *refusal;	 /* the answer to a HELLO, whatever it says; NULL: none */
} PrPendingConn;

/* Takes the descriptor. */
PrPendingConn *pr_pending_conn_new(int fd, gint64 deadline);
void pr_pending_conn_free(PrPendingConn *conn);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrPendingConn, pr_pending_conn_free)

/* Makes a control of the descriptor, so that frames can be read. */
gboolean pr_pending_conn_open(PrPendingConn *conn, const PrUri *uri, const PrTransportOps *ops,
			      GError **error);
/* The peer's address, for log lines; g_free() it. */
char *pr_pending_conn_peer(const PrPendingConn *conn);
/* The descriptor to poll for the peer's next bytes; -1: nothing is to be read now. */
int pr_pending_conn_poll_fd(const PrPendingConn *conn);
