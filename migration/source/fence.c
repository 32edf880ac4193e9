/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The fence of the source's RAM, and the watch over its guest.
 *
 * The destination reads the source's RAM until all of it has moved. Whoever lets the guest run at
 * the source in that time, or resets it, would change pages that are still to be read. The
 * destination's memory would be wrong, and nobody would know. So right after RUN, where it costs no
 * downtime, the guest's RAM is write-protected in its process (guest/guest.h), and the guest is
 * watched. The kernel keeps the fence when this engine dies. The next engine fences again, which is
 * harmless, and watches.
 *
 * Where the protection is not possible the watch remains, and both sides are told so. Both are also
 * told when the watch has seen something. The fence is lifted when everything has moved: the
 * source's RAM does not matter any more.
 *
 * A thread of its own fences: it takes long for much RAM, and meanwhile the owner has to serve its
 * connection. The protection does not cover the time from RUN until the fence stands. The watch
 * does.
 */
#include "migration/source/fence.h"

#include "migration/core/crash-point.h"
#include "migration/session/messages.h"
#include "util/try-alloc.h"

#define RETRY_US G_USEC_PER_SEC /* between two tries to fence */

/* Walking the page tables takes about 70 ms for a GiB of present pages, 1 ms for a GiB of absent
 * ones. */
static const PrWatchPoint fencing = {"write-protecting the guest's RAM", 10000};

/* What follows from a guest that ran, or was reset, at that time. With the lock held. */
static const char *consequence(const PrSession *session, gint64 seen)
{
	if (session->sm.state == PR_STATE_COMPLETED)
		return "all its memory had moved: the destination reads nothing there any more";
	if (session->fence.state == PR_FENCE_ON && session->fence.since <= seen)
		return "its RAM is write-protected: what the destination reads has not changed";
	return "its RAM was not write-protected then: what the destination has read of it since "
	       "may be wrong";
}

void pr_source_ran_again(const char *what, gint64 seen, void *opaque)
{
	PrSession *session = ((PrSource *)opaque)->session;

	pr_session_lock(session);
	g_free(session->fence.ran_again);
	session->fence.ran_again =
		g_strdup_printf("the guest at the source, which was handed over: %s; %s", what,
				consequence(session, seen));
	pr_session_alarm_locked(session, session->fence.ran_again);
	if (session->conn)
		pr_send_reason_nowait(session->conn, PR_MSG_NOTE, session->fence.ran_again);
	pr_session_unlock(session);
}

static void note_refused(PrSession *session, const char *why)
{
	pr_session_lock(session);
	session->fence.state = PR_FENCE_REFUSED;
	g_free(session->fence.refused);
	session->fence.refused = g_strdup_printf(
		"the source's RAM is not write-protected: %s; its engine watches instead", why);
	pr_session_note_locked(session, session->fence.refused);
	if (session->conn)
		pr_send_reason_nowait(session->conn, PR_MSG_NOTE, session->fence.refused);
	pr_session_unlock(session);
}

static void note_fenced(PrSession *session, gint64 began)
{
	pr_session_lock(session);
	if (session->fence.state != PR_FENCE_ON)
		session->fence.since = g_get_monotonic_time();
	session->fence.state = PR_FENCE_ON;
	if (session->fence.refused)
		pr_session_note_locked(session, "the source's RAM is write-protected now");
	g_clear_pointer(&session->fence.refused, g_free);
	pr_session_unlock(session);
	g_info("the source's RAM is write-protected, which took %.1f ms",
	       (double)(g_get_monotonic_time() - began) / 1e3);
}

/* A kernel without such protection, or a guest that has ended, will be no different in a second. */
static gboolean is_worth_a_retry(const GError *error)
{
	return g_error_matches(error, PR_GUEST_ERROR, PR_GUEST_ERROR_REFUSED) ||
	       g_error_matches(error, PR_GUEST_ERROR, PR_GUEST_ERROR_TIMEOUT);
}

/* Waits before the next try. FALSE: no RAM has to be protected any more, or the engine is to
 * end. */
static gboolean wait_for_retry(PrSession *session)
{
	gint64 until = g_get_monotonic_time() + RETRY_US;

	pr_session_lock(session);
	while (pr_state_is_postcopy(session->sm.state) && !session->quit && !session->guest_gone &&
	       g_cond_wait_until(&session->changed, &session->lock, until))
		;
	gboolean go_on =
		pr_state_is_postcopy(session->sm.state) && !session->quit && !session->guest_gone;
	pr_session_unlock(session);
	return go_on;
}

/* The obstacle may pass: QEMU's main thread was busy for longer than the helper waits. */
static gpointer fence_thread(gpointer opaque)
{
	PrSession *session = ((PrSource *)opaque)->session;
	g_autoptr(PrWatch) watch = pr_watch_new(session->watchdog, "fence");
	gint64 began = g_get_monotonic_time();

	for (gboolean reported = FALSE;; reported = TRUE) {
		g_autoptr(GError) error = NULL;

		pr_watch_enter(watch, &fencing);
		if (session->guest->ops->fence(session->guest, &error)) {
			note_fenced(session, began);
			break;
		}
		if (!reported && !g_error_matches(error, PR_GUEST_ERROR, PR_GUEST_ERROR_DIED))
			note_refused(session, error->message);
		pr_watch_idle(watch);
		if (!is_worth_a_retry(error) || !wait_for_retry(session))
			break;
	}
	pr_crash_point(PR_CRASH_SOURCE_FENCED);
	return NULL;
}

void pr_source_fence(PrSource *source)
{
	g_autoptr(GError) error = NULL;

	source->fence_thread = pr_thread_try("fence", fence_thread, source, &error);
	/* Without a thread the owner fences. */
	if (!source->fence_thread)
		fence_thread(source);
}

void pr_source_await_fence(PrSource *source)
{
	if (source->fence_thread)
		g_thread_join(g_steal_pointer(&source->fence_thread));
}

void pr_source_fence_again(PrSource *source)
{
	PrSession *session = source->session;

	pr_session_lock(session);
	if (session->guest->ops->was_fenced(session->guest)) {
		session->fence.state = PR_FENCE_ON;
		session->fence.since = 0;
	}
	pr_session_unlock(session);
	pr_source_fence(source);
}

void pr_source_unfence(PrSource *source)
{
	PrSession *session = source->session;

	pr_source_await_fence(source);
	if (pr_session_lift_fence(session)) {
		pr_session_lock(session);
		session->fence.state = PR_FENCE_NONE;
		pr_session_unlock(session);
	}
	pr_crash_point(PR_CRASH_SOURCE_UNFENCED);
}

void pr_source_report_guest(PrConn *conn)
{
	PrSession *session = conn->session;

	pr_session_lock(session);
	if (session->guest_gone)
		pr_send_reason_nowait(
			conn, PR_MSG_NOTE,
			"the source's guest process is gone, its RAM is in its engine alone");
	if (session->fence.refused)
		pr_send_reason_nowait(conn, PR_MSG_NOTE, session->fence.refused);
	if (session->fence.ran_again)
		pr_send_reason_nowait(conn, PR_MSG_NOTE, session->fence.ran_again);
	pr_session_unlock(session);
}
