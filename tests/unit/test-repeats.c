/* SPDX-License-Identifier: GPL-2.0-or-later */
/* When a fault thread rests because faults repeat. The tests pass the time in. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "migration/postcopy/repeats.h"

#define STEP_NS 10000

/* Notes n repeats, one a batch. None of them may cause a rest. */
static void repeat_without_rest(PrRepeats *repeats, guint n, int64_t *now_ns, int64_t step_ns)
{
	for (guint i = 0; i < n; i++) {
		pr_repeats_note(repeats, 1, 0, *now_ns += step_ns);
		assert_int_equal(pr_repeats_take_rest(repeats), 0);
	}
}

static guint repeat_and_rest(PrRepeats *repeats, int64_t *now_ns)
{
	pr_repeats_note(repeats, 1, 0, *now_ns += STEP_NS);
	return pr_repeats_take_rest(repeats);
}

static void rests_grow_up_to_the_bound(void **state)
{
	static const guint rests[] = {50, 100, 200, 400, 800, 1000, 1000, 1000, 1000, 1000};
	PrRepeats repeats = {0};
	int64_t now_ns = 1;

	repeat_without_rest(&repeats, PR_REPEATS_ROW, &now_ns, STEP_NS);
	for (guint i = 0; i < G_N_ELEMENTS(rests); i++)
		assert_int_equal(repeat_and_rest(&repeats, &now_ns), rests[i]);
}

static void a_rest_is_due_once(void **state)
{
	PrRepeats repeats = {0};

	pr_repeats_note(&repeats, PR_REPEATS_ROW + 1, 0, 1);
	assert_int_equal(pr_repeats_take_rest(&repeats), PR_REST_MIN_US);
	assert_int_equal(pr_repeats_take_rest(&repeats), 0);
	/* More repeats before the rest is taken do not make it longer. */
	pr_repeats_note(&repeats, 64, 0, 2);
	pr_repeats_note(&repeats, 64, 0, 3);
	assert_int_equal(pr_repeats_take_rest(&repeats), 2 * PR_REST_MIN_US);
}

static void a_new_fault_ends_the_row(void **state)
{
	PrRepeats repeats = {0};
	int64_t now_ns = 1;

	pr_repeats_note(&repeats, 1000, 0, now_ns);
	/* That also cancels the rest that was due. */
	pr_repeats_note(&repeats, 64, 1, now_ns);
	assert_int_equal(pr_repeats_take_rest(&repeats), 0);
	repeat_without_rest(&repeats, PR_REPEATS_ROW, &now_ns, STEP_NS);
	assert_int_equal(repeat_and_rest(&repeats, &now_ns), PR_REST_MIN_US);
}

/* A thread that handles a signal now and then faults again each time. */
static void rare_repeats_cause_no_rest(void **state)
{
	PrRepeats repeats = {0};
	int64_t now_ns = PR_REPEATS_SELDOM_NS;

	repeat_without_rest(&repeats, 1000, &now_ns, PR_REPEATS_SELDOM_NS + 1);
	repeat_without_rest(&repeats, PR_REPEATS_ROW - 1, &now_ns, STEP_NS);
	assert_int_equal(repeat_and_rest(&repeats, &now_ns), PR_REST_MIN_US);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(rests_grow_up_to_the_bound),
		cmocka_unit_test(a_rest_is_due_once),
		cmocka_unit_test(a_new_fault_ends_the_row),
		cmocka_unit_test(rare_repeats_cause_no_rest),
	};

	return cmocka_run_group_tests_name("repeats", tests, NULL, NULL);
}
