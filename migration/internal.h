/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the files of the engine share.
 *
 * Threads. Each migration has one owner thread: the migration thread on the source, the load thread on
 * the destination. It alone opens and closes connections and walks through the steps. Anybody may
 * report a failure (pr_migration_failed): the state machine is stepped and the connection shut down
 * under the lock, which ends every wait of the owner; the owner then tidies up.
 *
 * Lock order: PrMigration.lock is taken last; no call out of the engine that may block, or call back,
 * is made with it held. Shutting down a control channel or a data path neither blocks nor calls back.
 */
#pragma once

#include "migration/fault.h"
#include "migration/migration.h"
#include "migration/pull.h"
#include "migration/ram.h"
#include "migration/state.h"
#include "transport/control.h"
#include "transport/transport.h"

/* One incarnation of the connection. Made, published in PrMigration.conn, and freed by the owner. */
typedef struct PrConn {
	PrMigration *m;
	PrUri *uri;
	uint64_t epoch;
	PrControl *control;   /* set before publication */
	PrDataPath *path;     /* set under the lock when the lanes are up */
	GThread *return_path; /* source; the owner's */
} PrConn;

/* Destination: a control connection whose HELLO was accepted; the load thread answers it. */
typedef struct PrNewcomer {
	PrControl *control;
	PrListener *listener;
	PrHello hello; /* owned */
} PrNewcomer;

typedef struct PrPathRecord {
	char *uri;
	char *last_error;
	uint64_t bytes;
	gboolean listening;
} PrPathRecord;

#define PR_RATE_SAMPLES 16

struct PrMigration {
	/* set once, before any thread */
	PrGuest *guest;
	PrParams *params;
	PrOnState on_state;
	void *opaque;

	GMutex lock;   /* protects all that follows, unless it says otherwise */
	GCond changed; /* broadcast when anything below changes that somebody waits for */
	PrStateMachine sm;
	char *reason;
	char *error_desc;
	GError *failure;    /* of the current attempt: what its steps return */
	GQueue notices;	    /* of PrNotice*: changes of state not yet told */
	gboolean notifying; /* a thread is telling them */
	gboolean quit;

	PrBinding binding;
	PrConn *conn;
	GCancellable *cancel; /* of the current attempt */
	GPtrArray *records;   /* PrPathRecord*, in order of first use */
	GThread *owner;	      /* joined by start and free */
	gint64 rate_time[PR_RATE_SAMPLES];
	uint64_t rate_bytes[PR_RATE_SAMPLES];
	guint rate_next;

	/* The owner sets the pointers under the lock; what they point to has its own rules. */
	PrRam *ram;
	PrFaultThread *faults;
	PrPullThread *pull;
	PrFaultStats fault_stats; /* of a fault thread that has ended */

	/* source */
	GPtrArray *uris;     /* PrUri*: all known paths, the preferred ones first; replaced, never
			      * changed */
	guint n_asked;	     /* so many of them were named by the last command */
	char *last_path;     /* text of the URI that connected last */
	PrResume resume;     /* what kind of recovery RECOVER_SETUP is */
	uint32_t pong;	     /* the last one received */
	guint bitmaps_due;   /* RECV_BITMAP answers still missing */
	PrProgress progress; /* as the destination last reported it */

	/* destination */
	GPtrArray *listeners; /* PrListener*; only added to until free */
	PrNewcomer *newcomer;
	gboolean guest_was_running; /* on the source, when it was stopped */
	gboolean guest_started;	    /* RUN has been carried out: what remains is its memory */

	uint64_t pages_at_pause;
	gboolean held; /* either side: a human has paused; automatic recovery waits for a human */

	/* destination, the load thread's own: no lock */
	int uffd;
	GArray *grants; /* PrGrant */
};

/* Steps the machine with the lock held; records the reason, queues the notice. */
PrAction pr_migration_step_locked(PrMigration *m, PrEvent event, PrRole role, const char *reason);
/* As above without the lock; TRUE unless the step was refused, then `error` tells why: the failure
 * that came in between. */
gboolean pr_migration_step(PrMigration *m, PrEvent event, const char *reason, GError **error);
/* Tells queued changes of state. With no lock held. */
void pr_migration_tell(PrMigration *m);

/* Something failed: steps the machine by the kind of error, shuts the connection down. `from` is the
 * connection it happened on (news of an older one are ignored), or NULL for the current one. */
void pr_migration_failed(PrMigration *m, PrConn *from, const GError *error);
/* As above for the current connection, with the lock held; pr_migration_tell() afterwards. */
PrAction pr_migration_failed_locked(PrMigration *m, const GError *error);
/* The owner's own report: a step of the current attempt has failed, unless somebody reported that already
 * (then the machine may have moved on to the next attempt). */
void pr_attempt_failed(PrMigration *m, const GError *error);
/* PrPathFailed for control channel and data path; opaque is the PrConn. */
void pr_conn_failed(const GError *error, void *opaque);
/* Why the current attempt can't go on; never leaves *error unset. With the lock held. */
void pr_migration_copy_failure(PrMigration *m, GError **error);

/* The owner: begins an attempt: forgets the last failure, renews `cancel`. With the lock held. */
void pr_migration_begin_attempt(PrMigration *m);
/* What binds this connection to its migration. */
void pr_conn_binding(PrConn *conn, PrBinding *ret);
/* Fills in what connect() and accept() need. */
PrPathSetup pr_conn_setup(PrConn *conn, uint16_t data_port);
/* The owner publishes a connection; FALSE if the attempt has failed already. */
gboolean pr_conn_publish(PrConn *conn, GError **error);
gboolean pr_conn_set_path(PrConn *conn, PrDataPath *path, GError **error);
/* Ends all waits on the connection; it stays valid. */
void pr_conn_shutdown(PrConn *conn);
/* The owner ends the connection: withdraws it, fences the path, joins and frees. */
void pr_conn_close(PrMigration *m, PrConn *conn);
PrPathRecord *pr_migration_record(PrMigration *m, const PrUri *uri);
void pr_newcomer_free(PrNewcomer *newcomer);
/* stats.c; with the lock held. */
uint64_t pr_migration_transferred(PrMigration *m);
void pr_migration_sample_rate(PrMigration *m, uint64_t bytes, gint64 now);

/* The peer's PAUSE, HOLD or ERROR as an error; always FALSE. `peer`: "source" or "destination". */
gboolean pr_take_reason(const PrMsg *msg, const char *peer, GError **error);
gboolean pr_send(PrConn *conn, uint16_t type, GByteArray *body, GError **error);

gpointer pr_source_thread(gpointer migration);
gpointer pr_load_thread(gpointer migration);
/* PrOnHello */
void pr_destination_hello(PrControl *control, const PrHello *hello, PrListener *listener,
			  void *opaque);

/* recover.c: the source's and the destination's half of a recovery. */
gboolean pr_source_recover(PrMigration *m, PrConn *conn, GError **error);
gboolean pr_source_take_bitmap(PrMigration *m, const PrMsg *msg, GError **error);
gboolean pr_destination_send_bitmap(PrMigration *m, PrConn *conn, const PrMsg *msg, GError **error);
gboolean pr_destination_resume(PrMigration *m, PrConn *conn, GError **error);
/* destination.c */
void pr_destination_run(PrMigration *m);
void pr_destination_check_complete(PrMigration *m);
