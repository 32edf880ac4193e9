/* SPDX-License-Identifier: GPL-2.0-or-later */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "monitor/main-loop-watchdog.h"
#include "util/stall-watchdog.h"

#define MS	 1000
#define CHECK	 (PR_WATCH_CHECK_MS * MS)
#define START	 (1000 * MS)
#define SLOW_US	 300000	 /* us; for how long a callback blocks the main loop */
#define PATIENCE 5000000 /* us; for the watchdog's thread */

static const PrWatchPoint cooking = {"cooking", 200};
static const PrWatchPoint eating = {"eating", 400};

/* A watchdog without a thread of its own; time is passed in. It watches a thread that sleeps. The
 * test enters the points for that thread. */
typedef struct Bench {
	PrWatchdog *watchdog;
	PrWatch *watch;
	GThread *cook;
	pid_t tid; /* lock; of the watched thread */
	GMutex lock;
	GCond changed;
	gboolean end; /* lock; so is watch until it is set */
	gint64 now;
	GString *logged; /* since the test last read it */
} Bench;

static gpointer watched_thread(gpointer opaque)
{
	Bench *bench = opaque;

	g_mutex_lock(&bench->lock);
	bench->tid = gettid();
	bench->watch = pr_watch_new(bench->watchdog, "cook");
	g_cond_broadcast(&bench->changed);
	while (!bench->end)
		g_cond_wait(&bench->changed, &bench->lock);
	g_mutex_unlock(&bench->lock);
	return NULL;
}

static void wait_until_asleep(pid_t tid)
{
	g_autofree char *path = g_strdup_printf("/proc/self/task/%d/stat", (int)tid);
	gint64 until = g_get_monotonic_time() + PATIENCE;

	for (;;) {
		g_autofree char *stat = NULL;

		assert_true(g_get_monotonic_time() < until);
		assert_true(g_file_get_contents(path, &stat, NULL, NULL));
		if (strstr(stat, ") S "))
			return;
	}
}

static int set_up(void **state)
{
	Bench *bench = g_new0(Bench, 1);

	bench->watchdog = pr_watchdog_new();
	g_mutex_init(&bench->lock);
	g_cond_init(&bench->changed);
	g_mutex_lock(&bench->lock);
	bench->cook = g_thread_new("cook", watched_thread, bench);
	while (!bench->watch)
		g_cond_wait(&bench->changed, &bench->lock);
	g_mutex_unlock(&bench->lock);
	wait_until_asleep(bench->tid);
	bench->now = START;
	bench->logged = g_string_new(NULL);
	*state = bench;
	return 0;
}

static int tear_down(void **state)
{
	Bench *bench = *state;

	g_mutex_lock(&bench->lock);
	bench->end = TRUE;
	g_cond_broadcast(&bench->changed);
	g_mutex_unlock(&bench->lock);
	g_thread_join(bench->cook);
	pr_watch_free(bench->watch);
	pr_watchdog_free(bench->watchdog);
	g_mutex_clear(&bench->lock);
	g_cond_clear(&bench->changed);
	g_string_free(bench->logged, TRUE);
	g_free(bench);
	return 0;
}

static void check(Bench *bench)
{
	g_autoptr(GArray) reports = pr_watchdog_check(bench->watchdog, bench->now);

	for (guint i = 0; i < reports->len; i++)
		g_string_append_printf(bench->logged, "%s\n",
				       g_array_index(reports, PrWatchReport, i).text);
}

/* Checks as the watchdog's thread would, for so long. */
static void pass(Bench *bench, guint ms)
{
	for (gint64 until = bench->now + (gint64)ms * MS; bench->now < until; check(bench))
		bench->now += CHECK;
}

static guint count_logged(Bench *bench, const char *what)
{
	guint n = 0;

	for (const char *at = bench->logged->str; (at = strstr(at, what)); at++)
		n++;
	g_string_set_size(bench->logged, 0);
	return n;
}

static guint64 stalls(Bench *bench)
{
	g_autofree char *last = NULL;

	return pr_watchdog_stalls(bench->watchdog, &last);
}

static void a_thread_that_moves_or_is_idle_is_not_reported(void **state)
{
	Bench *bench = *state;

	pass(bench, 1000);
	for (guint i = 0; i < 20; i++) {
		pr_watch_enter_at(bench->watch, &cooking, bench->now);
		pass(bench, 150);
	}
	pr_watch_idle(bench->watch);
	pass(bench, 100000);
	assert_string_equal(bench->logged->str, "");
	assert_int_equal(stalls(bench), 0);
}

static void a_slow_thread_is_reported_with_its_point_and_time(void **state)
{
	Bench *bench = *state;
	g_autofree char *last = NULL;

	pass(bench, 100);
	pr_watch_enter_at(bench->watch, &cooking, bench->now);
	pass(bench, 200);
	assert_string_equal(bench->logged->str, "");
	pass(bench, 50);
	assert_int_equal(count_logged(bench, "thread \"cook\": cooking for 250 ms (200 is usual)"),
			 1);
	assert_int_equal(pr_watchdog_stalls(bench->watchdog, &last), 1);
	assert_string_equal(last, "thread \"cook\": cooking for 250 ms");
}

static void reports_come_at_doubling_intervals_and_when_the_thread_goes_on(void **state)
{
	Bench *bench = *state;

	pass(bench, 100);
	pr_watch_enter_at(bench->watch, &cooking, bench->now);
	pass(bench, 250);
	assert_int_equal(count_logged(bench, "cooking for"), 1);
	pass(bench, 100);
	assert_int_equal(count_logged(bench, "cooking for"), 0);
	/* At 0.4, 0.8, 1.6, 3.2, 6.4 s. */
	pass(bench, 6400);
	assert_int_equal(count_logged(bench, "cooking for"), 5);
	pr_watch_enter_at(bench->watch, &eating, bench->now);
	pass(bench, 50);
	assert_int_equal(count_logged(bench, "goes on after 6800 ms: it was cooking"), 1);
	assert_int_equal(stalls(bench), 1);
	pass(bench, 400);
	assert_int_equal(count_logged(bench, "eating for 450 ms"), 1);
	assert_int_equal(stalls(bench), 2);
	pr_watch_idle(bench->watch);
	pass(bench, 1000);
	assert_int_equal(count_logged(bench, "goes on"), 1);
}

static void no_thread_is_reported_after_a_stop_of_the_process(void **state)
{
	Bench *bench = *state;

	pass(bench, 100);
	pr_watch_enter_at(bench->watch, &cooking, bench->now);
	bench->now += 10000 * MS;
	check(bench);
	assert_int_equal(count_logged(bench, "this engine stood still for 9950 ms"), 1);
	pass(bench, 150);
	assert_string_equal(bench->logged->str, "");
	/* Time after the standstill counts. */
	pass(bench, 150);
	assert_int_equal(count_logged(bench, "cooking for"), 1);
}

static void a_running_thread_gets_a_longer_limit(void **state)
{
	Bench *bench = *state;
	g_autoptr(PrWatch) own = pr_watch_new(bench->watchdog, "own");

	pass(bench, 100);
	pr_watch_enter_at(own, &cooking, bench->now);
	pass(bench, 750);
	assert_string_equal(bench->logged->str, "");
	pass(bench, 100);
	assert_int_equal(count_logged(bench,
				      "thread \"own\": cooking for 800 ms (200 is usual): it runs"),
			 1);
}

static void a_thread_that_has_ended_is_forgotten(void **state)
{
	Bench *bench = *state;

	pass(bench, 100);
	pr_watch_enter_at(bench->watch, &cooking, bench->now);
	g_clear_pointer(&bench->watch, pr_watch_free);
	pass(bench, 1000);
	assert_string_equal(bench->logged->str, "");
}

static gboolean be_slow(gpointer loop)
{
	g_usleep(SLOW_US);
	g_main_loop_quit(loop);
	return G_SOURCE_REMOVE;
}

static gboolean end_idle(gpointer loop)
{
	g_main_loop_quit(loop);
	return G_SOURCE_REMOVE;
}

static void a_blocked_main_loop_is_reported(void **state)
{
	g_autoptr(GMainContext) context = g_main_context_new();
	g_autoptr(GMainLoop) loop = g_main_loop_new(context, FALSE);
	g_autoptr(GSource) idles = g_timeout_source_new(SLOW_US / 1000);
	g_autoptr(GSource) blocks = g_timeout_source_new(0);
	PrWatchdog *watchdog = pr_watchdog_new();
	gint64 until = g_get_monotonic_time() + PATIENCE;
	g_autofree char *last = NULL;

	pr_watchdog_start(watchdog);
	pr_main_loop_watch(watchdog, context);
	/* The loop waits for events: that is idle. */
	g_source_set_callback(idles, end_idle, loop, NULL);
	g_source_attach(idles, context);
	g_main_loop_run(loop);
	assert_int_equal(pr_watchdog_stalls(watchdog, &last), 0);
	/* A callback blocks the loop. */
	g_source_set_callback(blocks, be_slow, loop, NULL);
	g_source_attach(blocks, context);
	g_main_loop_run(loop);
	while (pr_watchdog_stalls(watchdog, &last) == 0 && g_get_monotonic_time() < until)
		g_clear_pointer(&last, g_free);
	assert_non_null(last);
	assert_non_null(strstr(last, "thread \"main loop\": answering the monitor"));
	pr_main_loop_watch(NULL, context);
	pr_watchdog_free(watchdog);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(a_thread_that_moves_or_is_idle_is_not_reported,
						set_up, tear_down),
		cmocka_unit_test_setup_teardown(a_slow_thread_is_reported_with_its_point_and_time,
						set_up, tear_down),
		cmocka_unit_test_setup_teardown(
			reports_come_at_doubling_intervals_and_when_the_thread_goes_on, set_up,
			tear_down),
		cmocka_unit_test_setup_teardown(no_thread_is_reported_after_a_stop_of_the_process,
						set_up, tear_down),
		cmocka_unit_test_setup_teardown(a_running_thread_gets_a_longer_limit, set_up,
						tear_down),
		cmocka_unit_test_setup_teardown(a_thread_that_has_ended_is_forgotten, set_up,
						tear_down),
		cmocka_unit_test(a_blocked_main_loop_is_reported),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
