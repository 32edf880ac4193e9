/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The watch over a guest that may run elsewhere. QMP's reader sees the events RESUME and RESET and hands them to the
 * watch's thread, which sends `stop` and says what became of it.
 *
 * `stop` may hang. A vCPU that was let run waits at its first write where the RAM is write-protected (the fence), and
 * QEMU waits for the vCPU, with its monitor. Nothing is lost by that; the answer comes when the fence
 * is lifted. So QMP's timeout bounds each call, and the thread says that it has not been answered.
 */
#include "guest/qemu-watch.h"

#include "guest/json.h"

#define RETRY_US                                                                                   \
	G_USEC_PER_SEC /* between two tries to reach QMP, or to stop a guest that QEMU does not */

/* What there is to be done; a set. */
typedef enum Seen {
	SEEN_BEGIN = 1 << 0,  /* the watch has begun: does the guest run already? */
	SEEN_RESUME = 1 << 1, /* QEMU let it run */
	SEEN_RESET = 1 << 2,  /* QEMU has reset it */
} Seen;

struct PrQemuWatch {
	PrQemuWatchQmp connect; /* constant */
	void *connect_opaque;	/* constant */

	GMutex life;	 /* held by begin() and end(); taken before the others */
	GThread *thread; /* life; NULL: there is no watch */

	GMutex telling;		   /* held while ran_again is called; taken before lock */
	PrGuestRanAgain ran_again; /* telling */
	void *ran_again_opaque;	   /* telling */

	gint64 acting_on; /* the thread's; seen_at of what it is at */

	GMutex lock;
	GCond cond;	 /* lock; seen or ending changed */
	guint seen;	 /* lock; of Seen */
	gint64 seen_at;	 /* lock; when the first of them came; monotonic us, 0: before the watch */
	gboolean begun;	 /* lock; events count */
	gboolean ending; /* lock */
};

/* ---- the watch's thread ---- */

static void tell(PrQemuWatch *watch, const char *what)
{
	g_mutex_lock(&watch->telling);
	if (watch->ran_again)
		watch->ran_again(what, watch->acting_on, watch->ran_again_opaque);
	else
		g_warning("%s", what);
	g_mutex_unlock(&watch->telling);
}

/* FALSE: the watch ends. */
static gboolean rest(PrQemuWatch *watch)
{
	gint64 until = g_get_monotonic_time() + RETRY_US;

	g_mutex_lock(&watch->lock);
	while (!watch->ending && g_cond_wait_until(&watch->cond, &watch->lock, until))
		;
	gboolean go_on = !watch->ending;
	g_mutex_unlock(&watch->lock);
	return go_on;
}

/* A QEMU that does not answer may have been told to let the guest run: then it hangs in the fence. */
static void tell_silence(PrQemuWatch *watch, const GError *error)
{
	g_autofree char *words = g_strdup_printf(
		"whether QEMU lets the guest run is not known: %s; it may have been told to, and wait "
		"for the write protection to end",
		error->message);

	tell(watch, words);
}

/* NULL: the watch ends before there is one. */
static PrQmp *reach(PrQemuWatch *watch)
{
	gboolean told = FALSE;

	for (;;) {
		g_autoptr(GError) error = NULL;
		PrQmp *qmp = watch->connect(watch->connect_opaque, &error);

		if (qmp)
			return qmp;
		if (!told)
			tell_silence(watch, error);
		told = TRUE;
		if (!rest(watch))
			return NULL;
	}
}

static void tell_stop(PrQemuWatch *watch, const char *what, const GError *error)
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
	tell(watch, words);
}

/* A `stop` that QEMU refuses is sent again; one that it has not answered it will carry out. */
static void stop_guest(PrQemuWatch *watch, PrQmp *qmp, const char *what)
{
	gboolean refused, told = FALSE;

	do {
		g_autoptr(GError) error = NULL;

		pr_qmp_command(qmp, "stop", NULL, -1, &error);
		refused = g_error_matches(error, PR_GUEST_ERROR, PR_GUEST_ERROR_REFUSED);
		if (!told || !refused)
			tell_stop(watch, what, error);
		told = TRUE;
	} while (refused && rest(watch));
}

/* Events before the watch began were not recorded: QEMU is asked. */
static void look(PrQemuWatch *watch, PrQmp *qmp)
{
	gboolean told = FALSE;

	do {
		g_autoptr(GError) error = NULL;
		g_autoptr(JsonObject) status = pr_qmp_query(qmp, "query-status", &error);

		if (status && pr_json_boolean(status, "running"))
			stop_guest(watch, qmp, "QEMU lets the guest run already");
		if (status)
			return;
		if (!told)
			tell_silence(watch, error);
		told = TRUE;
	} while (rest(watch));
}

static void act(PrQemuWatch *watch, PrQmp *qmp, guint seen)
{
	if (seen & SEEN_RESUME)
		stop_guest(watch, qmp, "QEMU has let the guest run (event RESUME)");
	else if (seen & SEEN_BEGIN)
		look(watch, qmp);
	if (seen & SEEN_RESET)
		tell(watch, "QEMU has reset the guest (event RESET); it does not run");
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
	PrQmp *qmp = reach(watch);
	guint seen;

	while (qmp && wait_seen(watch, &seen))
		act(watch, qmp, seen);
	return NULL;
}

/* ---- for the others ---- */

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
	g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&watch->life);

	set_begun(watch, TRUE);
	if (!watch->thread)
		watch->thread = g_thread_try_new("qemu-watch", watch_thread, watch, error);
	return watch->thread != NULL;
}

void pr_qemu_watch_end(PrQemuWatch *watch)
{
	g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&watch->life);

	set_begun(watch, FALSE);
	if (watch->thread)
		g_thread_join(g_steal_pointer(&watch->thread));
}

void pr_qemu_watch_observe(PrQemuWatch *watch, PrGuestRanAgain ran_again, void *opaque)
{
	g_mutex_lock(&watch->telling);
	watch->ran_again = ran_again;
	watch->ran_again_opaque = opaque;
	g_mutex_unlock(&watch->telling);
}

PrQemuWatch *pr_qemu_watch_new(PrQemuWatchQmp connect, void *opaque)
{
	PrQemuWatch *watch = g_new0(PrQemuWatch, 1);

	watch->connect = connect;
	watch->connect_opaque = opaque;
	g_mutex_init(&watch->life);
	g_mutex_init(&watch->telling);
	g_mutex_init(&watch->lock);
	g_cond_init(&watch->cond);
	return watch;
}

void pr_qemu_watch_free(PrQemuWatch *watch)
{
	pr_qemu_watch_end(watch);
	g_mutex_clear(&watch->life);
	g_mutex_clear(&watch->telling);
	g_mutex_clear(&watch->lock);
	g_cond_clear(&watch->cond);
	g_free(watch);
}
