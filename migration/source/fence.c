/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The fence of the source's RAM, and the watch over its guest.
 *
 * The destination reads the source's RAM until all of it has moved. Whoever lets the guest run at the source in
 * that time, or resets it, would change what is still to be read: the destination's memory would be wrong and
 * nobody would know. So right behind RUN, where it costs no downtime, the guest's RAM is write-protected in its
 * process (guest.h), and the guest is watched. The kernel keeps the fence when this engine dies; the engine that follows
 * fences again, which is harmless, and watches.
 *
 * Where the protection can't be had the watch remains, and both sides are told so. Both are told, too, when the watch
 * has seen something. When everything has moved the fence is lifted: what the source's RAM holds matters to nobody.
 *
 * A thread of its own fences, as it takes long for much RAM, and the owner has a connection to look after, and perhaps to
 * replace. Not covered by the protection: the time from RUN until the fence stands. It is watched.
 */
#include "migration/session/session.h"
#include "migration/core/crash-point.h"
#include "util/try-alloc.h"

#define RETRY_US G_USEC_PER_SEC /* between two tries to fence */

/* Walking the page tables takes some 70 ms a GiB of pages that are there, 1 ms a GiB of pages that are not. */
static const PrWatchPoint fencing = {"write-protecting the guest's RAM", 10000};

/* What it means that the guest was let run, or reset, at that time. With the lock held. */
static const char *consequence(const PrMigration *m, gint64 seen)
{
	if (m->sm.state == PR_STATE_COMPLETED)
		return "all its memory had moved: the destination reads nothing there any more";
	if (m->fence == PR_FENCE_ON && m->fenced_at <= seen)
		return "its RAM is write-protected: what the destination reads has not changed";
	return "its RAM was not write-protected then: what the destination has read of it since may "
	       "be wrong";
}

/* PrGuestRanAgain */
void pr_source_ran_again(const char *what, gint64 seen, void *opaque)
{
	PrMigration *m = opaque;

	g_mutex_lock(&m->lock);
	g_free(m->ran_again);
	m->ran_again = g_strdup_printf("the guest at the source, which was handed over: %s; %s",
				       what, consequence(m, seen));
	pr_migration_alarm_locked(m, m->ran_again);
	if (m->conn)
		pr_send_reason_nowait(m->conn, PR_MSG_NOTE, m->ran_again);
	g_mutex_unlock(&m->lock);
	pr_session_flush_events(m);
}

static void note_refused(PrMigration *m, const char *why)
{
	g_mutex_lock(&m->lock);
	m->fence = PR_FENCE_REFUSED;
	g_free(m->unfenced);
	m->unfenced = g_strdup_printf(
		"the source's RAM is not write-protected: %s; its engine watches instead", why);
	pr_migration_note_locked(m, m->unfenced);
	if (m->conn)
		pr_send_reason_nowait(m->conn, PR_MSG_NOTE, m->unfenced);
	g_mutex_unlock(&m->lock);
	pr_session_flush_events(m);
}

static void note_fenced(PrMigration *m, gint64 began)
{
	g_mutex_lock(&m->lock);
	if (m->fence != PR_FENCE_ON)
		m->fenced_at = g_get_monotonic_time();
	m->fence = PR_FENCE_ON;
	if (m->unfenced)
		pr_migration_note_locked(m, "the source's RAM is write-protected now");
	g_clear_pointer(&m->unfenced, g_free);
	g_mutex_unlock(&m->lock);
	pr_session_flush_events(m);
	g_info("the source's RAM is write-protected, which took %.1f ms",
	       (double)(g_get_monotonic_time() - began) / 1e3);
}

/* Neither a kernel that has no such protection nor an end will be different in a second. */
static gboolean may_pass(const GError *error)
{
	return g_error_matches(error, PR_GUEST_ERROR, PR_GUEST_ERROR_REFUSED) ||
	       g_error_matches(error, PR_GUEST_ERROR, PR_GUEST_ERROR_TIMEOUT);
}

/* Waits before the next try. FALSE: nothing is left that has to be protected, or the engine is to end. */
static gboolean rest(PrMigration *m)
{
	gint64 until = g_get_monotonic_time() + RETRY_US;

	g_mutex_lock(&m->lock);
	while (pr_state_is_postcopy(m->sm.state) && !m->quit && !m->guest_gone &&
	       g_cond_wait_until(&m->changed, &m->lock, until))
		;
	gboolean go_on = pr_state_is_postcopy(m->sm.state) && !m->quit && !m->guest_gone;
	g_mutex_unlock(&m->lock);
	return go_on;
}

/* What keeps it from standing may pass: QEMU's main thread was busy for longer than the helper waits. */
static gpointer fence_thread(gpointer migration)
{
	PrMigration *m = migration;
	g_autoptr(PrWatch) watch = pr_watch_new(m->watchdog, "fence");
	gint64 began = g_get_monotonic_time();

	for (gboolean told = FALSE;; told = TRUE) {
		g_autoptr(GError) error = NULL;

		pr_watch_enter(watch, &fencing);
		if (m->guest->ops->fence(m->guest, &error)) {
			note_fenced(m, began);
			break;
		}
		if (!told && !g_error_matches(error, PR_GUEST_ERROR, PR_GUEST_ERROR_DIED))
			note_refused(m, error->message);
		pr_watch_idle(watch);
		if (!may_pass(error) || !rest(m))
			break;
	}
	pr_crash_point(PR_CRASH_SOURCE_FENCED);
	return NULL;
}

void pr_source_fence(PrMigration *m)
{
	g_autoptr(GError) error = NULL;

	m->fencer = pr_thread_try("fence", fence_thread, m, &error);
	/* Without a thread the owner does it. */
	if (!m->fencer)
		fence_thread(m);
}

void pr_source_await_fence(PrMigration *m)
{
	if (m->fencer)
		g_thread_join(g_steal_pointer(&m->fencer));
}

void pr_source_fence_again(PrMigration *m)
{
	g_mutex_lock(&m->lock);
	if (m->guest->ops->was_fenced(m->guest)) {
		m->fence = PR_FENCE_ON;
		m->fenced_at = 0;
	}
	g_mutex_unlock(&m->lock);
	pr_source_fence(m);
}

/* FALSE: the guest's RAM is still write-protected. A guest whose process is gone has none of it. */
static gboolean lift(PrMigration *m)
{
	g_autoptr(GError) error = NULL;

	if (m->guest->ops->unfence(m->guest, &error) ||
	    g_error_matches(error, PR_GUEST_ERROR, PR_GUEST_ERROR_DIED))
		return TRUE;
	g_warning("the write protection of the guest's RAM could not be lifted: %s",
		  error->message);
	return FALSE;
}

void pr_source_unfence(PrMigration *m)
{
	pr_source_await_fence(m);
	if (lift(m)) {
		g_mutex_lock(&m->lock);
		m->fence = PR_FENCE_NONE;
		g_mutex_unlock(&m->lock);
	}
	pr_crash_point(PR_CRASH_SOURCE_UNFENCED);
}

void pr_migration_begin_unfenced(PrMigration *m)
{
	lift(m);
	g_mutex_lock(&m->lock);
	m->fence = PR_FENCE_NONE;
	g_clear_pointer(&m->unfenced, g_free);
	g_clear_pointer(&m->ran_again, g_free);
	g_mutex_unlock(&m->lock);
}

void pr_source_tell_guest(PrMigration *m, PrConn *conn)
{
	g_mutex_lock(&m->lock);
	if (m->guest_gone)
		pr_send_reason_nowait(
			conn, PR_MSG_NOTE,
			"the source's guest process is gone, its RAM is in its engine alone");
	if (m->unfenced)
		pr_send_reason_nowait(conn, PR_MSG_NOTE, m->unfenced);
	if (m->ran_again)
		pr_send_reason_nowait(conn, PR_MSG_NOTE, m->ran_again);
	g_mutex_unlock(&m->lock);
}
