/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "util/stall-watchdog.h"

#include <stdio.h>
#include <unistd.h>

#include "util/try-alloc.h"

#define LATE_US		(100 * 1000) /* that the watchdog wakes up: something held the process up */
#define STANDSTILL_US	G_USEC_PER_SEC /* so late is worth a word */
#define RUNNABLE_FACTOR 4	       /* who only lacks a CPU may take so much longer */

struct PrWatch {
	PrWatchdog *watchdog;
	const char *name; /* constant */
	pid_t tid;	  /* constant */

	/* Atomic; written by the thread alone, `since` before `point`: whoever reads the point first never takes it
	 * for longer than it lasts. */
	gint64 since;		   /* us; 0: idle */
	const PrWatchPoint *point; /* NULL: none yet */

	/* PrWatchdog.lock */
	gint64 blamed_since; /* the stall that was logged; 0: none */
	gint64 say_again;    /* when it has lasted so long, us */
	const PrWatchPoint *blamed_point;
};

struct PrWatchdog {
	GThread *thread; /* NULL: there is none */

	GMutex lock; /* protects what follows */
	GCond changed;
	GPtrArray *watches;
	gboolean stop;
	gint64 looked;	/* the last look */
	gint64 excused; /* nobody is blamed for what was before */
	guint64 stalls;
	char *last;
};

static void word_clear(gpointer word)
{
	g_free(((PrWatchWord *)word)->text);
}

static void say(GArray *words, GLogLevelFlags level, char *text)
{
	PrWatchWord word = {level, text};

	g_array_append_val(words, word);
}

/* Whether the scheduler says that a thread runs, or would if it got a CPU; else it sleeps. */
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
static void blame(PrWatch *watch, const PrWatchPoint *point, gint64 since, gint64 lasts,
		  GArray *words)
{
	PrWatchdog *watchdog = watch->watchdog;
	gboolean again = watch->blamed_since == since;
	gboolean runnable = is_runnable(watch->tid);

	if (again ? lasts < watch->say_again
		  : runnable && lasts < (gint64)point->ms * 1000 * RUNNABLE_FACTOR)
		return;
	if (!again)
		watchdog->stalls++;
	watch->say_again = (again ? watch->say_again : (gint64)point->ms * 1000) * 2;
	watch->blamed_since = since;
	watch->blamed_point = point;
	g_free(watchdog->last);
	watchdog->last = g_strdup_printf("thread \"%s\": %s for %d ms", watch->name, point->what,
					 (int)(lasts / 1000));
	say(words, G_LOG_LEVEL_WARNING,
	    g_strdup_printf("%s (%u is usual): %s", watchdog->last, point->ms,
			    runnable ? "it runs, or waits for a CPU" : "it is blocked"));
}

static void look_at(PrWatch *watch, gint64 now, GArray *words)
{
	const PrWatchPoint *point = __atomic_load_n(&watch->point, __ATOMIC_ACQUIRE);
	gint64 since = __atomic_load_n(&watch->since, __ATOMIC_RELAXED);

	if (watch->blamed_since && watch->blamed_since != since) {
		say(words, G_LOG_LEVEL_MESSAGE,
		    g_strdup_printf("thread \"%s\" goes on after %d ms: it was %s", watch->name,
				    (int)((now - watch->blamed_since) / 1000),
				    watch->blamed_point->what));
		watch->blamed_since = 0;
	}
	if (!since || !point)
		return;
	gint64 lasts = now - MAX(since, watch->watchdog->excused);
	if (lasts > (gint64)point->ms * 1000)
		blame(watch, point, since, lasts, words);
}

GArray *pr_watchdog_look(PrWatchdog *watchdog, gint64 now)
{
	GArray *words = g_array_new(FALSE, FALSE, sizeof(PrWatchWord));

	g_array_set_clear_func(words, word_clear);
	g_mutex_lock(&watchdog->lock);
	gint64 late = watchdog->looked ? now - watchdog->looked - PR_WATCH_LOOK_MS * 1000 : 0;
	if (late > LATE_US)
		watchdog->excused = now;
	if (late > STANDSTILL_US)
		say(words, G_LOG_LEVEL_WARNING,
		    g_strdup_printf("this engine stood still for %d ms: it was stopped, or got no "
				    "CPU",
				    (int)(late / 1000)));
	watchdog->looked = now;
	for (guint i = 0; i < watchdog->watches->len; i++)
		look_at(watchdog->watches->pdata[i], now, words);
	g_mutex_unlock(&watchdog->lock);
	return words;
}

/* FALSE: it is to end. */
static gboolean wait_a_look(PrWatchdog *watchdog)
{
	gint64 until = g_get_monotonic_time() + PR_WATCH_LOOK_MS * 1000;

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

	while (wait_a_look(watchdog)) {
		g_autoptr(GArray) words = pr_watchdog_look(watchdog, g_get_monotonic_time());

		for (guint i = 0; i < words->len; i++) {
			const PrWatchWord *word = &g_array_index(words, PrWatchWord, i);

			g_log(G_LOG_DOMAIN, word->level, "%s", word->text);
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
		g_warning("there will be no word of threads that hang: %s", error->message);
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
