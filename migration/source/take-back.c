/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The source's guest runs on, after a failure between its stop and RUN: a failure of this engine,
 * or of one that has died (resume.c).
 *
 * The obstacle passes, as a rule: the destination still holds a lock on a disk image, or QEMU is
 * busy. And the guest runs nowhere else. So the engine tries until the guest runs, and stops only
 * when the guest's process is gone or the engine itself is to end. Then the record still says
 * `stopping`, and the next engine goes on trying.
 */
#include "migration/source/take-back.h"

#include "migration/memory/invariants.h"
#include "migration/source/handover.h"

#define BACKOFF_MIN_US (100 * 1000) /* between two tries, doubling */
#define BACKOFF_MAX_US (2 * G_USEC_PER_SEC)
#define REPORT_US      (10 * G_USEC_PER_SEC) /* between two reports */

static const PrWatchPoint resuming = {"letting the guest run on", 1000};

gboolean pr_source_try_run(PrSource *source, gboolean follows, GError **error)
{
	PrSession *session = source->session;
	const PrGuestOps *ops = session->guest->ops;

	pr_invariant_may_run(follows ? source->record->stage != PR_HANDOVER_STOPPING
				     : source->run_may_be_seen);
	return (!follows ||
		ops->assume_stopped(session->guest, source->record->was_running, error)) &&
	       ops->unfence(session->guest, error) && ops->resume(session->guest, error);
}

static void report(PrSession *session, const GError *why, gint64 *reported)
{
	gint64 now = g_get_monotonic_time();
	g_autofree char *words = g_strdup_printf(
		"the guest does not run on here yet: %s; trying until it does", why->message);

	if (*reported && now - *reported < REPORT_US)
		return;
	*reported = now;
	pr_session_lock(session);
	pr_session_note_locked(session, words);
	pr_session_unlock(session);
}

/* FALSE: the guest's process is gone, or the engine is to end. */
static gboolean wait_for_retry(PrSession *session, gint64 us)
{
	gint64 until = g_get_monotonic_time() + us;

	pr_session_lock(session);
	while (!session->quit && !session->guest_gone &&
	       g_cond_wait_until(&session->changed, &session->lock, until))
		;
	gboolean go_on = !session->quit && !session->guest_gone;
	pr_session_unlock(session);
	return go_on;
}

/* FALSE: the guest's process is gone, or the engine is to end. */
static gboolean try_until_it_runs(PrSource *source, gboolean follows, GError **error)
{
	PrSession *session = source->session;
	gint64 reported = 0;

	for (gint64 pause = BACKOFF_MIN_US;; pause = MIN(2 * pause, BACKOFF_MAX_US)) {
		g_autoptr(GError) why = NULL;

		pr_watch_enter(source->watch, &resuming);
		if (pr_source_try_run(source, follows, &why))
			return TRUE;
		report(session, why, &reported);
		pr_watch_idle(source->watch);
		if (wait_for_retry(session, pause))
			continue;
		g_propagate_error(error, g_steal_pointer(&why));
		return FALSE;
	}
}

void pr_source_take_back(PrSource *source, gboolean follows)
{
	PrSession *session = source->session;
	g_autoptr(GError) error = NULL;
	g_autofree char *words = NULL;

	if (try_until_it_runs(source, follows, &error)) {
		pr_handover_aborted(source);
		words = g_strdup("the guest runs on at the source");
	} else {
		words = g_strdup_printf(
			"the guest does not run: %s; if it is still there, start this engine with "
			"--resume, which tries again",
			error->message);
		g_critical("%s", words);
	}
	pr_session_step(session, PR_EVENT_CLEANED_UP, words, NULL);
}

gpointer pr_source_take_back_thread(gpointer opaque)
{
	PrSource *source = opaque;
	PrSession *session = source->session;
	g_autoptr(PrWatch) watch = pr_watch_new(session->watchdog, "migration");

	source->watch = watch;
	pr_source_take_back(source, /* follows= */ TRUE);
	return NULL;
}
