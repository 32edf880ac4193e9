/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "util/stall-watchdog.h"

#include <stdio.h>
#include <unistd.h>

#include "util/try-alloc.h"

#define LATE_US		(100 * 1000) /* the watchdog woke up so late that the process was stopped */
#define STANDSTILL_US	G_USEC_PER_SEC /* the watchdog was so late that it is logged */
#define RUNNABLE_FACTOR 4	       /* a thread that only lacks a CPU may take so much longer */

struct PrWatch {
	PrWatchdog *watchdog;
	const char *name; /* constant */
	pid_t tid;	  /* constant */

	/* Atomic; written by the thread alone, `since` before `point`. The watchdog reads the
	 * point first, so it never takes a point to last for longer than it does. */
	gint64 since;		   /* us; 0: idle */
	const PrWatchPoint *point; /* NULL: none yet */

	/* PrWatchdog.lock */
	gint64 reported_since; /* when the stall began that was reported; 0: none */
	gint64 report_again;   /* when it has lasted so long, us */
	const PrWatchPoint *reported_point;
};

struct PrWatchdog {
	GThread *thread; /* NULL: not started */

	GMutex lock; /* of the rest */
	GCond changed;
	GPtrArray *watches;
	gboolean stop;
	gint64 checked; /* when the last check was */
	gint64 excused; /* time before this is not held against any thread */
	guint64 stalls;
	char *last;
};

static void report_clear(gpointer report)
{
	g_free(((PrWatchReport *)report)->text);
}

/* Takes the text. */
static void add_report(GArray *reports, GLogLevelFlags level, char *text)
{
	PrWatchReport report = {level, text};

	g_array_append_val(reports, report);
}

/* Whether a thread runs or waits for a CPU, as the scheduler sees it. */
static gboolean is_runnable(pid_t tid)
{
	char path[64], line[512], state = '?';
	FILE *file;

	snprintf(path, sizeof(path), "/proc/self/task/%d/stat", (int)tid);
	file = fopen(path, "re");
	if (file && fgets(line, sizeof(line), file)) {
		const char *at = g_strrstr(line, ") ");
		state = at ? at[2] : '?';
	}
	if (file)
		fclose(file);
	return state == 'R';
}

/* The doubling intervals start anew with each stall. */
static void report_stall(PrWatch *watch, const PrWatchPoint *point, gint64 since, gint64 lasts,
			 GArray *reports)
{
	PrWatchdog *watchdog = watch->watchdog;
	gboolean again = watch->reported_since == since;
	gboolean runnable = is_runnable(watch->tid);

	if (again ? lasts < watch->report_again
		  : runnable && lasts < (gint64)point->ms * 1000 * RUNNABLE_FACTOR)
		return;
	if (!again)
		watchdog->stalls++;
	watch->report_again = (again ? watch->report_again : (gint64)point->ms * 1000) * 2;
	watch->reported_since = since;
	watch->reported_point = point;
	g_free(watchdog->last);
	watchdog->last = g_strdup_printf("thread \"%s\": %s for %d ms", watch->name, point->what,
					 (int)(lasts / 1000));
	add_report(reports, G_LOG_LEVEL_WARNING,
		   g_strdup_printf("%s (%u is usual): %s", watchdog->last, point->ms,
				   runnable ? "it runs, or waits for a CPU" : "it is blocked"));
}

static void check_watch(PrWatch *watch, gint64 now, GArray *reports)
{
	const PrWatchPoint *point = __atomic_load_n(&watch->point, __ATOMIC_ACQUIRE);
	gint64 since = __atomic_load_n(&watch->since, __ATOMIC_RELAXED);

	if (watch->reported_since && watch->reported_since != since) {
		add_report(reports, G_LOG_LEVEL_MESSAGE,
			   g_strdup_printf("thread \"%s\" goes on after %d ms: it was %s",
					   watch->name, (int)((now - watch->reported_since) / 1000),
					   watch->reported_point->what));
		watch->reported_since = 0;
	}
	if (!since || !point)
		return;
	gint64 lasts = now - MAX(since, watch->watchdog->excused);
	if (lasts > (gint64)point->ms * 1000)
		report_stall(watch, point, since, lasts, reports);
}

GArray *pr_watchdog_check(PrWatchdog *watchdog, gint64 now)
{
	GArray *reports = g_array_new(FALSE, FALSE, sizeof(PrWatchReport));

	g_array_set_clear_func(reports, report_clear);
	g_mutex_lock(&watchdog->lock);
	gint64 late = watchdog->checked ? now - watchdog->checked - PR_WATCH_CHECK_MS * 1000 : 0;
	if (late > LATE_US)
		watchdog->excused = now;
	if (late > STANDSTILL_US)
		add_report(reports, G_LOG_LEVEL_WARNING,
			   g_strdup_printf(
				   "this engine stood still for %d ms: it was stopped, or got no "
				   "CPU",
				   (int)(late / 1000)));
	watchdog->checked = now;
	for (guint i = 0; i < watchdog->watches->len; i++)
		check_watch(watchdog->watches->pdata[i], now, reports);
	g_mutex_unlock(&watchdog->lock);
	return reports;
}

/* Waits until the next check is due. FALSE: the watchdog has to end. */
static gboolean wait_for_check(PrWatchdog *watchdog)
{
	gint64 until = g_get_monotonic_time() + PR_WATCH_CHECK_MS * 1000;

	g_mutex_lock(&watchdog->lock);
	while (!watchdog->stop && g_cond_wait_until(&watchdog->changed, &watchdog->lock, until))
		;
	gboolean go_on = !watchdog->stop;
	g_mutex_unlock(&watchdog->lock);
	return go_on;
}

static gpointer watchdog_thread(gpointer opaque)
{
	PrWatchdog *watchdog = opaque;

	while (wait_for_check(watchdog)) {
		g_autoptr(GArray) reports = pr_watchdog_check(watchdog, g_get_monotonic_time());

		for (guint i = 0; i < reports->len; i++) {
			const PrWatchReport *report = &g_array_index(reports, PrWatchReport, i);

			g_log(G_LOG_DOMAIN, report->level, "%s", report->text);
		}
	}
	return NULL;
}

PrWatchdog *pr_watchdog_new(void)
{
	PrWatchdog *watchdog = g_new0(PrWatchdog, 1);

	g_mutex_init(&watchdog->lock);
	g_cond_init(&watchdog->changed);
	watchdog->watches = g_ptr_array_new();
	return watchdog;
}

void pr_watchdog_start(PrWatchdog *watchdog)
{
	g_autoptr(GError) error = NULL;

	watchdog->thread = pr_thread_try("watchdog", watchdog_thread, watchdog, &error);
	if (!watchdog->thread)
		g_warning("threads that hang will not be reported: %s", error->message);
}

void pr_watchdog_free(PrWatchdog *watchdog)
{
	if (!watchdog)
		return;
	g_mutex_lock(&watchdog->lock);
	watchdog->stop = TRUE;
	g_cond_signal(&watchdog->changed);
	g_mutex_unlock(&watchdog->lock);
	if (watchdog->thread)
		g_thread_join(watchdog->thread);
	g_ptr_array_unref(watchdog->watches);
	g_free(watchdog->last);
	g_mutex_clear(&watchdog->lock);
	g_cond_clear(&watchdog->changed);
	g_free(watchdog);
}

guint64 pr_watchdog_stalls(PrWatchdog *watchdog, char **ret_last)
{
	g_mutex_lock(&watchdog->lock);
	guint64 stalls = watchdog->stalls;
	*ret_last = g_strdup(watchdog->last);
	g_mutex_unlock(&watchdog->lock);
	return stalls;
}

PrWatch *pr_watch_new(PrWatchdog *watchdog, const char *name)
{
	PrWatch *watch;

	if (!watchdog)
		return NULL;
	watch = g_new0(PrWatch, 1);
	watch->watchdog = watchdog;
	watch->name = name;
	watch->tid = gettid();
	g_mutex_lock(&watchdog->lock);
	g_ptr_array_add(watchdog->watches, watch);
	g_mutex_unlock(&watchdog->lock);
	return watch;
}

void pr_watch_free(PrWatch *watch)
{
	if (!watch)
		return;
	g_mutex_lock(&watch->watchdog->lock);
	g_ptr_array_remove_fast(watch->watchdog->watches, watch);
	g_mutex_unlock(&watch->watchdog->lock);
	g_free(watch);
}

void pr_watch_enter_at(PrWatch *watch, const PrWatchPoint *point, gint64 now_us)
{
	if (!watch)
		return;
	__atomic_store_n(&watch->since, now_us, __ATOMIC_RELAXED);
	__atomic_store_n(&watch->point, point, __ATOMIC_RELEASE);
}

void pr_watch_enter(PrWatch *watch, const PrWatchPoint *point)
{
	if (watch)
		pr_watch_enter_at(watch, point, g_get_monotonic_time());
}

void pr_watch_idle(PrWatch *watch)
{
	if (watch)
		__atomic_store_n(&watch->since, 0, __ATOMIC_RELAXED);
}
