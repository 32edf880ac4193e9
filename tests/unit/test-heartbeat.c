/* SPDX-License-Identifier: GPL-2.0-or-later */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "transport/control/heartbeat.h"

#define MS	 1000
#define INTERVAL (100 * MS)
#define TIMEOUT	 (500 * MS)
#define START	 (1000 * MS)

static PrHeartbeat fresh(void)
{
	PrHeartbeat heartbeat;
	PrHeartbeatBody body;

	pr_heartbeat_init(&heartbeat, INTERVAL / MS, TIMEOUT / MS, START);
	pr_heartbeat_make(&heartbeat, START, &body);
	return heartbeat;
}

/*
 * Sleeps for the time that the heartbeat asks for, and wakes up `late` after that. Returns the
 * time.
 */
static gint64 sleep_and_wake(PrHeartbeat *heartbeat, gint64 now, gint64 late)
{
	PrHeartbeatBody body;

	now += pr_heartbeat_sleep(heartbeat, now) + late;
	pr_heartbeat_woke(heartbeat, now);
	if (pr_heartbeat_is_due(heartbeat, now))
		pr_heartbeat_make(heartbeat, now, &body);
	return now;
}

static void the_first_is_due_at_once_then_one_per_interval(void **state)
{
	PrHeartbeat heartbeat;
	PrHeartbeatBody body;

	pr_heartbeat_init(&heartbeat, 100, 500, START);
	assert_true(pr_heartbeat_is_due(&heartbeat, START));
	pr_heartbeat_make(&heartbeat, START, &body);
	assert_int_equal(body.stamp, START);
	assert_int_equal(body.echo, 0);
	assert_int_equal(pr_heartbeat_sleep(&heartbeat, START), INTERVAL);
	assert_false(pr_heartbeat_is_due(&heartbeat, START + INTERVAL - 1));
	assert_true(pr_heartbeat_is_due(&heartbeat, START + INTERVAL));
}

static void a_peer_silent_for_the_timeout_is_dead(void **state)
{
	PrHeartbeat heartbeat = fresh();
	gint64 now = START;

	while (!pr_heartbeat_is_dead(&heartbeat, now) && now < START + 10 * TIMEOUT)
		now = sleep_and_wake(&heartbeat, now, 0);
	assert_int_equal(now, START + TIMEOUT);
}

static void any_bytes_restart_the_timeout(void **state)
{
	PrHeartbeat heartbeat = fresh();

	pr_heartbeat_heard(&heartbeat, START + 400 * MS);
	assert_false(pr_heartbeat_is_dead(&heartbeat, START + TIMEOUT));
	assert_int_equal(pr_heartbeat_silence(&heartbeat, START + TIMEOUT), 100 * MS);
	assert_true(pr_heartbeat_is_dead(&heartbeat, START + 400 * MS + TIMEOUT));
}

static void time_in_which_the_thread_did_not_run_is_not_silence(void **state)
{
	PrHeartbeat heartbeat = fresh();
	gint64 now = sleep_and_wake(&heartbeat, START, 0);

	now = sleep_and_wake(&heartbeat, now, 3600ll * 1000 * MS);
	assert_false(pr_heartbeat_is_dead(&heartbeat, now));
	assert_int_equal(pr_heartbeat_silence(&heartbeat, now), 2 * INTERVAL);
}

static void a_stop_between_waking_and_sleeping_is_not_silence(void **state)
{
	PrHeartbeat heartbeat = fresh();
	gint64 now = sleep_and_wake(&heartbeat, START, 0);

	now = sleep_and_wake(&heartbeat, now + 5 * TIMEOUT, 0);
	assert_false(pr_heartbeat_is_dead(&heartbeat, now));
}

static void being_late_again_and_again_does_not_hide_a_dead_peer(void **state)
{
	PrHeartbeat heartbeat = fresh();
	gint64 now = START;
	guint turns = 0;

	while (!pr_heartbeat_is_dead(&heartbeat, now) && turns < 100) {
		now = sleep_and_wake(&heartbeat, now, 50 * MS);
		turns++;
	}
	assert_true(pr_heartbeat_is_dead(&heartbeat, now));
	assert_true(now <= START + 2 * TIMEOUT);
}

static void the_round_trip_excludes_the_time_at_the_peer(void **state)
{
	PrHeartbeat a = fresh(), b = fresh();
	PrHeartbeatBody body;

	/* a's clock is 77 s behind b's; 3 ms there, 80 ms at the peer, 4 ms back. */
	pr_heartbeat_make(&a, START, &body);
	assert_int_equal(pr_heartbeat_handle(&b, START + 77000 * MS + 3 * MS, &body), 0);
	pr_heartbeat_make(&b, START + 77000 * MS + 83 * MS, &body);
	assert_int_equal(body.echo_age, 80 * MS);
	assert_int_equal(pr_heartbeat_handle(&a, START + 87 * MS, &body), 7 * MS);
}

static void an_invalid_echo_gives_no_round_trip(void **state)
{
	static const PrHeartbeatBody table[] = {
		{1, START + 1, 0}, {1, G_MAXUINT64, 0}, {1, START, G_MAXUINT64}, {1, 1, START}};

	for (gsize i = 0; i < G_N_ELEMENTS(table); i++) {
		PrHeartbeat heartbeat = fresh();

		assert_int_equal(pr_heartbeat_handle(&heartbeat, START, &table[i]), 0);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(the_first_is_due_at_once_then_one_per_interval),
		cmocka_unit_test(a_peer_silent_for_the_timeout_is_dead),
		cmocka_unit_test(any_bytes_restart_the_timeout),
		cmocka_unit_test(time_in_which_the_thread_did_not_run_is_not_silence),
		cmocka_unit_test(a_stop_between_waking_and_sleeping_is_not_silence),
		cmocka_unit_test(being_late_again_and_again_does_not_hide_a_dead_peer),
		cmocka_unit_test(the_round_trip_excludes_the_time_at_the_peer),
		cmocka_unit_test(an_invalid_echo_gives_no_round_trip),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
