/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Justice among strangers. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <string.h>

#include "transport/control/peer-limits.h"

#define SECOND G_USEC_PER_SEC

/* "aab": hosts a, a and b. */
static guint hosts_of(const char *text, PrCrowdHost *hosts)
{
	guint n = strlen(text);

	memset(hosts, 0, n * sizeof(*hosts));
	for (guint i = 0; i < n; i++)
		hosts[i].bytes[3] = (uint8_t)text[i];
	return n;
}

static void the_first_of_the_host_that_has_most_goes(void **state)
{
	static const struct {
		const char *there;
		guint goes;
	} rows[] = {
		{"a", 0},     {"aaaa", 0},    {"abcd", 0},   {"abbb", 1}, {"abcbc", 1},
		{"bacca", 1}, {"zaaaaaa", 1}, {"aaabbb", 0}, {"xyyx", 0},
	};
	PrCrowdHost hosts[16];

	for (guint i = 0; i < G_N_ELEMENTS(rows); i++) {
		guint n = hosts_of(rows[i].there, hosts);

		if (pr_peer_pick_eviction(hosts, n) != rows[i].goes)
			fail_msg("of %s number %u goes", rows[i].there,
				 pr_peer_pick_eviction(hosts, n));
	}
}

static void a_burst_is_followed_by_a_rate(void **state)
{
	PrTokenBucket turns = {0};
	PrCrowdHost host = {{1}};
	gint64 now = 1000 * SECOND;
	guint taken = 0;

	for (guint i = 0; i < PR_TURNS_BURST; i++) {
		assert_int_equal(pr_token_bucket_when(&turns, now), now);
		pr_token_bucket_take(&turns, &host, now);
	}
	for (gint64 end = now + 10 * SECOND; now < end; now = pr_token_bucket_when(&turns, now)) {
		if (pr_token_bucket_when(&turns, now) == now) {
			pr_token_bucket_take(&turns, &host, now);
			taken++;
		}
	}
	assert_in_range(taken, 10 * PR_TURNS_PER_SECOND - 2, 10 * PR_TURNS_PER_SECOND + 2);
	/* Rested, there is a burst again, and no more than one. */
	now += 1000 * SECOND;
	for (guint i = 0; i < PR_TURNS_BURST; i++) {
		assert_int_equal(pr_token_bucket_when(&turns, now), now);
		pr_token_bucket_take(&turns, &host, now);
	}
	assert_true(pr_token_bucket_when(&turns, now) > now);
}

static void who_had_fewest_turns_is_next(void **state)
{
	PrTokenBucket turns = {0};
	PrCrowdHost hosts[64];
	gint64 now = SECOND;

	/* Nobody had any: first come, first served. */
	assert_int_equal(pr_token_bucket_whose(&turns, hosts, hosts_of("aab", hosts)), 0);
	hosts_of("a", hosts);
	for (guint i = 0; i < 3 * PR_TURNS_REMEMBERED; i++)
		pr_token_bucket_take(&turns, hosts, now);
	assert_int_equal(pr_token_bucket_whose(&turns, hosts, hosts_of("aaaaaaab", hosts)), 7);
	hosts_of("b", hosts);
	pr_token_bucket_take(&turns, hosts, now);
	assert_int_equal(pr_token_bucket_whose(&turns, hosts, hosts_of("aaaaaaab", hosts)), 7);
	assert_int_equal(pr_token_bucket_whose(&turns, hosts, hosts_of("aaabbc", hosts)), 5);
}

static void a_flood_of_lines_is_counted(void **state)
{
	PrLogRatelimit quiet = {0};
	gint64 now = 1000 * SECOND;
	guint left_out = 99, said = 0;

	g_mutex_init(&quiet.lock);
	for (guint i = 0; i < 1000; i++)
		said += pr_log_ratelimit_allows(&quiet, now + i * 100, &left_out);
	assert_int_equal(said, PR_QUIET_LINES);
	assert_int_equal(left_out, 0);
	assert_true(pr_log_ratelimit_allows(&quiet, now + 2 * SECOND, &left_out));
	assert_int_equal(left_out, 1000 - PR_QUIET_LINES);
	assert_true(pr_log_ratelimit_allows(&quiet, now + 2 * SECOND, &left_out));
	assert_int_equal(left_out, 0);
	g_mutex_clear(&quiet.lock);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(the_first_of_the_host_that_has_most_goes),
		cmocka_unit_test(a_burst_is_followed_by_a_rate),
		cmocka_unit_test(who_had_fewest_turns_is_next),
		cmocka_unit_test(a_flood_of_lines_is_counted),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
