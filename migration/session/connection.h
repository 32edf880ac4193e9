/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * One incarnation of the connection: control channel and data path. It is either the one in use,
 * which the owner makes, publishes in PrSession.conn, and closes; or a standby, listed in
 * PrSession.standbys, which belongs to a thread of its own until the owner takes it over or that
 * thread closes it.
 *
 * "The thread that has the connection" is the owner of the one in use, and that thread of a
 * standby.
 */
#pragma once

#include "migration/session/session.h"
#include "transport/transport.h"

/* What a connection needs of its role: the source or the destination. */
typedef struct PrConnOps {
	/* From the control channel's reader thread: a message that must not wait for the thread
	 * that has the connection. TRUE: it was handled. */
	gboolean (*early)(PrConn *conn, const PrMsg *msg);
	/* PrPathAllocate; opaque is the role. */
	gboolean (*allocate)(uint32_t block, uint64_t offset, uint64_t length, void *role);
	/* The connection is being closed: nobody posts READs on its path any more. */
	void (*release)(PrConn *conn);
	/* Its path was fenced: no READ that was posted on it can land any more. */
	void (*fenced)(PrConn *conn);
} PrConnOps;

struct PrConn {
	/* constant */
	PrSession *session;
	const PrConnOps *ops;
	void *role; /* PrSource or PrDestination */
	PrUri *uri;
	char *name;	      /* of the path, for the operator (path-table.h) */
	uint64_t lanes_epoch; /* what the lanes are bound to */

	/* Set before publication, by the thread that has the connection. */
	GCancellable *cancel; /* of the waits before it is up */
	guint n_lanes;	      /* agreed on in HELLO and HELLO_ACK */
	PrControl *control;
	uint64_t peer_can; /* destination: the source's capabilities */

	/* The thread that has the connection. */
	GThread *return_path; /* source: reads what the destination sends */
	gboolean granted;     /* all grants were sent, or given to the path */

	/* Destination: the thread that has the connection; while `receiving_grants` the control's
	 * reader thread, with grants_lock, which is taken before all others (live-grants.c). */
	GArray *grants; /* PrGrant, as they come */
	GMutex grants_lock;
	gboolean receiving_grants;

	/* PrSession.lock */
	PrDataPath *path; /* set when the lanes are up; its owner reads it without */
	uint64_t epoch;	  /* the one of HELLO or ACTIVATE */
	gboolean standby; /* listed in PrSession.standbys */
	GError *failure;  /* of a connection that is not in use */
	PrHelloAck *ack;  /* source: what the destination answered to ACTIVATE */
	uint64_t rtt_us;  /* of the last probe of the lanes, 0: none yet */
	gboolean pulls;	  /* a standby that is a rail: the destination pulls over it, too */
	guint rail; /* destination: id of its rail (pull.h), 0: none; its owner reads it without */
};

/* name: NULL: the text of the URI. */
PrConn *pr_conn_new(PrSession *session, const PrConnOps *ops, void *role, const PrUri *uri,
		    const char *name, uint64_t epoch);
/* Frees one that was never up. */
void pr_conn_free(PrConn *conn);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrConn, pr_conn_free)

/* What binds its lanes to the migration. */
void pr_conn_binding(PrConn *conn, PrBinding *ret);
/* What connect() and accept() of a transport need. */
PrPathSetup pr_conn_setup(PrConn *conn, const PrBinding *binding, uint16_t data_port);
gboolean pr_conn_set_path(PrConn *conn, PrDataPath *path, GError **error);

/* The owner publishes a connection; FALSE if the attempt has failed already. */
gboolean pr_conn_publish(PrConn *conn, GError **error);
/* The same for a standby that is up, and no longer listed. */
gboolean pr_conn_adopt(PrConn *conn, GError **error);
/* Lists it as a standby. FALSE: the migration is over. */
gboolean pr_conn_stand_by(PrConn *conn, GError **error);
/* It is a standby no more. With the lock held. */
void pr_conn_unlist(PrConn *conn);
/* A standby has ended, with this error. */
void pr_conn_standby_ended(PrConn *conn, const GError *error);

/* PrPathFailed for the control channel; opaque is the PrConn. */
void pr_conn_failed(const GError *error, void *opaque);
/* The same with the lock held. */
void pr_conn_failed_locked(PrConn *conn, const GError *error);
/* Ends all waits on the connection; it stays valid. */
void pr_conn_shutdown(PrConn *conn);
/* The thread that has the connection ends it: when this returns, its path is fenced. A detached
 * thread frees the rest. Not to be called from the connection's return-path thread. */
void pr_conn_close(PrConn *conn);
/* Ends all standbys, and waits until nothing of any connection is left but the one in use. */
void pr_conn_await_threads(PrSession *session);
