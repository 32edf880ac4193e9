/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Fair limits for unauthenticated peers. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <string.h>

#include "transport/control/peer-limits.h"

#define SECOND G_USEC_PER_SEC

/* "aab": hosts a, a and b. */
static guint hosts_of(const char *text, PrPeerHost *hosts)
{
	guint n = strlen(text);

	memset(hosts, 0, n * sizeof(*hosts));
	for (guint i = 0; i < n; i++)
		hosts[i].bytes[3] = (uint8_t)text[i];
	return n;
}

static void the_oldest_of_the_host_that_has_most_is_evicted(void **state)
{
	static const struct {
		const char *connected;
		guint evicted;
	} rows[] = {
		{"a", 0},     {"aaaa", 0},    {"abcd", 0},   {"abbb", 1}, {"abcbc", 1},
		{"bacca", 1}, {"zaaaaaa", 1}, {"aaabbb", 0}, {"xyyx", 0},
	};
	PrPeerHost hosts[16];

	for (guint i = 0; i < G_N_ELEMENTS(rows); i++) {
		guint n = hosts_of(rows[i].connected, hosts);

		if (pr_peer_pick_eviction(hosts, n) != rows[i].evicted)
			fail_msg("of %s number %u is evicted", rows[i].connected,
				 pr_peer_pick_eviction(hosts, n));
	}
}

static void a_burst_is_followed_by_a_rate(void **state)
{
	PrTokenBucket bucket = {0};
	PrPeerHost host = {{1}};
	gint64 now = 1000 * SECOND;
	guint taken = 0;

	for (guint i = 0; i < PR_TOKENS_BURST; i++) {
		assert_int_equal(pr_token_bucket_available_at(&bucket, now), now);
		pr_token_bucket_take(&bucket, &host, now);
	}
	for (gint64 end = now + 10 * SECOND; now < end;
	     now = pr_token_bucket_available_at(&bucket, now)) {
		if (pr_token_bucket_available_at(&bucket, now) == now) {
			pr_token_bucket_take(&bucket, &host, now);
			taken++;
		}
	}
	assert_in_range(taken, 10 * PR_TOKENS_PER_SECOND - 2, 10 * PR_TOKENS_PER_SECOND + 2);
	/* After a long idle time there is a whole burst again, and no more than one. */
	now += 1000 * SECOND;
	for (guint i = 0; i < PR_TOKENS_BURST; i++) {
		assert_int_equal(pr_token_bucket_available_at(&bucket, now), now);
		pr_token_bucket_take(&bucket, &host, now);
	}
	assert_true(pr_token_bucket_available_at(&bucket, now) > now);
}

static void the_host_that_had_fewest_tokens_is_next(void **state)
{
	PrTokenBucket bucket = {0};
	PrPeerHost hosts[64];
	gint64 now = SECOND;

	/* No host has got a token yet, so the oldest connection is next. */
	assert_int_equal(pr_token_bucket_pick_next(&bucket, hosts, hosts_of("aab", hosts)), 0);
	hosts_of("a", hosts);
	for (guint i = 0; i < 3 * PR_TOKENS_REMEMBERED; i++)
		pr_token_bucket_take(&bucket, hosts, now);
	assert_int_equal(pr_token_bucket_pick_next(&bucket, hosts, hosts_of("aaaaaaab", hosts)), 7);
	hosts_of("b", hosts);
	pr_token_bucket_take(&bucket, hosts, now);
	assert_int_equal(pr_token_bucket_pick_next(&bucket, hosts, hosts_of("aaaaaaab", hosts)), 7);
	assert_int_equal(pr_token_bucket_pick_next(&bucket, hosts, hosts_of("aaabbc", hosts)), 5);
}

static void suppressed_log_lines_are_counted(void **state)
{
	PrLogRatelimit limit = {0};
	gint64 now = 1000 * SECOND;
	guint suppressed = 99, logged = 0;

	g_mutex_init(&limit.lock);
	for (guint i = 0; i < 1000; i++)
		logged += pr_log_ratelimit_allows(&limit, now + i * 100, &suppressed);
	assert_int_equal(logged, PR_LOG_LINES_PER_SECOND);
	assert_int_equal(suppressed, 0);
	assert_true(pr_log_ratelimit_allows(&limit, now + 2 * SECOND, &suppressed));
	assert_int_equal(suppressed, 1000 - PR_LOG_LINES_PER_SECOND);
	assert_true(pr_log_ratelimit_allows(&limit, now + 2 * SECOND, &suppressed));
	assert_int_equal(suppressed, 0);
	g_mutex_clear(&limit.lock);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(the_oldest_of_the_host_that_has_most_is_evicted),
		cmocka_unit_test(a_burst_is_followed_by_a_rate),
		cmocka_unit_test(the_host_that_had_fewest_tokens_is_next),
		cmocka_unit_test(suppressed_log_lines_are_counted),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
