/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The effect of fault-readahead. One thread touches the pages of a guest that has just arrived, in
 * several patterns and with the bulk pull at several speeds. Each round measures all limits in
 * turn. The results are medians.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/rigs/pair.h"

#define MIB	   (1024ull * 1024)
#define PAGE	   4096
#define MAX_ROUNDS 25
#define MAX_LIMITS 8

static int rounds = 3, touches = 3000;
static const char *limits_text = "0,8,32";
static const char *only = "";

static const GOptionEntry options[] = {
	{"rounds", 'r', 0, G_OPTION_ARG_INT, &rounds, "rounds of each measurement (1 to 25)", "N"},
	{"touches", 't', 0, G_OPTION_ARG_INT, &touches, "pages touched a round (100 to 8000)", "N"},
	{"limits", 'l', 0, G_OPTION_ARG_STRING, &limits_text, "fault-readahead (default 0,8,32)",
	 "N,N…"},
	{"only", 'o', 0, G_OPTION_ARG_STRING, &only, "only measurements whose name contains this",
	 "TEXT"},
	{NULL},
};

typedef struct Pattern {
	const char *name;
	uint64_t first, step; /* page of the i-th touch: first + i * step, modulo the block */
	gboolean beside;      /* another thread touches the other block in ascending order */
} Pattern;

static const Pattern patterns[] = {
	{"up", 4000, 1},  {"down", 12000, (uint64_t)-1}, {"stride 5", 16, 5},
	{"random", 9, 0}, {"beside up", 9, 0, TRUE},
};

static const struct {
	const char *name;
	uint64_t bandwidth; /* limit of the bulk pull, bytes a second; 0: unlimited */
} speeds[] = {{"none", 1}, {"32 MB/s", 32 * MIB}, {"full", 0}};

enum { FAULTS, TOUCH_US, FAULT_US, AHEAD, WAITED, N_FIGURES };

typedef struct Series {
	double value[N_FIGURES][MAX_ROUNDS];
	guint n;
} Series;

static uint64_t page_of(const Pattern *pattern, uint64_t i, uint64_t n_pages)
{
	if (pattern->step)
		return (pattern->first + i * pattern->step) % n_pages;
	return (pattern->first + i * 2654435761u) % n_pages; /* the factor is odd: each page once */
}

static double walk(TestGuest *guest, const Pattern *pattern)
{
	const volatile uint64_t *map = testguest_block_map(guest, 1);
	uint64_t n_pages = testguest_block_size(guest) / PAGE;
	gint64 start = g_get_monotonic_time();
	uint64_t sum = 0;

	for (int i = 0; i < touches; i++) {
		const volatile uint64_t *page = map + page_of(pattern, (uint64_t)i, n_pages) * 512;

		for (guint word = 0; word < 512; word++)
			sum += page[word];
	}
	(void)sum;
	return (double)(g_get_monotonic_time() - start) / touches;
}

/* The second thread. Its touches count in `faults`, not in us/touch. */
typedef struct Companion {
	TestGuest *guest;
	gint stop; /* atomic */
	GThread *thread;
} Companion;

static gpointer walk_up(gpointer opaque)
{
	Companion *companion = opaque;
	const volatile uint64_t *map = testguest_block_map(companion->guest, 0);
	uint64_t n_pages = testguest_block_size(companion->guest) / PAGE;

	for (uint64_t page = 0; page < n_pages && !g_atomic_int_get(&companion->stop); page++)
		for (guint word = 0; word < 512; word++)
			(void)map[page * 512 + word];
	return NULL;
}

static void measure(const char *scheme, const Pattern *pattern, uint64_t bandwidth, uint64_t limit,
		    Series *series)
{
	PairConfig config = {
		.scheme = scheme, .size = 128 * MIB, .paused = TRUE, .bandwidth = bandwidth};
	g_autoptr(Pair) pair = pair_new(&config);
	g_auto(PrMigrationInfo) before = {0}, after = {0};
	guint at = series->n++;
	Companion companion = {.guest = pair->destination.guest};

	pr_params_set(&pair->destination.params, "fault-readahead", limit, NULL);
	pair_migrate(pair);
	side_wait_any(&pair->destination,
		      1u << PR_STATE_POSTCOPY_ACTIVE | 1u << PR_STATE_COMPLETED);
	pr_migration_query(pair->destination.engine, &before);
	if (pattern->beside)
		companion.thread = g_thread_new("companion", walk_up, &companion);
	series->value[TOUCH_US][at] = walk(pair->destination.guest, pattern);
	g_atomic_int_set(&companion.stop, TRUE);
	if (companion.thread)
		g_thread_join(companion.thread);
	pr_migration_query(pair->destination.engine, &after);
	pr_params_set(&pair->destination.params, "max-postcopy-bandwidth", 0, NULL);
	pair_wait(pair, PR_STATE_COMPLETED);

	double faults = (double)(after.faults - before.faults);
	double ns = (double)after.fault_latency_ns * (double)after.faults -
		    (double)before.fault_latency_ns * (double)before.faults;
	series->value[FAULTS][at] = faults;
	series->value[FAULT_US][at] = faults > 0 ? ns / faults / 1000 : 0;
	series->value[AHEAD][at] = (double)(after.readahead_pages - before.readahead_pages);
	series->value[WAITED][at] = (double)(after.readahead_waited - before.readahead_waited);
}

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return x < y ? -1 : x > y;
}

static double median(Series *series, guint figure)
{
	qsort(series->value[figure], series->n, sizeof(double), by_value);
	return series->value[figure][series->n / 2];
}

static void compare(const char *scheme, guint pattern, guint speed, char **limits, guint n_limits)
{
	Series series[MAX_LIMITS] = {0};

	for (int round = 0; round < rounds; round++)
		for (guint i = 0; i < n_limits; i++)
			measure(scheme, &patterns[pattern], speeds[speed].bandwidth,
				g_ascii_strtoull(limits[i], NULL, 10), &series[i]);
	double base = median(&series[0], TOUCH_US);
	for (guint i = 0; i < n_limits; i++)
		printf("%-4s %-9s %-8s %5s %8.0f %9.1f %7.2f %9.1f %8.0f %7.0f\n", scheme,
		       patterns[pattern].name, speeds[speed].name, limits[i],
		       median(&series[i], FAULTS), median(&series[i], TOUCH_US),
		       median(&series[i], TOUCH_US) / base, median(&series[i], FAULT_US),
		       median(&series[i], AHEAD), median(&series[i], WAITED));
	fflush(stdout);
}

static void parse_options(int argc, char **argv)
{
	g_autoptr(GOptionContext) context = g_option_context_new("- faults with read-ahead");
	g_autoptr(GError) error = NULL;

	g_option_context_add_main_entries(context, options, NULL);
	if (!g_option_context_parse(context, &argc, &argv, &error)) {
		fprintf(stderr, "bench-readahead: %s\n", error->message);
		exit(2);
	}
	if (rounds < 1 || rounds > MAX_ROUNDS || touches < 100 || touches > 8000) {
		fprintf(stderr, "bench-readahead: a number is out of its range, see --help\n");
		exit(2);
	}
}

static void no_log(const char *domain, GLogLevelFlags level, const char *message, gpointer opaque)
{
}

int main(int argc, char **argv)
{
	static const char *const schemes[] = {"ofi", "tcp"};

	parse_options(argc, argv);
	g_auto(GStrv) limits = g_strsplit(limits_text, ",", MAX_LIMITS);
	g_log_set_handler(NULL, G_LOG_LEVEL_MESSAGE, no_log, NULL);
	printf("%d pages touched, medians of %d rounds\n", touches, rounds);
	printf("%-4s %-9s %-8s %5s %8s %9s %7s %9s %8s %7s\n", "", "pattern", "bulk", "limit",
	       "faults", "us/touch", "ratio", "us/fault", "ahead", "waited");
	for (guint i = 0; i < G_N_ELEMENTS(schemes); i++)
		for (guint p = 0; p < G_N_ELEMENTS(patterns); p++)
			for (guint s = 0; s < G_N_ELEMENTS(speeds); s++) {
				g_autofree char *name = g_strdup_printf(
					"%s %s %s", schemes[i], patterns[p].name, speeds[s].name);

				if (strstr(name, only))
					compare(schemes[i], p, s, limits, g_strv_length(limits));
			}
	return 0;
}
