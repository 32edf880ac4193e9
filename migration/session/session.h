/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the files of the engine share.
 *
 * Threads. Each migration has one owner thread: the migration thread on the source, the load thread on
 * the destination. It alone opens and closes connections and walks through the steps. Anybody may
 * report a failure (pr_migration_failed): the state machine is stepped and the connection shut down
 * under the lock, which ends every wait of the owner; the owner then tidies up.
 *
 * Lock order: PrMigration.lock is taken last (pull_lock before it); no call out of the engine that may block, or call back,
 * is made with it held. Shutting down a control channel or a data path neither blocks nor calls back.
 */
#pragma once

#include "migration/postcopy/fault.h"
#include "migration/migration.h"
#include "migration/postcopy/pull.h"
#include "migration/memory/ram.h"
#include "migration/source/handover-record.h"
#include "migration/core/state.h"
#include "migration/postcopy/verify.h"
#include "transport/control/control.h"
#include "transport/control/peer-limits.h"
#include "transport/health.h"
#include "transport/transport.h"
#include "util/stall-watchdog.h"

/*
 * One incarnation of the connection. Either the one in use: made, published in PrMigration.conn, and freed
 * by the owner. Or a standby, listed in PrMigration.standbys: made by a thread of its own (standby.c), until
 * the owner takes it or that thread frees it.
 */
typedef struct PrConn {
	PrMigration *m;
	PrUri *uri;
	char *name; /* of the path, for the operator: at the destination with the address that was called */
	GCancellable *cancel; /* of the waits before it is up */
	uint64_t lanes_epoch; /* what the lanes are bound to */
	guint n_lanes;	      /* agreed on in HELLO and HELLO_ACK; constant afterwards */
	PrControl *control;   /* set before publication */
	PrDataPath *path;     /* set under the lock when the lanes are up */
	GThread *return_path; /* source; of whoever made the connection, then the owner's */
	/* of the thread that has the connection: */
	GArray *grants;	   /* destination: PrGrant, as they come */
	uint64_t peer_can; /* destination: the source's capabilities */
	gboolean granted;  /* all of them were sent, or given to the path */
	/* destination, of a incremental_grants path in use (live-grants.c) */
	GMutex grants_lock; /* taken before all others; protects `telling`, and `grants` while that is set */
	gboolean
		receiving_grants; /* the control's reader thread takes what the source tells of its RAM */

	/* PrMigration.lock */
	uint64_t epoch;	  /* the one of HELLO or ACTIVATE */
	gboolean standby; /* listed in PrMigration.standbys */
	GError *failure;  /* of a standby */
	PrHelloAck *ack;  /* source: what the destination answered to ACTIVATE */
	uint64_t rtt_us;  /* of the last probe of the lanes, 0: none yet */
	gboolean pulls;	  /* a standby: the destination pulls over it, too */
	guint stripe; /* destination: id of the stripe over it (pull.h), 0: none; written by the thread
		       * that has the connection, which reads it without the lock */
} PrConn;
/* Frees one that was never up. */
void pr_conn_free(PrConn *conn);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrConn, pr_conn_free)

/* Destination: a source whose HELLO, or ACTIVATE, was accepted; the load thread answers it. */
typedef struct PrPendingPeer {
	PrControl *control; /* of a HELLO */
	PrConn *standby;    /* of an ACTIVATE */
	PrListener *listener;
	PrHello hello; /* owned */
} PrPendingPeer;

/* What is remembered of a path. */
typedef struct PrPathRecord {
	char *name;
	char *device; /* or NULL */
	char *last_error;
	uint64_t
		bytes; /* of guest RAM; atomic. Of the connection in use only when that has ended */
	PrHealth health;
} PrPathRecord;

/* Source: keeps a standby for one of the listed paths (standby.c). */
typedef struct PrKeeper PrKeeper;

/* The write protection of the source's RAM. */
typedef enum PrFence {
	PR_FENCE_NONE,	  /* not yet, or not any more */
	PR_FENCE_ON,	  /* the RAM does not change until everything has moved */
	PR_FENCE_REFUSED, /* it can't be had */
} PrFence;

#define PR_RATE_SAMPLES 16

struct PrMigration {
	/* set once, before any thread */
	PrGuest *guest;
	PrParams *params;
	PrMigrationHooks hooks;
	PrSecurity security;
	PrWatchdog *watchdog;

	PrWatch *watch; /* the owner's, which alone uses it; no lock */
	GThread *
		fencer; /* the same; source: write-protects its RAM; NULL: nobody does (any more) */

	PrLogRatelimit refusals; /* has its own lock */
	GMutex pull_lock; /* for rails.c and for ending the pull threads; taken before `lock` */

	GMutex lock;   /* protects all that follows, unless it says otherwise */
	GCond changed; /* broadcast when anything below changes that somebody waits for */
	PrStateMachine sm;
	char *reason;
	char *error_desc;
	GError *failure;    /* of the current attempt: what its steps return */
	GQueue notices;	    /* of PrNotice*: changes of state and of paths not yet told */
	gboolean notifying; /* a thread is telling them */
	gboolean quit;

	PrBinding binding;
	PrConn *conn;
	GPtrArray *standbys;	  /* PrConn*, not owned */
	guint n_threads;	  /* that are not joined: they end by themselves and count down */
	GCancellable *cancel;	  /* of the current attempt */
	GPtrArray *records;	  /* PrPathRecord*, in order of first use */
	GThread *thread;	  /* joined by the next one and by free */
	GThread *previous_thread; /* the last owner, until the next one has joined it */
	gint64 rate_time[PR_RATE_SAMPLES];
	uint64_t rate_bytes[PR_RATE_SAMPLES];
	guint rate_next;

	/* The owner sets the pointers under the lock; what they point to has its own rules. */
	PrRam *ram;
	PrFaultService *faults;
	PrPull *pull;
	PrVerify *verify;	    /* destination, if pages are verified */
	PrVerifyStats verify_stats; /* of a verify thread that has ended */
	gboolean verifies;	    /* both sides want pages verified */
	char *last_corrupt;	    /* the last page that came in wrong, or NULL */
	PrFaultStats fault_stats;   /* of a fault thread that has ended */
	PrBlocktime *times;	    /* destination; outlives the fault thread */

	/* source */
	PrHandoverRecord *
		record; /* NULL: nothing is written down; the owner's, before that resume.c's: no lock */
	GPtrArray *uris;     /* PrUri*: all known paths, the preferred ones first; replaced, never
			      * changed */
	guint n_asked;	     /* so many of them were named by the last command */
	char *last_path;     /* text of the URI that connected last */
	char *claimed;	     /* text of the URI that the owner is connecting: no standby for it */
	GPtrArray *keepers;  /* PrKeeper*; the owner's, no lock */
	gboolean holes_told; /* the destination knows all holes; the owner's, no lock */
	gboolean run_may_be_seen; /* the owner's, no lock: this guest never runs here again */
	PrResume resume;	  /* what kind of recovery RECOVER_SETUP is */
	uint32_t pong;		  /* the last one received */
	guint bitmaps_due;	  /* RECV_BITMAP answers still missing */
	GArray *asked; /* PrScanRequest: where the destination wants us to look first, NULL: nowhere (ram-scan.c) */
	gboolean
		looking; /* the destination has not heard of all its RAM yet; nor may it wait for us */
	PrProgress progress; /* as the destination last reported it */

	/* destination */
	GPtrArray *listeners; /* PrListener*; only added to until free */
	gboolean opening;     /* a migrate_incoming is on its way to the first of them */
	PrPendingPeer *pending_peer;
	gboolean guest_was_running; /* on the source, when it was stopped */
	gboolean guest_started;	    /* RUN has been carried out: what remains is its memory */

	uint64_t pages_at_pause;
	char *guest_gone; /* why this side's guest process is; NULL: it is there */
	/* source, fence.c */
	PrFence fence;
	gint64 fenced_at; /* goes with fence: since when it stands, monotonic us; 0: since before this engine */
	char *unfenced;	 /* why its RAM is not write-protected, in words for both sides; or NULL */
	char *ran_again; /* what was seen last of a guest that was handed over; or NULL */
	gboolean held;	 /* either side: a human has paused; automatic recovery waits for a human */

	/* destination, the load thread's own: no lock. It closes uffd only after the workers have ended, who read it, too. */
	int uffd;
	char *guest_process; /* whose uffd is: as text (guest/process.h); NULL: nobody's */
};

/* Starts in this state, as what another engine has left. With the lock held. */
void pr_migration_restore_locked(PrMigration *m, PrRole role, PrState state, gboolean run,
				 const char *reason);
/* A human has paused it, or lets it go on. With the lock held. */
void pr_migration_set_held(PrMigration *m, gboolean held);
/* Steps the machine with the lock held; records the reason, queues the notice. */
PrAction pr_migration_step_locked(PrMigration *m, PrEvent event, PrRole role, const char *reason);
/* As above without the lock; TRUE unless the step was refused, then `error` tells why: the failure
 * that came in between. */
gboolean pr_migration_step(PrMigration *m, PrEvent event, const char *reason, GError **error);
/* Queues news of a path. With the lock held. */
void pr_migration_note_path(PrMigration *m, const PrPathRecord *record, const char *reason);
/* Tells what is queued. With no lock held. */
void pr_session_flush_events(PrMigration *m);

/* Something failed: steps the machine by the kind of error, shuts the connection down. `from` is the
 * connection it happened on (news of an older one are ignored), or NULL for the current one. */
void pr_migration_failed(PrMigration *m, PrConn *from, const GError *error);
/* As above for the current connection, with the lock held; pr_session_flush_events() afterwards. */
PrAction pr_migration_failed_locked(PrMigration *m, const GError *error);
/* The owner's own report: a step of the current attempt has failed, unless somebody reported that already
 * (then the machine may have moved on to the next attempt). */
void pr_attempt_failed(PrMigration *m, const GError *error);
gboolean pr_attempt_has_failed(PrMigration *m);
/* Why the current attempt can't go on; never leaves *error unset. With the lock held. */
void pr_migration_copy_failure(PrMigration *m, GError **error);

/* The owner: begins an attempt: forgets the last failure, renews `cancel`. With the lock held. */
void pr_migration_begin_attempt(PrMigration *m);

/* connection.c */
/* name: NULL: the URI's text. */
PrConn *pr_conn_new(PrMigration *m, const PrUri *uri, const char *name, uint64_t epoch);
/* What binds its lanes to the migration. */
void pr_conn_binding(PrConn *conn, PrBinding *ret);
/* Fills in what connect() and accept() need. */
PrPathSetup pr_conn_setup(PrConn *conn, const PrBinding *binding, uint16_t data_port);
/* The owner publishes a connection; FALSE if the attempt has failed already. */
gboolean pr_conn_publish(PrConn *conn, GError **error);
/* The same for one that was a standby until now, and that is up. */
gboolean pr_conn_adopt(PrConn *conn, GError **error);
/* Lists it as a standby. FALSE: the migration is over. */
gboolean pr_conn_stand_by(PrConn *conn, GError **error);
/* With the lock held: it is a standby no more. */
void pr_conn_unlist(PrConn *conn);
gboolean pr_conn_set_path(PrConn *conn, PrDataPath *path, GError **error);
/* PrPathFailed for control channel and data path; opaque is the PrConn. */
void pr_conn_failed(const GError *error, void *opaque);
/* As above, with the lock held; the caller tells. */
void pr_conn_failed_locked(PrConn *conn, const GError *error);
/* Ends all waits on the connection; it stays valid. */
void pr_conn_shutdown(PrConn *conn);
/* Whoever has the connection ends it: withdraws it and fences the path. What else has to be freed is no
 * concern of anybody's and is freed in a thread. Not from its own return-path thread. */
void pr_conn_close(PrConn *conn);
/* A thread that nobody joins; pr_migration_await_threads() waits for all of them. */
void pr_migration_spawn(PrMigration *m, const char *name, GThreadFunc func, gpointer opaque);
/* To be called by such a thread when it is done. */
void pr_migration_thread_ends(PrMigration *m);
/* Ends all standbys and waits until nothing of any connection is left but the current one. */
void pr_migration_await_threads(PrMigration *m);

/* path-table.c; all with the lock held, and pr_session_flush_events() afterwards. */
PrPathRecord *pr_path_record(PrMigration *m, const char *name);
void pr_path_step(PrMigration *m, const char *name, PrHealthEvent event, const char *reason);
/* The end of a path: whether it was the path's fault is in the error. */
void pr_path_ended(PrMigration *m, const char *name, const GError *error);
void pr_path_set_device(PrMigration *m, const char *name, PrDataPath *path);
void pr_path_record_free(gpointer record);

uint64_t pr_path_bytes(const PrPathRecord *record);

/* rails.c: the bulk pull over standbys. Destination, the thread that has the connection; harmless where there is no
 * stripe. */
/* Begins one if the standby is fit for it and it is of use. */
void pr_rail_begin(PrConn *conn);
/* Looks after one: ends it when it is of no use (any more). FALSE: the path is dead. */
gboolean pr_rail_review(PrConn *conn, GError **error);
/* Ends it, when what it has asked for has come in. FALSE: that does not come, the path is dead. */
gboolean pr_rail_drain(PrConn *conn, GError **error);
/* Of a path that is being closed: at once; and, once the path is fenced, forgets what was lost with it. */
void pr_rail_stop(PrConn *conn);
void pr_rail_reclaim(PrConn *conn);

/* Tells the source how the standbys take part. */
gboolean pr_rail_send_rails(PrMigration *m, PrConn *conn, GError **error);
gboolean pr_rail_take_rails(PrMigration *m, const PrMsg *msg, GError **error);

/* standby.c */
/* Source, the owner: sees to it that every listed path has a keeper. */
void pr_standby_keep(PrMigration *m);
void pr_standby_stop(PrMigration *m);
/* Source, the owner: makes a path's standby the connection in use. NULL without an error: it has none, or
 * *ret_completed. Either way the path's keeper stays away from it until pr_standby_unclaim(). */
PrConn *pr_standby_activate(PrMigration *m, const PrUri *uri, PrResume resume,
			    gboolean *ret_completed, GError **error);
void pr_standby_unclaim(PrMigration *m);
/* The owner, with the lock held: how good a path's standby is: 2: fit, 1: on probation, 0: there is none. */
guint pr_standby_rank(PrMigration *m, const PrUri *uri);
/* Destination: a source wants to connect a standby; takes the control. From the listener's thread. */
void pr_standby_admit(PrMigration *m, PrControl *control, const PrHello *hello,
		      PrListener *listener);
/* Either side: messages that come over a standby. */
gboolean pr_standby_take_lost(PrMigration *m, const PrMsg *msg, const char *peer, GError **error);
gboolean pr_standby_take_probed(PrConn *conn, const PrMsg *msg, GError **error);
gboolean pr_standby_take_activated(PrConn *conn, const PrMsg *msg, GError **error);
/* Tells the peer over all standbys that a connection is lost. With the lock held; does not wait. */
void pr_standby_tell_lost(PrMigration *m, uint64_t epoch, const GError *error);

void pr_pending_peer_free(PrPendingPeer *pending_peer);
/* The connection is no longer the current one. With the lock held. */
void pr_session_detach_conn(PrMigration *m);
/* query.c */
/* Destination, the owner, without the lock and before the fault mode is on: forgets who waited for how
 * long, asks the guest for its vCPUs. */
void pr_migration_begin_times(PrMigration *m);
/* With the lock held: */
uint64_t pr_migration_transferred(PrMigration *m);
void pr_migration_sample_rate(PrMigration *m, uint64_t bytes, gint64 now);

/* The peer's PAUSE, HOLD or ERROR as an error; always FALSE. `peer`: "source" or "destination". */
gboolean pr_take_reason(const PrMsg *msg, const char *peer, GError **error);
/* Something that the operator has to know, and that changes nothing. With the lock held; pr_session_flush_events()
 * afterwards. */
void pr_migration_note_locked(PrMigration *m, const char *what);
/* The same for something that must never happen. */
void pr_migration_alarm_locked(PrMigration *m, const char *what);
/* The peer's NOTE. */
gboolean pr_take_note(PrMigration *m, const PrMsg *msg, const char *peer, GError **error);
/* The last word on a connection, if it can be said without waiting. */
void pr_send_reason_nowait(PrConn *conn, uint16_t type, const char *reason);
gboolean pr_send(PrConn *conn, uint16_t type, GByteArray *body, GError **error);

/* page-hashes.c */
/* Source, the return path: answers REQ_HASHES. */
gboolean pr_source_tell_hashes(PrMigration *m, PrConn *conn, const PrMsg *msg, GError **error);
void pr_source_note_verify(PrMigration *m, const PrHelloAck *ack);
/* Destination: HASHES, for the verify thread. From the control channel's reader; what is malformed it leaves to the load
 * thread, to be refused. */
gboolean pr_hashes_take(PrConn *conn, const PrMsg *msg, GError **error);
/* Destination, the owner, before the other workers: if pages are to be verified. */
gboolean pr_destination_start_verify(PrMigration *m, GError **error);
/* After them; to be freed when no worker is left. */
PrVerify *pr_destination_stop_verify(PrMigration *m);

/* charge.c */
/* Destination, the owner, before the other workers: the guest is charged for its pages, if it can be. */
gboolean pr_destination_start_allocator(PrMigration *m, gboolean fresh, GError **error);
/* After them. */
void pr_destination_stop_allocator(PrMigration *m);
/* PrPathAllocate; opaque is the PrMigration. */
gboolean pr_destination_allocate(uint32_t block, uint64_t offset, uint64_t length, void *opaque);

/* source.c: for the keepers, too */
PrConn *pr_source_connect(PrMigration *m, const PrUri *uri, PrResume resume, GCancellable *cancel,
			  gboolean *ret_completed, GError **error);
gboolean pr_source_send_grants(PrConn *conn, GError **error);
gboolean pr_source_ping(PrConn *conn, uint32_t value, GError **error);

/* zero-pages.c: the source's; the guest has stopped. */
gboolean pr_source_tell_holes(PrMigration *m, PrConn *conn, GError **error);
/* For incremental_grants paths: what of [start, end) is not in its grants, which are sorted, is holes. */
gboolean pr_source_tell_ungranted(PrConn *conn, uint32_t block, uint64_t start, uint64_t end,
				  const GArray *grants, GError **error);
/* Looks through all RAM that is not known to be in place, ahead of the destination's pull. */
void pr_source_tell_zero_pages(PrMigration *m, PrConn *conn);

/* ram-scan.c: the source, after the guest has stopped: what the destination may read over a incremental_grants path, and what is
 * zero. A thread does it; pr_look_end() returns whether all was told. */
GThread *pr_look_begin(PrMigration *m, PrConn *conn, GError **error);
gboolean pr_look_end(PrMigration *m, GThread *looker);
gboolean pr_source_take_look(PrMigration *m, const PrMsg *msg, GError **error);
/* Waits until all was told, or the attempt has failed. */
void pr_look_await(PrMigration *m);
gboolean pr_source_tell_grants(PrConn *conn, const GArray *grants, GError **error);

/* live-grants.c: the destination's half of it. */
void pr_live_grants_start(PrMigration *m, PrConn *conn);
/* GRANT or RAM_ZERO; from the control channel's reader. FALSE: it is for the load thread. */
gboolean pr_live_grants_handle(PrConn *conn, const PrMsg *msg);
/* Returns when nobody takes anything over this connection any more. */
void pr_live_grants_stop(PrConn *conn);
/* Asks the source to look at a page first. */
void pr_live_grants_request(PrMigration *m, PrConn *conn, guint block, uint64_t page);
/* resume.c: what the source writes down; of the owner. Each is in force when it returns. */
gboolean pr_handover_stopping(PrMigration *m, GError **error);
gboolean pr_handover_handed_over(PrMigration *m, GError **error);
/* RUN was not sent after all; before the guest may run. */
void pr_handover_revoked(PrMigration *m);
/* The guest runs on here. */
void pr_handover_aborted(PrMigration *m);
void pr_handover_completed(PrMigration *m);
void pr_handover_update(PrMigration *m);
/* At the end: nothing needs to be known of a guest that has moved, and whose process is gone. */
void pr_source_forget(PrMigration *m);

/* fence.c; the owner, once RUN may have been sent: begins to write-protect the guest's RAM here, and to watch it. Where it
 * can't be protected both sides are told. */
void pr_source_fence(PrMigration *m);
/* Waits until that is done. */
void pr_source_await_fence(PrMigration *m);
/* The same for an engine that follows another one, which may have done it. */
void pr_source_fence_again(PrMigration *m);
/* Everything has moved. The watch goes on. */
void pr_source_unfence(PrMigration *m);
/* Either side, at the beginning: the guest's process may have been a source before. */
void pr_migration_begin_unfenced(PrMigration *m);
/* PrGuestRanAgain */
void pr_source_ran_again(const char *what, gint64 seen, void *migration);
/* Tells the destination what it has to know of the source's guest; once for each connection, as the destination's engine
 * may be another one. */
void pr_source_tell_guest(PrMigration *m, PrConn *conn);

/* take-back.c: the guest runs on here. follows: another engine has stopped it. One try; and, by the owner, until it runs.
 * FALSE: the guest's process is gone, or the engine is to end. */
gboolean pr_source_try_run(PrMigration *m, gboolean follows, GError **error);
gboolean pr_source_let_run(PrMigration *m, gboolean follows, GError **error);
/* The same, and then the migration is over: CLEANED_UP. */
void pr_source_take_back(PrMigration *m, gboolean follows);
gpointer pr_source_take_back_thread(gpointer migration);

gpointer pr_source_thread(gpointer migration);
/* return-path.c; of a PrConn. */
gpointer pr_source_return_path_thread(gpointer conn);
/* From postcopy-paused on. */
gpointer pr_source_resumed_thread(gpointer migration);
gpointer pr_load_thread(gpointer migration);

/* recover.c: the source's and the destination's half of a recovery. */
gboolean pr_source_recover(PrMigration *m, PrConn *conn, GError **error);
gboolean pr_source_take_bitmap(PrMigration *m, const PrMsg *msg, GError **error);
gboolean pr_destination_send_bitmap(PrMigration *m, PrConn *conn, const PrMsg *msg, GError **error);
gboolean pr_destination_resume(PrMigration *m, PrConn *conn, GError **error);
/* admission.c */
/* PrOnHello */
void pr_destination_hello(PrControl *control, const PrHello *hello, PrListener *listener,
			  void *opaque);
/* What it tells the source. With the lock held, or by the owner. */
PrProgress pr_destination_progress(PrMigration *m, const PrFaultStats *stats);
/* What the operator calls the path over which a source came; g_free() it. */
char *pr_destination_path_name(PrControl *control, PrListener *listener);
/* A source asks to go on with a higher epoch over a standby. TRUE: the load thread has it now. Else *ret
 * says why not. */
gboolean pr_destination_activate(PrConn *conn, const PrHello *hello, PrListener *listener,
				 PrHelloAck *ret);
gboolean pr_destination_send_activated(PrConn *conn, const PrHelloAck *ack, GError **error);
gboolean pr_destination_same_migration(PrMigration *m, const PrHello *hello);
void pr_refuse(PrHelloAck *ack, const char *format, ...) G_GNUC_PRINTF(2, 3);
/* Logs it, unless there were many of late. */
void pr_note_refusal(PrMigration *m, const char *what, PrControl *control, const char *reason);

/* destination.c */
gboolean pr_destination_take_grant(PrMigration *m, PrConn *conn, const PrMsg *msg, GError **error);
/* Answers a HELLO with PR_HELLO_OK, publishes or lists the connection and waits for its lanes. */
gboolean pr_destination_accept(PrConn *conn, PrListener *listener, gboolean standby,
			       GError **error);
gboolean pr_destination_take_zero(PrMigration *m, const PrMsg *msg, GError **error);
void pr_destination_use_grants(PrConn *conn);
/* Turns the fault mode on, or goes on with it; fresh: nothing was received yet. */
gboolean pr_destination_start_workers(PrMigration *m, gboolean fresh, GError **error);
/* Stops them. Where the guest is in postcopy its faults wait for the next engine; the agent keeps them. */
void pr_destination_leave(PrMigration *m);
/* Lets the guest run; by hand, if that is what it takes. */
void pr_destination_run(PrMigration *m);
/* As above, if it can be done now. */
gboolean pr_destination_try_run(PrMigration *m, GError **error);
void pr_destination_check_complete(PrMigration *m);
