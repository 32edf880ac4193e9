/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The window of a rail, against a model of one: a rate, a delay, and READs that queue up in order. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "migration/window.h"

#define READ  (128u * 1024)
#define LIMIT 64 /* of the caller: bulk-window */
#define STEPS 20000

typedef struct Rail {
	double bytes_per_us;
	gint64 delay_us; /* there and back, without the bytes */
} Rail;

/* Keeps the window full for STEPS READs; returns the largest time that a READ took in the second half. */
static gint64 run(PrWindow *window, const Rail *rail, gint64 *now)
{
	static gint64 due[STEPS], posted[STEPS];
	gint64 busy_until = *now, longest = 0;
	guint next = 0;

	for (guint done = 0; done < STEPS; done++) {
		for (; next < STEPS && next - done < MIN(window->reads, LIMIT); next++) {
			busy_until = MAX(busy_until, *now) + (gint64)(READ / rail->bytes_per_us);
			posted[next] = *now;
			due[next] = busy_until + rail->delay_us;
		}
		*now = MAX(*now, due[done]);
		pr_window_completed(window, READ, *now - posted[done], READ, *now);
		if (done > STEPS / 2)
			longest = MAX(longest, *now - posted[done]);
	}
	return longest;
}

static void starts_with_a_window_that_carries_anything(void **state)
{
	PrWindow window;

	pr_window_init(&window, 5);
	assert_int_equal(window.reads, PR_WINDOW_START);
	pr_window_completed(&window, READ, 100, READ, 6);
	assert_int_equal(window.reads, PR_WINDOW_START); /* too early to know */
}

static void a_slow_rail_gets_few(void **state)
{
	Rail gigabit = {.bytes_per_us = 125, .delay_us = 200}; /* a READ is on the wire for 1 ms */
	gint64 now = 0;
	PrWindow window;

	pr_window_init(&window, now);
	gint64 longest = run(&window, &gigabit, &now);
	assert_in_range(window.reads, PR_WINDOW_MIN, 4);
	assert_true(longest < 5000);
}

static void a_fast_rail_is_kept_busy(void **state)
{
	Rail fast = {.bytes_per_us = 12500, .delay_us = 10};
	gint64 now = 0;
	PrWindow window;

	pr_window_init(&window, now);
	run(&window, &fast, &now);
	assert_true(window.reads * (double)READ >= fast.bytes_per_us * fast.delay_us);
	assert_true(window.reads >= LIMIT);
}

static void a_long_rail_is_filled(void **state)
{
	Rail far = {.bytes_per_us = 500, .delay_us = 10000}; /* 5 MB on the way: 39 READs */
	gint64 now = 0;
	PrWindow window;

	pr_window_init(&window, now);
	run(&window, &far, &now);
	assert_in_range(window.reads, 39, 60);
}

static void grows_again_after_the_rail_was_slow(void **state)
{
	Rail slow = {.bytes_per_us = 20, .delay_us = 100}, quick = {1000, 100};
	gint64 now = 0;
	PrWindow window;

	pr_window_init(&window, now);
	run(&window, &slow, &now);
	assert_in_range(window.reads, PR_WINDOW_MIN, 3);
	run(&window, &quick, &now);
	assert_true(window.reads >= 8);
}

static void time_without_reads_does_not_count(void **state)
{
	PrWindow window;

	pr_window_init(&window, 0);
	pr_window_resume(&window, 10 * G_USEC_PER_SEC);
	for (guint i = 1; i <= 300; i++)
		pr_window_completed(&window, READ, 200, READ, 10 * G_USEC_PER_SEC + i * 100);
	assert_true(window.reads >= 8);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(starts_with_a_window_that_carries_anything),
		cmocka_unit_test(a_slow_rail_gets_few),
		cmocka_unit_test(a_fast_rail_is_kept_busy),
		cmocka_unit_test(a_long_rail_is_filled),
		cmocka_unit_test(grows_again_after_the_rail_was_slow),
		cmocka_unit_test(time_without_reads_does_not_count),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
