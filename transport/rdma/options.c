/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The options of rdma: URIs, and the reasons for their defaults.
 *
 * retry, ack-timeout: the device repeats a request that is not acknowledged `retry` times, 4.096
 * us * 2^ack-timeout apart (14: 67 ms). So a dead path shows after (retry + 1) times that: 268 ms
 * on the urgent lanes, 403 ms on the bulk lane, where loss is likelier and no vCPU waits. The
 * values that rdma_cm chooses take seconds to minutes. Never 7 retries: some devices count them,
 * soft-RoCE takes 7 for "for ever".
 *
 * rnr-timer: a receiver that is not ready is asked again after code 12, 0.64 ms; rdma_cm's code 0
 * means 655 ms. There is no such receiver here, because READs need no receive.
 *
 * Traffic classes: a fabric that is made ready for RoCE mostly treats DSCP 26 (tos 104) as
 * lossless, which is right for bulk. Expedited forwarding (tos 184) lets the few urgent READs
 * overtake.
 *
 * connect-timeout-ms: a lane that is not connected by then is tried again while the handshake
 * lasts, for twice as long each time. The first attempt has a second, because rdma_cm itself
 * repeats a lost message after 4 s.
 *
 * read-deadline-ms: an urgent READ that has not completed by then fails the path. The device
 * alone is not enough: a path that loses much but not all never runs out of retries, since any
 * progress starts the count anew, and a vCPU waits meanwhile. The deadline leaves time for the
 * retries, whose failure names the cause: by default it is twice what they take at most, 537 ms,
 * and at least 250 ms. Hosts that stop for longer moments (emulated ones) need more; 0 turns the
 * deadline off.
 */
#include "transport/rdma/path.h"

typedef struct Number {
	const char *name;
	guint64 min, max, fallback;
	const char *help;
} Number;

enum {
	ACK_TIMEOUT,
	RETRY,
	BULK_RETRY,
	RNR_RETRY,
	RNR_TIMER,
	DEPTH,
	TOS,
	BULK_TOS,
	CONNECT_TIMEOUT,
	READ_DEADLINE,
	N_NUMBERS
};

static const Number numbers[N_NUMBERS] = {
	[ACK_TIMEOUT] = {"ack-timeout", 8, 22, 14,
			 "an unacknowledged request is repeated after 4.096 us * 2^N"},
	[RETRY] = {"retry", 1, 6, 3, "times that an urgent READ is repeated"},
	[BULK_RETRY] = {"bulk-retry", 1, 6, 5, "times that a bulk READ is repeated"},
	[RNR_RETRY] = {"rnr-retry", 0, 6, 6, "times that a peer that is not ready is asked again"},
	[RNR_TIMER] = {"rnr-timer", 1, 31, 12,
		       "pause before it is asked again: a code, see ibv_modify_qp(3)"},
	[DEPTH] = {"depth", 1, PR_VERBS_DEPTH_MAX, 16, "READs outstanding on a lane"},
	[TOS] = {"tos", 0, 255, 184, "traffic class of urgent READs"},
	[BULK_TOS] = {"bulk-tos", 0, 255, 104, "traffic class of bulk READs"},
	[CONNECT_TIMEOUT] = {"connect-timeout-ms", 50, 60000, 1000,
			     "time for the first attempt to connect a lane"},
	/* The default: see read_deadline_ms(). */
	[READ_DEADLINE] = {"read-deadline-ms", 0, 60000, G_MAXUINT64,
			   "an urgent READ that takes longer fails the path; 0: never"},
};

#define READ_DEADLINE_MIN_MS 250

static guint read_deadline_ms(const guint64 *values)
{
	guint64 timers_us = (values[RETRY] + 1) * (4096ull << values[ACK_TIMEOUT]) / 1000;

	if (values[READ_DEADLINE] != numbers[READ_DEADLINE].fallback)
		return (guint)values[READ_DEADLINE];
	return (guint)MAX(READ_DEADLINE_MIN_MS, 2 * timers_us / 1000 + 1);
}

void pr_verbs_describe(GString *out)
{
	pr_backend_describe(out, "rdma:HOST:PORT", "one-sided READs over RDMA, by libibverbs");
	pr_backend_describe_option(out, "dev=NAME", "only over this device");
	for (guint i = 0; i < N_NUMBERS; i++) {
		const Number *number = &numbers[i];
		g_autofree char *option = g_strdup_printf("%s=N", number->name);
		g_autofree char *fallback =
			number->fallback <= number->max
				? g_strdup_printf("%" G_GUINT64_FORMAT, number->fallback)
				: g_strdup("twice what the retries take");
		g_autofree char *help =
			g_strdup_printf("%s; default %s, range %" G_GUINT64_FORMAT
					"..%" G_GUINT64_FORMAT,
					number->help, fallback, number->min, number->max);

		pr_backend_describe_option(out, option, help);
	}
}

gboolean pr_verbs_parse_options(const PrUri *uri, PrVerbsOptions *ret, GError **error)
{
	const char *known[N_NUMBERS + 2] = {"dev"};
	guint64 values[N_NUMBERS];

	for (guint i = 0; i < N_NUMBERS; i++)
		known[i + 1] = numbers[i].name;
	if (!pr_backend_check_options(uri, known, error))
		return FALSE;
	for (guint i = 0; i < N_NUMBERS; i++)
		if (!pr_backend_number(uri, numbers[i].name, numbers[i].min, numbers[i].max,
				       numbers[i].fallback, &values[i], error))
			return FALSE;
	*ret = (PrVerbsOptions){
		.device = g_hash_table_lookup(uri->options, "dev"),
		.ack_timeout = values[ACK_TIMEOUT],
		.retry = {[PR_LANE_URGENT] = values[RETRY], [PR_LANE_BULK] = values[BULK_RETRY]},
		.rnr_retry = values[RNR_RETRY],
		.rnr_timer = values[RNR_TIMER],
		.depth = values[DEPTH],
		.tos = {[PR_LANE_URGENT] = values[TOS], [PR_LANE_BULK] = values[BULK_TOS]},
		.connect_timeout_ms = (guint)values[CONNECT_TIMEOUT],
		.read_deadline_ms = read_deadline_ms(values),
	};
	return TRUE;
}
