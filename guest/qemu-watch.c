/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The watch over a guest that may run elsewhere. QMP's reader thread sees the events RESUME and
 * RESET, and passes them to the watch's thread. That sends `stop` and reports the outcome.
 *
 * `stop` may hang. Where the RAM is write-protected (the fence), a vCPU that was let run waits at
 * its first write. QEMU's main loop with its monitor waits for the vCPU. No data are lost by that,
 * and the answer comes when the fence ends. So QMP's timeout bounds each call, and the thread
 * reports that there was no answer.
 */
#include "guest/qemu-watch.h"

#include "guest/json.h"

#define RETRY_US G_USEC_PER_SEC /* between two tries to reach QMP, or to stop a guest */

/* Events that the watch's thread has to handle; a set. */
typedef enum Seen {
	SEEN_BEGIN = 1 << 0,  /* the watch has begun; the guest may run already */
	SEEN_RESUME = 1 << 1, /* QEMU has let it run */
	SEEN_RESET = 1 << 2,  /* QEMU has reset it */
} Seen;

struct PrQemuWatch {
	PrQemuWatchQmp connect; /* constant */
	void *connect_opaque;	/* constant */

	GMutex lifecycle; /* held by begin() and end(); taken before the other locks */
	GThread *thread;  /* lifecycle; NULL: no watch runs */

	GMutex calling;		   /* held while ran_again is called; taken before lock */
	PrGuestRanAgain ran_again; /* calling */
	void *ran_again_opaque;	   /* calling */

	gint64 acting_on; /* the watch's thread; seen_at of the events that it handles */

	GMutex lock;
	GCond cond; /* lock; seen or ending changed */
	guint seen; /* lock; of Seen */
	/* lock; the time of the first of them, monotonic us; 0: before the watch began */
	gint64 seen_at;
	gboolean begun;	 /* lock; FALSE: events are ignored */
	gboolean ending; /* lock */
};

/* The watch's thread */

static void report(PrQemuWatch *watch, const char *what)
{
	g_mutex_lock(&watch->calling);
	if (watch->ran_again)
		watch->ran_again(what, watch->acting_on, watch->ran_again_opaque);
	else
		g_warning("%s", what);
	g_mutex_unlock(&watch->calling);
}

/* FALSE: the watch ends. */
static gboolean wait_before_retry(PrQemuWatch *watch)
{
	gint64 until = g_get_monotonic_time() + RETRY_US;

	g_mutex_lock(&watch->lock);
	while (!watch->ending && g_cond_wait_until(&watch->cond, &watch->lock, until))
		;
	gboolean go_on = !watch->ending;
	g_mutex_unlock(&watch->lock);
	return go_on;
}

/* A QEMU that does not answer may have let the guest run, and hang in the fence. */
static void report_silence(PrQemuWatch *watch, const GError *error)
{
	g_autofree char *words = g_strdup_printf(
		"whether QEMU lets the guest run is not known: %s; it may have been told to, and "
		"wait for the write protection to end",
		error->message);

	report(watch, words);
}

/* NULL: the watch ends before QMP is connected. */
static PrQmp *connect_qmp(PrQemuWatch *watch)
{
	gboolean reported = FALSE;

	for (;;) {
		g_autoptr(GError) error = NULL;
		PrQmp *qmp = watch->connect(watch->connect_opaque, &error);

		if (qmp)
			return qmp;
		if (!reported)
			report_silence(watch, error);
		reported = TRUE;
		if (!wait_before_retry(watch))
			return NULL;
	}
}

static void report_stop(PrQemuWatch *watch, const char *what, const GError *error)
{
	g_autofree char *words = NULL;

	if (!error)
		words = g_strdup_printf("%s; it was told to stop, and has stopped", what);
	else if (g_error_matches(error, PR_GUEST_ERROR, PR_GUEST_ERROR_TIMEOUT))
		words = g_strdup_printf(
			"%s; it was told to stop, and has not yet (%s): a vCPU that waits for the "
			"write protection to end holds QEMU up",
			what, error->message);
	else
		words = g_strdup_printf("%s; it was told to stop, and could not be stopped: %s",
					what, error->message);
	report(watch, words);
}

/* Sends `stop` again if QEMU refuses it. QEMU executes a `stop` that it has not answered when its
 * main loop goes on. */
static void stop_guest(PrQemuWatch *watch, PrQmp *qmp, const char *what)
{
	gboolean refused, reported = FALSE;

	do {
		g_autoptr(GError) error = NULL;

		pr_qmp_command(qmp, "stop", NULL, -1, &error);
		refused = g_error_matches(error, PR_GUEST_ERROR, PR_GUEST_ERROR_REFUSED);
		if (!reported || !refused)
			report_stop(watch, what, error);
		reported = TRUE;
	} while (refused && wait_before_retry(watch));
}

/* Events from before the watch were not recorded, so the thread asks QEMU. */
static void check_running(PrQemuWatch *watch, PrQmp *qmp)
{
	gboolean reported = FALSE;

	do {
		g_autoptr(GError) error = NULL;
		g_autoptr(JsonObject) status = pr_qmp_query(qmp, "query-status", &error);

		if (status && pr_json_boolean(status, "running"))
			stop_guest(watch, qmp, "QEMU lets the guest run already");
		if (status)
			return;
		if (!reported)
			report_silence(watch, error);
		reported = TRUE;
	} while (wait_before_retry(watch));
}

static void handle_seen(PrQemuWatch *watch, PrQmp *qmp, guint seen)
{
	if (seen & SEEN_RESUME)
		stop_guest(watch, qmp, "QEMU has let the guest run (event RESUME)");
	else if (seen & SEEN_BEGIN)
		check_running(watch, qmp);
	if (seen & SEEN_RESET)
		report(watch, "QEMU has reset the guest (event RESET); it does not run");
}

/* FALSE: the watch ends. */
static gboolean wait_seen(PrQemuWatch *watch, guint *ret_seen)
{
	g_mutex_lock(&watch->lock);
	/* Ended by an event, or by pr_qemu_watch_end(). */
	while (!watch->ending && !watch->seen)
		g_cond_wait(&watch->cond, &watch->lock);
	gboolean go_on = !watch->ending;
	*ret_seen = watch->seen;
	watch->acting_on = watch->seen_at;
	watch->seen = 0;
	g_mutex_unlock(&watch->lock);
	return go_on;
}

static gpointer watch_thread(gpointer opaque)
{
	PrQemuWatch *watch = opaque;
	PrQmp *qmp = connect_qmp(watch);
	guint seen;

	while (qmp && wait_seen(watch, &seen))
		handle_seen(watch, qmp, seen);
	return NULL;
}

/* Called by other threads */

void pr_qemu_watch_event(PrQemuWatch *watch, const char *name)
{
	guint seen = g_str_equal(name, "RESUME")  ? SEEN_RESUME
		     : g_str_equal(name, "RESET") ? SEEN_RESET
						  : 0;

	if (!seen)
		return;
	g_mutex_lock(&watch->lock);
	if (watch->begun) {
		if (!watch->seen)
			watch->seen_at = g_get_monotonic_time();
		watch->seen |= seen;
		g_cond_broadcast(&watch->cond);
	}
	g_mutex_unlock(&watch->lock);
}

static void set_begun(PrQemuWatch *watch, gboolean begun)
{
	g_mutex_lock(&watch->lock);
	watch->begun = begun;
	watch->ending = !begun;
	watch->seen = begun ? watch->seen | SEEN_BEGIN : 0;
	watch->seen_at = 0;
	g_cond_broadcast(&watch->cond);
	g_mutex_unlock(&watch->lock);
}

gboolean pr_qemu_watch_begin(PrQemuWatch *watch, GError **error)
{
	g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&watch->lifecycle);

	set_begun(watch, TRUE);
	if (!watch->thread)
		watch->thread = g_thread_try_new("qemu-watch", watch_thread, watch, error);
	return watch->thread != NULL;
}

void pr_qemu_watch_end(PrQemuWatch *watch)
{
	g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&watch->lifecycle);

	set_begun(watch, FALSE);
	if (watch->thread)
		g_thread_join(g_steal_pointer(&watch->thread));
}

void pr_qemu_watch_observe(PrQemuWatch *watch, PrGuestRanAgain ran_again, void *opaque)
{
	g_mutex_lock(&watch->calling);
	watch->ran_again = ran_again;
	watch->ran_again_opaque = opaque;
	g_mutex_unlock(&watch->calling);
}

PrQemuWatch *pr_qemu_watch_new(PrQemuWatchQmp connect, void *opaque)
{
	PrQemuWatch *watch = g_new0(PrQemuWatch, 1);

	watch->connect = connect;
	watch->connect_opaque = opaque;
	g_mutex_init(&watch->lifecycle);
	g_mutex_init(&watch->calling);
	g_mutex_init(&watch->lock);
	g_cond_init(&watch->cond);
	return watch;
}

void pr_qemu_watch_free(PrQemuWatch *watch)
{
	pr_qemu_watch_end(watch);
	g_mutex_clear(&watch->lifecycle);
	g_mutex_clear(&watch->calling);
	g_mutex_clear(&watch->lock);
	g_cond_clear(&watch->cond);
	g_free(watch);
}
