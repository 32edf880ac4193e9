/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The source's guest runs on, after a failure between its stop and RUN: this engine's own, or one that another
 * engine has left (resume.c).
 *
 * What keeps it from running passes, as a rule: the destination still holds a lock on a disk image, or QEMU is busy. And
 * the guest runs nowhere else. So the engine tries until it runs, and ends only when the guest's process is gone or
 * the engine itself is to end; then the record still says `stopping`, and the next engine goes on trying.
 */
#include "migration/session/session.h"
#include "migration/memory/invariants.h"

#define BACKOFF_MIN_US (100 * 1000) /* between two tries, doubling */
#define BACKOFF_MAX_US (2 * G_USEC_PER_SEC)
#define SAY_AGAIN_US   (10 * G_USEC_PER_SEC) /* between two words about it */

static const PrWatchPoint resuming = {"letting the guest run on", 1000};

gboolean pr_source_try_run(PrMigration *m, gboolean follows, GError **error)
{
	const PrGuestOps *ops = m->guest->ops;

	pr_invariant_may_run(follows ? m->record->stage != PR_HANDOVER_STOPPING
				     : m->run_may_be_seen);
	return (!follows || ops->assume_stopped(m->guest, m->record->was_running, error)) &&
	       ops->unfence(m->guest, error) && ops->resume(m->guest, error);
}

static void say(PrMigration *m, const GError *why, gint64 *said)
{
	gint64 now = g_get_monotonic_time();
	g_autofree char *words = g_strdup_printf(
		"the guest does not run on here yet: %s; trying until it does", why->message);

	if (*said && now - *said < SAY_AGAIN_US)
		return;
	*said = now;
	g_mutex_lock(&m->lock);
	pr_migration_note_locked(m, words);
	g_mutex_unlock(&m->lock);
	pr_session_flush_events(m);
}

/* FALSE: the guest's process is gone, or the engine is to end. */
static gboolean rest(PrMigration *m, gint64 us)
{
	gint64 until = g_get_monotonic_time() + us;

	g_mutex_lock(&m->lock);
	while (!m->quit && !m->guest_gone && g_cond_wait_until(&m->changed, &m->lock, until))
		;
	gboolean go_on = !m->quit && !m->guest_gone;
	g_mutex_unlock(&m->lock);
	return go_on;
}

gboolean pr_source_let_run(PrMigration *m, gboolean follows, GError **error)
{
	gint64 said = 0;

	for (gint64 pause = BACKOFF_MIN_US;; pause = MIN(2 * pause, BACKOFF_MAX_US)) {
		g_autoptr(GError) why = NULL;

		pr_watch_enter(m->watch, &resuming);
		if (pr_source_try_run(m, follows, &why))
			return TRUE;
		say(m, why, &said);
		pr_watch_idle(m->watch);
		if (rest(m, pause))
			continue;
		g_propagate_error(error, g_steal_pointer(&why));
		return FALSE;
	}
}

void pr_source_take_back(PrMigration *m, gboolean follows)
{
	g_autoptr(GError) error = NULL;
	g_autofree char *words = NULL;

	if (pr_source_let_run(m, follows, &error)) {
		pr_handover_aborted(m);
		words = g_strdup("the guest runs on at the source");
	} else {
		words = g_strdup_printf(
			"the guest does not run: %s; if it is still there, start this engine with "
			"--resume, which tries again",
			error->message);
		g_critical("%s", words);
	}
	pr_migration_step(m, PR_EVENT_CLEANED_UP, words, NULL);
}

gpointer pr_source_take_back_thread(gpointer migration)
{
	PrMigration *m = migration;
	g_autoptr(PrWatch) watch = pr_watch_new(m->watchdog, "migration");

	m->watch = watch;
	pr_source_take_back(m, /* follows= */ TRUE);
	return NULL;
}
