/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The bulk window against a model of a rail: a rate, a delay, and READs that queue in order. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "migration/postcopy/bulk-window.h"

#define READ  (128u * 1024)
#define LIMIT 64 /* READs: the parameter bulk-window */
#define STEPS 20000

typedef struct Rail {
	double bytes_per_us;
	gint64 delay_us; /* round trip without bytes */
	gint64 late_us;	 /* every eighth completion is seen so much later */
} Rail;

/* What was measured in the second half of a run. */
typedef struct Measured {
	double queue_us; /* mean time that a READ has waited for others, without the probes */
	double carried;	 /* part of what the rail can carry */
} Measured;

/* Keeps the window full for STEPS READs. */
static Measured run(PrBulkWindow *window, const Rail *rail, gint64 *now)
{
	static gint64 due[STEPS], posted[STEPS], sent[STEPS], bytes[STEPS];
	double busy_until = (double)*now, half_bytes = 0, waited = 0;
	gint64 half_at = 0;
	guint next = 0, n = 0;

	for (guint done = 0; done < STEPS; done++) {
		for (; next < STEPS && next - done < MIN(window->reads, LIMIT); next++) {
			double arrives = (double)(*now + rail->delay_us / 2);
			bytes[next] = (gint64)window->read_bytes;
			busy_until = MAX(busy_until, arrives);
			sent[next] = (gint64)(busy_until - arrives);
			busy_until += (double)bytes[next] / rail->bytes_per_us;
			posted[next] = *now;
			due[next] = (gint64)busy_until + rail->delay_us / 2;
		}
		gint64 late = done % 8 == 0 ? rail->late_us : 0;
		*now = MAX(*now, due[done] + late);
		pr_bulk_window_completed(window, (uint64_t)bytes[done], *now - posted[done], READ,
					 LIMIT, *now);
		if (done == STEPS / 2)
			half_at = *now;
		if (done <= STEPS / 2)
			continue;
		half_bytes += (double)bytes[done];
		if (window->interval == PR_BULK_WINDOW_ROUND - 1)
			continue;
		waited += (double)sent[done];
		n++;
	}
	return (Measured){waited / n, half_bytes / ((double)(*now - half_at) * rail->bytes_per_us)};
}

static void the_first_window_stays_for_an_interval(void **state)
{
	PrBulkWindow window;

	pr_bulk_window_init(&window, 5);
	assert_int_equal(window.reads, PR_BULK_WINDOW_START);
	pr_bulk_window_completed(&window, PR_BULK_WINDOW_START_BYTES, 100, READ, LIMIT, 6);
	assert_int_equal(window.reads, PR_BULK_WINDOW_START); /* the first interval has not ended */
	assert_int_equal(window.read_bytes, PR_BULK_WINDOW_START_BYTES);
}

/* An urgent READ waits as long as a bulk READ that is posted at the same time, and for that
 * READ. */
static void queue_is_below_100_us_and_the_rail_full(void **state)
{
	static const Rail rails[] = {
		{125, 60, 0}, {500, 60, 0}, {1250, 40, 0}, {3125, 20, 0}, {125, 1000, 0}};

	for (guint i = 0; i < G_N_ELEMENTS(rails); i++) {
		gint64 now = 0;
		PrBulkWindow window;

		pr_bulk_window_init(&window, now);
		Measured measured = run(&window, &rails[i], &now);
		double one = (double)window.read_bytes / rails[i].bytes_per_us;
		print_message("%.0f bytes/us, %d us: %u READs of %d, waits %.0f us + %.0f, "
			      "carries %.2f\n",
			      rails[i].bytes_per_us, (int)rails[i].delay_us, window.reads,
			      (int)window.read_bytes, measured.queue_us, one, measured.carried);
		assert_true(measured.queue_us + one <= 100);
		assert_true(measured.carried >= 0.95);
	}
}

static void a_fast_rail_is_kept_busy(void **state)
{
	Rail fast = {.bytes_per_us = 12500, .delay_us = 10};
	gint64 now = 0;
	PrBulkWindow window;

	pr_bulk_window_init(&window, now);
	assert_true(run(&window, &fast, &now).carried >= 0.95);
}

static void a_long_rail_is_filled(void **state)
{
	Rail far = {.bytes_per_us = 500, .delay_us = 10000}; /* 5 MB on the way: 39 READs */
	gint64 now = 0;
	PrBulkWindow window;

	pr_bulk_window_init(&window, now);
	Measured measured = run(&window, &far, &now);
	print_message("%u READs of %d, slack %u, carries %.2f\n", window.reads,
		      (int)window.read_bytes, window.slack_us, measured.carried);
	assert_true(measured.carried >= 0.9);
	assert_int_equal(window.read_bytes, READ);
	assert_in_range(window.reads, 39, LIMIT);
}

static void late_hosts_get_more_slack(void **state)
{
	static const Rail late[] = {{125, 60, 400}, {25, 500, 4000}};

	for (guint i = 0; i < G_N_ELEMENTS(late); i++) {
		gint64 now = 0;
		PrBulkWindow window;

		pr_bulk_window_init(&window, now);
		Measured measured = run(&window, &late[i], &now);
		print_message("%u READs of %d, slack %u, carries %.2f\n", window.reads,
			      (int)window.read_bytes, window.slack_us, measured.carried);
		assert_true(measured.carried >= 0.8);
		assert_true(window.slack_us > PR_BULK_WINDOW_SLACK_MIN_US);
	}
}

static void grows_again_after_the_rail_was_slow(void **state)
{
	Rail slow = {.bytes_per_us = 20, .delay_us = 100}, quick = {1000, 100};
	gint64 now = 0;
	PrBulkWindow window;

	pr_bulk_window_init(&window, now);
	run(&window, &slow, &now);
	assert_in_range(window.reads, PR_BULK_WINDOW_MIN, 4);
	assert_true(run(&window, &quick, &now).carried >= 0.9);
}

static void idle_time_does_not_count(void **state)
{
	PrBulkWindow window;

	pr_bulk_window_init(&window, 0);
	pr_bulk_window_resume(&window, 10 * G_USEC_PER_SEC);
	for (guint i = 1; i <= 300; i++)
		pr_bulk_window_completed(&window, READ, 200, READ, LIMIT,
					 10 * G_USEC_PER_SEC + i * 100);
	/* 1.3 KB/us */
	assert_in_range(window.read_bytes, 32 * 1024, READ);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(the_first_window_stays_for_an_interval),
		cmocka_unit_test(queue_is_below_100_us_and_the_rail_full),
		cmocka_unit_test(a_fast_rail_is_kept_busy),
		cmocka_unit_test(a_long_rail_is_filled),
		cmocka_unit_test(late_hosts_get_more_slack),
		cmocka_unit_test(grows_again_after_the_rail_was_slow),
		cmocka_unit_test(idle_time_does_not_count),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
