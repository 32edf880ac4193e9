/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The engine beside its floors, in one run: how fast the bulk pull is, and how long a fault takes, over
 * loopback, with a guest that does nothing else. Rounds alternate between floor and engine, because
 * the machine's mood changes; medians are shown.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/bench/raw.h"
#include "tests/integration/pair.h"

#define MIB	    (1024ull * 1024)
#define RATE_READ   (128u * 1024)
#define RATE_WINDOW 8
#define MAX_ROUNDS  25

static int rounds = 5, size_mib = 512, faults = 4000;
static gboolean json;

static const GOptionEntry options[] = {
	{"rounds", 'r', 0, G_OPTION_ARG_INT, &rounds, "rounds of each measurement (1 to 25)", "N"},
	{"size", 's', 0, G_OPTION_ARG_INT, &size_mib, "guest RAM (64 to 8192)", "MIB"},
	{"faults", 'f', 0, G_OPTION_ARG_INT, &faults, "faults a round (100 to 10000)", "N"},
	{"json", 'j', 0, G_OPTION_ARG_NONE, &json, "print JSON instead of a table", NULL},
	{NULL},
};

/* One figure over the rounds. */
typedef struct Series {
	double value[MAX_ROUNDS];
	guint n;
} Series;

static void add(Series *series, double value)
{
	series->value[series->n++] = value;
}

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return x < y ? -1 : x > y;
}

static double median(Series *series)
{
	qsort(series->value, series->n, sizeof(double), by_value);
	return series->value[series->n / 2];
}

/* What is measured for one transport. */
typedef struct Figures {
	Series pull, raw_read, copy;		 /* bytes a second */
	Series mean, p50, p99, engine_mean;	 /* us: seen by the guest, and by the engine */
	Series floor_mean, floor_p50, floor_p99; /* us: bare minor fault + raw 4 KiB READ */
	uint64_t dist[PR_LATENCY_BUCKETS];
} Figures;

static void check(gboolean done, GError *error)
{
	if (!done)
		g_error("%s", error->message);
}

/* ---- the engine ---- */

static double measure_pull(const char *scheme)
{
	PairConfig config = {.scheme = scheme, .size = (uint64_t)size_mib * MIB, .paused = TRUE};
	g_autoptr(Pair) pair = pair_new(&config);
	g_auto(PrMigrationInfo) info = {0};

	pair_migrate(pair);
	pair_wait(pair, PR_STATE_COMPLETED);
	pr_migration_query(pair->destination.engine, &info);
	gint64 from = side_told_at(&pair->destination, PR_STATE_DEVICE);
	gint64 to = side_told_at(&pair->destination, PR_STATE_COMPLETED);
	return (double)info.transferred * G_USEC_PER_SEC / (double)(to - from);
}

static uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000ull + (uint64_t)ts.tv_nsec;
}

/* Touches pages in an order that no read-ahead would guess; each for the first time. */
static void touch_pages(TestGuest *guest, uint64_t *samples)
{
	volatile uint8_t *map = testguest_block_map(guest, 0);
	uint64_t n_pages = testguest_block_size(guest) / 4096;
	uint64_t stride = n_pages / 2 + 1;

	while (n_pages % stride == 0 || stride % 2 == 0)
		stride++;
	for (int i = 0; i < faults; i++) {
		uint64_t page = ((uint64_t)i * stride) % n_pages;
		uint64_t start = now_ns();
		(void)map[page * 4096];
		samples[i] = now_ns() - start;
	}
}

static void measure_faults(const char *scheme, Figures *figures)
{
	/* The bulk pull all but stands still: what is measured is the fault service alone. */
	PairConfig config = {
		.scheme = scheme, .size = 2ull * faults * 4096 * 2, .paused = TRUE, .bandwidth = 1};
	g_autoptr(Pair) pair = pair_new(&config);
	g_autofree uint64_t *samples = g_new0(uint64_t, faults);
	g_auto(PrMigrationInfo) info = {0};

	pair_migrate(pair);
	pair_wait(pair, PR_STATE_POSTCOPY_ACTIVE);
	touch_pages(pair->destination.guest, samples);
	pr_migration_query(pair->destination.engine, &info);
	pr_params_set(&pair->destination.params, "max-postcopy-bandwidth", 0, NULL);
	pair_wait(pair, PR_STATE_COMPLETED);

	RawLatency seen = raw_latency(samples, (guint)faults);
	add(&figures->mean, seen.mean_us);
	add(&figures->p50, seen.p50_us);
	add(&figures->p99, seen.p99_us);
	add(&figures->engine_mean, (double)info.fault_latency_ns / 1000);
	for (guint i = 0; i < PR_LATENCY_BUCKETS; i++)
		figures->dist[i] += info.latency_dist[i];
}

/* ---- the floors ---- */

static void measure_floors(const char *scheme, Figures *figures)
{
	gboolean ofi = strcmp(scheme, "ofi") == 0;
	uint64_t total = (uint64_t)size_mib * MIB;
	RawLatency fault, read;
	GError *error = NULL;
	double rate;

	check(raw_memcpy(total, RATE_READ, &rate, &error), error);
	add(&figures->copy, rate);
	check(ofi ? raw_ofi_rate("net", total, RATE_READ, RATE_WINDOW, &rate, &error)
		  : raw_tcp_rate(total, RATE_READ, RATE_WINDOW, &rate, &error),
	      error);
	add(&figures->raw_read, rate);
	check(raw_minor_fault((guint)faults, RAW_SPIN, &fault, &error), error);
	check(ofi ? raw_ofi_latency("net", (guint)faults, RAW_SPIN, &read, &error)
		  : raw_tcp_latency((guint)faults, &read, &error),
	      error);
	add(&figures->floor_mean, fault.mean_us + read.mean_us);
	add(&figures->floor_p50, fault.p50_us + read.p50_us);
	add(&figures->floor_p99, fault.p99_us + read.p99_us);
}

/* ---- what is printed ---- */

static void print_table(const char *scheme, Figures *f)
{
	double pull = median(&f->pull), raw = median(&f->raw_read), copy = median(&f->copy);

	printf("\n%s: medians of %d rounds\n", scheme, rounds);
	printf("  bulk pull            %8.0f MB/s   %3.0f %% of raw READ (%.0f MB/s), %.0f %% of memcpy "
	       "(%.0f MB/s)\n",
	       pull / 1e6, pull / raw * 100, raw / 1e6, pull / copy * 100, copy / 1e6);
	printf("  fault, mean          %8.1f us     %4.2f x floor (%.1f us)\n", median(&f->mean),
	       median(&f->mean) / median(&f->floor_mean), median(&f->floor_mean));
	printf("  fault, p50           %8.1f us     %4.2f x floor (%.1f us)\n", median(&f->p50),
	       median(&f->p50) / median(&f->floor_p50), median(&f->floor_p50));
	printf("  fault, p99           %8.1f us     %4.2f x floor (%.1f us)\n", median(&f->p99),
	       median(&f->p99) / median(&f->floor_p99), median(&f->floor_p99));
	printf("  as the engine sees it %7.1f us mean; distribution of all rounds:\n",
	       median(&f->engine_mean));
	for (guint i = 0; i < PR_LATENCY_BUCKETS; i++)
		if (f->dist[i])
			printf("    %8u us ..  %8" G_GUINT64_FORMAT "\n", i ? 1u << i : 0,
			       f->dist[i]);
}

static void print_json(const char *scheme, Figures *f, gboolean last)
{
	printf("  \"%s\": {\"pull\": %.0f, \"raw_read\": %.0f, \"memcpy\": %.0f,\n", scheme,
	       median(&f->pull), median(&f->raw_read), median(&f->copy));
	printf("    \"fault_us\": {\"mean\": %.2f, \"p50\": %.2f, \"p99\": %.2f, \"engine_mean\": %.2f},\n",
	       median(&f->mean), median(&f->p50), median(&f->p99), median(&f->engine_mean));
	printf("    \"floor_us\": {\"mean\": %.2f, \"p50\": %.2f, \"p99\": %.2f},\n    \"latency_dist\": [",
	       median(&f->floor_mean), median(&f->floor_p50), median(&f->floor_p99));
	for (guint i = 0; i < PR_LATENCY_BUCKETS; i++)
		printf("%s%" G_GUINT64_FORMAT, i ? ", " : "", f->dist[i]);
	printf("]}%s\n", last ? "" : ",");
}

static void parse_options(int argc, char **argv)
{
	g_autoptr(GOptionContext) context = g_option_context_new("- the engine beside its floors");
	g_autoptr(GError) error = NULL;

	g_option_context_add_main_entries(context, options, NULL);
	if (!g_option_context_parse(context, &argc, &argv, &error)) {
		fprintf(stderr, "bench-engine: %s\n", error->message);
		exit(2);
	}
	if (rounds < 1 || rounds > MAX_ROUNDS || size_mib < 64 || size_mib > 8192 || faults < 100 ||
	    faults > 10000) {
		fprintf(stderr, "bench-engine: a number is out of its range, see --help\n");
		exit(2);
	}
}

static void no_log(const char *domain, GLogLevelFlags level, const char *message, gpointer opaque)
{
}

int main(int argc, char **argv)
{
	static const char *const schemes[] = {"ofi", "tcp"};
	static Figures figures[G_N_ELEMENTS(schemes)];

	parse_options(argc, argv);
	g_log_set_handler(NULL, G_LOG_LEVEL_MESSAGE, no_log, NULL);
	for (int round = 0; round < rounds; round++)
		for (guint i = 0; i < G_N_ELEMENTS(schemes); i++) {
			measure_floors(schemes[i], &figures[i]);
			add(&figures[i].pull, measure_pull(schemes[i]));
			measure_faults(schemes[i], &figures[i]);
		}
	if (json)
		printf("{\"rounds\": %d, \"size_mib\": %d, \"faults\": %d,\n", rounds, size_mib,
		       faults);
	for (guint i = 0; i < G_N_ELEMENTS(schemes); i++)
		if (json)
			print_json(schemes[i], &figures[i], i + 1 == G_N_ELEMENTS(schemes));
		else
			print_table(schemes[i], &figures[i]);
	if (json)
		printf("}\n");
	return 0;
}
