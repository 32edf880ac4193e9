/* SPDX-License-Identifier: GPL-2.0-or-later */
/* READs and probes, posted by the main thread. */
#include "tests/roce/pair/side.h"

#include <inttypes.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>

#define MARK	    0xee
#define PROBE_TOKEN 0x1234567890ull

guint side_await(Side *side, PrLaneId lane, PrCompletion *ret, guint max)
{
	struct pollfd fd = {.fd = side->ops->wait_fd(side->path, lane), .events = POLLIN};
	gint64 deadline = g_get_monotonic_time() + READ_MS * 1000;
	guint n;

	while (!(n = side->ops->poll(side->path, lane, ret, max))) {
		if (g_get_monotonic_time() > deadline)
			return 0;
		if (side->ops->arm(side->path, lane))
			poll(&fd, 1, READ_MS);
	}
	return n;
}

gboolean side_fail_read(Side *side, GError **error)
{
	gint64 end = g_get_monotonic_time() + G_USEC_PER_SEC;

	g_mutex_lock(&side->lock);
	while (!side->n_failures && g_cond_wait_until(&side->changed, &side->lock, end))
		;
	g_set_error(error, G_IO_ERROR, G_IO_ERROR_FAILED, "the READ failed: %s",
		    side->n_failures ? side->reason : "the path has reported no reason");
	g_mutex_unlock(&side->lock);
	return FALSE;
}

static gboolean read_one(Side *side, PrLaneId lane, guint block, uint64_t offset, uint32_t length,
			 GError **error)
{
	PrCompletion done = {0};

	if (!side->ops->post_read(side->path, lane, block, offset, length, offset))
		return fail(error, "the READ was not posted");
	if (!side_await(side, lane, &done, 1))
		return fail(error, "the READ did not complete");
	if (!done.ok)
		return side_fail_read(side, error);
	return done.token == offset ? TRUE : fail(error, "another READ's completion came");
}

/* LANE BLOCK OFFSET LENGTH SIZE SEED: READs of SIZE bytes, one by one. */
static gboolean check(Side *side, char **words, GString *ret, GError **error)
{
	guint lane = parse_number(words[1]), block = parse_number(words[2]),
	      size = parse_number(words[5]);
	uint64_t start = parse_number(words[3]), end = start + parse_number(words[4]),
		 seed = parse_number(words[6]);

	for (uint64_t i = start; i < end; i += size)
		if (!read_one(side, lane, block, i, MIN(size, end - i), error))
			return FALSE;
	return side_verify(side, block, start, end, seed, error);
}

/* LANE COUNT: posts that many probes at once. Answers with their time in microseconds. */
static gboolean probe(Side *side, char **words, GString *ret, GError **error)
{
	PrVerbsPath *path = (PrVerbsPath *)side->path;
	guint lane = parse_number(words[1]), n = parse_number(words[2]), done = 0, got;
	gint64 begin = g_get_monotonic_time();

	for (guint i = 0; i < n; i++)
		if (!pr_verbs_lane_probe(path, &path->lanes[lane], PROBE_TOKEN + i))
			return fail(error, "the probe was not posted");
	for (; done < n; done += got) {
		PrCompletion completions[16];

		got = side_await(side, lane, completions, G_N_ELEMENTS(completions));
		if (!got)
			return fail(error, "the probe did not complete");
		for (guint i = 0; i < got; i++)
			if (!completions[i].ok || completions[i].token != PROBE_TOKEN + done + i)
				return fail(error, "the probe failed");
	}
	g_string_printf(ret, "%" PRId64, g_get_monotonic_time() - begin);
	return TRUE;
}

/* LANE MS: posts a READ, and polls for its completion only after that time. */
static gboolean neglect(Side *side, char **words, GString *ret, GError **error)
{
	guint lane = parse_number(words[1]);
	PrCompletion done = {0};

	if (!side->ops->post_read(side->path, lane, 0, 0, 4096, 1))
		return fail(error, "the READ was not posted");
	g_usleep(parse_number(words[2]) * 1000);
	if (!side_await(side, lane, &done, 1))
		return fail(error, "the READ did not complete");
	return done.ok ? TRUE : side_fail_read(side, error);
}

/*
 * LANE COUNT SIZE: posts READs from the beginning of block 0, ends the path while they are in
 * flight, then writes MARK to their destination. Answers with the time of the end in microseconds.
 */
static gboolean abandon(Side *side, char **words, GString *ret, GError **error)
{
	guint lane = parse_number(words[1]), n = parse_number(words[2]),
	      size = parse_number(words[3]);
	gint64 begin;

	for (guint i = 0; i < n; i++)
		if (!side->ops->post_read(side->path, lane, 0, (uint64_t)i * size, size, i))
			return fail(error, "the READ was not posted");
	begin = g_get_monotonic_time();
	if (!side->ops->drain(side->path, READ_MS))
		return fail(error, "not drained in time");
	g_string_printf(ret, "%" PRId64, g_get_monotonic_time() - begin);
	memset(side_address(side, 0, 0), MARK, (gsize)n * size);
	g_clear_pointer(&side->path, pr_data_path_destroy);
	return TRUE;
}

/* LENGTH: fails unless block 0 still begins with that many bytes of MARK. */
static gboolean marked(Side *side, char **words, GString *ret, GError **error)
{
	const uint8_t *from = side->regions[0].addr;

	for (uint64_t i = 0; i < parse_number(words[1]); i++)
		if (from[i] != MARK)
			return fail(error, "something has landed after the end of the path");
	return TRUE;
}

static int compare(gconstpointer a, gconstpointer b)
{
	const gint64 *x = a, *y = b;

	return *x < *y ? -1 : *x > *y;
}

/*
 * LANE SIZE COUNT: one READ after the other. Answers with median and 99th percentile in
 * nanoseconds. The lane is polled, as the engine and ib_read_lat do.
 */
static gboolean latency(Side *side, char **words, GString *ret, GError **error)
{
	guint lane = parse_number(words[1]), size = parse_number(words[2]),
	      n = parse_number(words[3]);
	g_autofree gint64 *times = g_new(gint64, n);

	for (guint i = 0; i < n; i++) {
		uint64_t offset = (uint64_t)i * size % (PULL_BYTES);
		struct timespec begin, end;
		PrCompletion done;

		clock_gettime(CLOCK_MONOTONIC, &begin);
		if (!side->ops->post_read(side->path, lane, 0, offset, size, i))
			return fail(error, "the READ was not posted");
		while (!side->ops->poll(side->path, lane, &done, 1))
			;
		clock_gettime(CLOCK_MONOTONIC, &end);
		if (!done.ok)
			return side_fail_read(side, error);
		times[i] = (end.tv_sec - begin.tv_sec) * 1000000000ll + end.tv_nsec - begin.tv_nsec;
	}
	qsort(times, n, sizeof(*times), compare);
	g_string_printf(ret, "%" PRId64 " %" PRId64, times[n / 2], times[n * 99 / 100]);
	return TRUE;
}

/* SIZE BYTES: READs with the bulk lane's window full. Answers with bytes per second. */
static gboolean bandwidth(Side *side, char **words, GString *ret, GError **error)
{
	guint size = parse_number(words[1]),
	      window = side->ops->max_reads(side->path, PR_LANE_BULK);
	guint n = parse_number(words[2]) / size, posted = 0, done = 0;
	gint64 begin = g_get_monotonic_time();

	while (done < n) {
		PrCompletion completions[16];
		guint got;

		for (; posted < n && posted - done < window; posted++)
			if (!side->ops->post_read(side->path, PR_LANE_BULK, 0,
						  (uint64_t)posted * size % (PULL_BYTES), size,
						  posted))
				return fail(error, "a READ was not posted");
		got = side_await(side, PR_LANE_BULK, completions, G_N_ELEMENTS(completions));
		if (!got)
			return fail(error, "a READ did not complete");
		for (guint i = 0; i < got; i++)
			if (!completions[i].ok)
				return fail(error, "a READ failed");
		done += got;
	}
	g_string_printf(ret, "%.0f",
			(double)n * size * G_USEC_PER_SEC / (g_get_monotonic_time() - begin));
	return TRUE;
}

const Command read_commands[] = {
	{"check", 6, NEEDS_PATH, check},	 {"probe", 2, NEEDS_PATH, probe},
	{"neglect", 2, NEEDS_PATH, neglect},	 {"abandon", 3, NEEDS_PATH, abandon},
	{"marked", 1, NEEDS_SIDE, marked},	 {"latency", 3, NEEDS_PATH, latency},
	{"bandwidth", 2, NEEDS_PATH, bandwidth}, {NULL},
};
