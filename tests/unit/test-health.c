/* SPDX-License-Identifier: GPL-2.0-or-later */
/* When a path may be connected again, and when it is trusted. Times are passed in. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "transport/health.h"

#define START  1000000
#define SECOND G_USEC_PER_SEC

static void step(PrHealth *health, PrHealthEvent event, gint64 now, PrPathState expected)
{
	PrPathState before = health->state;

	assert_int_equal(pr_health_step(health, event, now), before != expected);
	assert_string_equal(pr_path_state_name(health->state), pr_path_state_name(expected));
}

/* Connects the path, and probes it once a second until it is fit. Returns that time. */
static gint64 wait_fit(PrHealth *health, gint64 now)
{
	gint64 give_up = now + 100 * SECOND;

	step(health, PR_HEALTH_CONNECTED, now, PR_PATH_PROBATION);
	while (health->state != PR_PATH_STANDBY) {
		now += SECOND;
		assert_true(now < give_up);
		pr_health_step(health, PR_HEALTH_PROBED, now);
	}
	return now;
}

static void a_new_path_needs_one_probe(void **state)
{
	PrHealth health = {0};

	step(&health, PR_HEALTH_CONNECTS, START, PR_PATH_CONNECTING);
	step(&health, PR_HEALTH_CONNECTED, START + 1, PR_PATH_PROBATION);
	step(&health, PR_HEALTH_PROBED, START + 2, PR_PATH_STANDBY);
	assert_int_equal(health.since, START + 2);
	step(&health, PR_HEALTH_PROBED, START + 3, PR_PATH_STANDBY);
	assert_int_equal(health.since, START + 2);
	step(&health, PR_HEALTH_ACTIVATED, START + 4, PR_PATH_ACTIVE);
}

static void a_lost_path_needs_five_probes_and_its_hold_down(void **state)
{
	PrHealth health = {0};

	step(&health, PR_HEALTH_ACTIVATED, START, PR_PATH_ACTIVE);
	step(&health, PR_HEALTH_FAILED, START + SECOND, PR_PATH_FAILED);
	assert_int_equal(health.hold_until, START + SECOND + PR_HEALTH_HOLD_DOWN_MIN);
	step(&health, PR_HEALTH_CONNECTED, START + SECOND, PR_PATH_PROBATION);
	for (guint i = 0; i < PR_HEALTH_PROBES + 3; i++)
		step(&health, PR_HEALTH_PROBED, START + 2 * SECOND, PR_PATH_PROBATION);
	step(&health, PR_HEALTH_PROBED, health.hold_until, PR_PATH_STANDBY);

	/* After the hold-down it still needs the probes. */
	step(&health, PR_HEALTH_FAILED, START + 20 * SECOND, PR_PATH_FAILED);
	step(&health, PR_HEALTH_CONNECTED, health.hold_until + SECOND, PR_PATH_PROBATION);
	for (guint i = 0; i + 1 < PR_HEALTH_PROBES; i++)
		step(&health, PR_HEALTH_PROBED, health.hold_until + SECOND, PR_PATH_PROBATION);
	step(&health, PR_HEALTH_PROBED, health.hold_until + SECOND, PR_PATH_STANDBY);
}

static void hold_down_doubles_to_a_minute(void **state)
{
	PrHealth health = {0};
	gint64 now = wait_fit(&health, START), expected = PR_HEALTH_HOLD_DOWN_MIN;

	for (guint i = 0; i < 8; i++) {
		now += SECOND;
		step(&health, PR_HEALTH_FAILED, now, PR_PATH_FAILED);
		assert_int_equal(health.hold_down, expected);
		expected = MIN(2 * expected, PR_HEALTH_HOLD_DOWN_MAX);
		now = wait_fit(&health, now);
		assert_true(now >= health.hold_until);
	}
	assert_int_equal(health.hold_down, PR_HEALTH_HOLD_DOWN_MAX);
}

static void a_path_that_stayed_fit_for_long_starts_with_a_short_hold_down(void **state)
{
	PrHealth health = {0};
	gint64 now = wait_fit(&health, START);

	for (guint i = 0; i < 3; i++) {
		step(&health, PR_HEALTH_FAILED, now, PR_PATH_FAILED);
		now = wait_fit(&health, now);
	}
	assert_int_equal(health.hold_down, 4 * PR_HEALTH_HOLD_DOWN_MIN);
	now += PR_HEALTH_FORGIVENESS * health.hold_down + 1;
	step(&health, PR_HEALTH_FAILED, now, PR_PATH_FAILED);
	assert_int_equal(health.hold_down, PR_HEALTH_HOLD_DOWN_MIN);
}

static void a_path_that_cannot_be_connected_is_tried_at_growing_intervals(void **state)
{
	PrHealth health = {0};
	gint64 now = START, expected = PR_HEALTH_RETRY_MIN;

	for (guint i = 0; i < 20; i++) {
		step(&health, PR_HEALTH_CONNECTS, now, i ? PR_PATH_FAILED : PR_PATH_CONNECTING);
		step(&health, PR_HEALTH_FAILED, now, PR_PATH_FAILED);
		assert_int_equal(health.retry_at, now + expected);
		/* The path was never up, so it has no hold-down. */
		assert_int_equal(health.hold_until, 0);
		expected = MIN(2 * expected, PR_HEALTH_RETRY_MAX);
		now = health.retry_at;
	}
	wait_fit(&health, now);
	step(&health, PR_HEALTH_FAILED, now + SECOND * 10, PR_PATH_FAILED);
	assert_int_equal(health.retry_at, now + SECOND * 10 + PR_HEALTH_RETRY_MIN);
}

static void closing_is_no_failure(void **state)
{
	PrHealth health = {0};

	wait_fit(&health, START);
	step(&health, PR_HEALTH_CLOSED, START + 9 * SECOND, PR_PATH_IDLE);
	assert_int_equal(health.failures, 0);
	assert_int_equal(health.retry_at, 0);
	step(&health, PR_HEALTH_FAILED, START + 10 * SECOND, PR_PATH_FAILED);
	step(&health, PR_HEALTH_CLOSED, START + 11 * SECOND, PR_PATH_FAILED);
}

static void a_listener_goes_on_listening(void **state)
{
	PrHealth health = {0};

	step(&health, PR_HEALTH_LISTENS, START, PR_PATH_LISTENING);
	step(&health, PR_HEALTH_ACTIVATED, START + 1, PR_PATH_ACTIVE);
	step(&health, PR_HEALTH_CLOSED, START + 2, PR_PATH_LISTENING);
}

static void every_event_leads_to_a_state_from_every_state(void **state)
{
	for (guint from = 0; from < PR_PATH_N_STATES; from++)
		for (guint event = 0; event < PR_HEALTH_N_EVENTS; event++) {
			PrHealth health = {.state = from};

			pr_health_step(&health, event, START);
			assert_in_range(health.state, 0, PR_PATH_N_STATES - 1);
			assert_int_equal(health.since, START);
		}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_new_path_needs_one_probe),
		cmocka_unit_test(a_lost_path_needs_five_probes_and_its_hold_down),
		cmocka_unit_test(hold_down_doubles_to_a_minute),
		cmocka_unit_test(a_path_that_stayed_fit_for_long_starts_with_a_short_hold_down),
		cmocka_unit_test(a_path_that_cannot_be_connected_is_tried_at_growing_intervals),
		cmocka_unit_test(closing_is_no_failure),
		cmocka_unit_test(a_listener_goes_on_listening),
		cmocka_unit_test(every_event_leads_to_a_state_from_every_state),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
