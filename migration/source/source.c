/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The source's story. The migration thread walks it from pr_source_thread() down. Each connection
 * has a return-path thread beside it, which handles what the destination sends.
 *
 * The source's RAM does not change once the guest is stopped, and the data path serves it without
 * this thread. What the thread does in postcopy is to search for zero pages, so that they need not
 * travel, and to recover.
 */
#include "migration/source/source.h"

#include "migration/core/crash-point.h"
#include "migration/source/choose-path.h"
#include "migration/source/fence.h"
#include "migration/source/grants.h"
#include "migration/source/handover.h"
#include "migration/source/recover.h"
#include "migration/source/standby.h"
#include "migration/source/switchover.h"
#include "migration/source/take-back.h"
#include "migration/source/zero-pages.h"

#define BACKOFF_MIN_US (100 * 1000) /* between automatic recoveries, doubling */
#define BACKOFF_MAX_US (2 * G_USEC_PER_SEC)
#define CAPABILITY_POLL_US                                                                         \
	(200 * 1000) /* between two checks whether auto-recover was switched on */

/* What the migration thread does, and how long that may take. Where a parameter bounds it, that
 * applies instead. */
static const PrWatchPoint exchanging = {"exchanging what has arrived", 3000};
static const PrWatchPoint closing = {"closing a connection", 3000};

void pr_source_begin_attempt(PrSource *source)
{
	pr_session_begin_attempt(source->session);
	source->pong = 0;
	source->bitmaps_due = 0;
}

/* Before RUN: the guest runs on here. */
static void undo(PrSource *source, PrConn *conn, const GError *why)
{
	pr_session_attempt_failed(source->session, why);
	pr_watch_enter(source->watch, &closing);
	if (conn)
		pr_conn_close(conn);
	pr_handover_revoked(source);
	pr_source_take_back(source, /* follows= */ FALSE);
}

/* ---- postcopy ---- */

/* The destination pulls; this side helps where it can. Ends with the connection. */
static void serve_pull(PrSource *source, PrConn *conn)
{
	PrSession *session = source->session;

	pr_standby_keep(source);
	/* Progress is up to the destination from here on; even a channel that takes nothing is not
	 * this thread's stall. */
	pr_watch_idle(source->watch);
	if (pr_capability(session->params, PR_CAP_ZERO_PAGES))
		pr_source_send_zero_pages(conn);
	pr_session_lock(session);
	/* Ended by a change of state: SHUT, or any failure. */
	while (session->sm.state == PR_STATE_POSTCOPY_ACTIVE && !session->quit)
		g_cond_wait(&session->changed, &session->lock);
	pr_session_unlock(session);
	pr_watch_enter(source->watch, &closing);
	pr_conn_close(conn);
}

/* ---- paused ---- */

typedef enum PauseOutcome {
	PAUSE_GO_ON, /* paused still */
	PAUSE_RECOVER,
	PAUSE_OVER, /* the migration or the engine ends */
} PauseOutcome;

/* With the lock held. */
static PauseOutcome pause_outcome(const PrSession *session)
{
	if (session->quit || pr_state_is_over(session->sm.state))
		return PAUSE_OVER;
	return session->sm.state == PR_STATE_POSTCOPY_PAUSED ? PAUSE_GO_ON : PAUSE_RECOVER;
}

/* Whether an automatic recovery may end this pause. With the lock held. */
static gboolean may_recover_alone(const PrSource *source)
{
	const PrSession *session = source->session;

	return !session->paused_by_operator && source->uris->len > 1 &&
	       pr_capability(session->params, PR_CAP_AUTO_RECOVER);
}

/* The operator has to act. What has changed meanwhile is written down for the next engine. With the
 * lock held, which is released meanwhile. */
static void wait_for_operator(PrSource *source)
{
	PrSession *session = source->session;
	gint64 until = g_get_monotonic_time() + CAPABILITY_POLL_US;

	pr_session_unlock(session);
	pr_handover_update(source);
	pr_session_lock(session);
	if (pause_outcome(session) == PAUSE_GO_ON)
		g_cond_wait_until(&session->changed, &session->lock, until);
}

/* attempts: automatic recoveries that have failed in a row. */
static gint64 next_attempt_at(guint attempts)
{
	gint64 backoff =
		attempts ? MIN(BACKOFF_MIN_US << MIN(attempts - 1, 10), BACKOFF_MAX_US) : 0;

	return g_get_monotonic_time() + backoff;
}

/* Waits in postcopy-paused until the operator resumes, or the next automatic attempt is due. */
static PauseOutcome wait_for_recovery(PrSource *source, guint attempts)
{
	PrSession *session = source->session;
	gint64 due = next_attempt_at(attempts);
	PauseOutcome outcome;

	pr_watch_idle(source->watch);
	pr_session_lock(session);
	while ((outcome = pause_outcome(session)) == PAUSE_GO_ON) {
		if (!may_recover_alone(source)) {
			wait_for_operator(source);
		} else if (g_get_monotonic_time() < due) {
			g_cond_wait_until(&session->changed, &session->lock, due);
		} else {
			source->resume = PR_RESUME_AUTOMATIC;
			pr_session_step_locked(session, PR_EVENT_RESUME, PR_ROLE_SOURCE,
					       "recovering over another path");
		}
	}
	pr_session_unlock(session);
	return outcome;
}

/* ---- one recovery ---- */

/* A new attempt begins, unless it has been ended already. */
static gboolean begin_recovery(PrSource *source)
{
	PrSession *session = source->session;

	pr_session_lock(session);
	gboolean wanted = session->sm.state == PR_STATE_POSTCOPY_RECOVER_SETUP;
	if (wanted)
		pr_source_begin_attempt(source);
	pr_session_unlock(session);
	return wanted;
}

/* The last connection may have been lost before all holes were sent, and over rdma a hole can't be
 * read. */
static gboolean send_missing_holes(PrSource *source, PrConn *conn, GError **error)
{
	return source->holes_sent || pr_source_send_holes(conn, error);
}

static gboolean recover_over(PrSource *source, PrConn *conn, GError **error)
{
	pr_watch_enter(source->watch, &exchanging);
	if ((!conn->granted && !pr_source_send_all_grants(conn, error)) ||
	    !send_missing_holes(source, conn, error) || !pr_source_recover(conn, error))
		return FALSE;
	/* The destination has answered, so it has handled what was sent before. */
	source->holes_sent = TRUE;
	pr_handover_update(source);
	pr_source_report_guest(conn);
	pr_crash_point(PR_CRASH_SOURCE_RECOVERED);
	return TRUE;
}

/* From recover-setup to postcopy-active. NULL: back to paused, or completed. */
static PrConn *recover(PrSource *source)
{
	PrSession *session = source->session;
	g_autoptr(GError) error = NULL;
	PrConn *conn = NULL;

	if (!begin_recovery(source))
		return NULL;
	PrConnectOutcome outcome = pr_source_connect_any(source, &conn, &error);
	if (outcome == PR_CONNECT_COMPLETED) {
		pr_session_step(session, PR_EVENT_SHUT, "the destination had every page already",
				NULL);
		return NULL;
	}
	if (outcome == PR_CONNECT_UP && recover_over(source, conn, &error))
		return conn;
	pr_session_attempt_failed(session, error);
	if (conn)
		pr_conn_close(conn);
	return NULL;
}

/* ---- the owner ---- */

/* From postcopy on, until everything has moved or the engine is to end. conn: NULL: paused. */
static void run_until_complete(PrSource *source, PrConn *conn)
{
	guint failed_attempts = 0;

	for (;;) {
		if (conn) {
			failed_attempts = 0;
			serve_pull(source, conn);
		}
		if (wait_for_recovery(source, failed_attempts) == PAUSE_OVER)
			break;
		conn = recover(source);
		failed_attempts++;
	}
	pr_watch_enter(source->watch, &closing);
	pr_standby_stop(source);
}

static void note_end(PrSource *source)
{
	gboolean completed = pr_session_state(source->session) == PR_STATE_COMPLETED;

	if (completed)
		pr_handover_completed(source);
	pr_source_await_fence(source);
	if (completed)
		pr_source_unfence(source);
}

/* The owner of the last migration may still be closing its connection. */
static void await_previous_owner(PrSession *session)
{
	pr_session_lock(session);
	GThread *previous = g_steal_pointer(&session->previous_thread);
	pr_session_unlock(session);
	if (previous)
		g_thread_join(previous);
}

gpointer pr_source_thread(gpointer opaque)
{
	PrSource *source = opaque;
	g_autoptr(GError) error = NULL;
	g_autoptr(PrWatch) watch = pr_watch_new(source->session->watchdog, "migration");
	PrConn *conn = NULL;

	pr_watch_enter(watch, &closing);
	await_previous_owner(source->session);
	source->watch = watch;
	if (!pr_source_switch_over(source, &conn, &error)) {
		undo(source, conn, error);
		return NULL;
	}
	run_until_complete(source, conn);
	note_end(source);
	return NULL;
}

gpointer pr_source_resumed_thread(gpointer opaque)
{
	PrSource *source = opaque;
	g_autoptr(PrWatch) watch = pr_watch_new(source->session->watchdog, "migration");

	source->watch = watch;
	pr_source_fence_again(source);
	run_until_complete(source, NULL);
	note_end(source);
	return NULL;
}

void pr_source_init(PrSource *source, PrSession *session)
{
	source->session = session;
	source->keepers = g_ptr_array_new();
}

void pr_source_clear(PrSource *source)
{
	pr_handover_forget(source);
	pr_handover_record_free(source->record);
	g_clear_pointer(&source->uris, g_ptr_array_unref);
	g_ptr_array_unref(source->keepers);
	g_free(source->last_path);
	g_free(source->claimed);
}
