/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The engine and its floors in one run, over loopback: the rate of the bulk pull, and the latency
 * of a fault, with a guest that does nothing else. Rounds alternate between floor and engine,
 * because the machine's load changes. The results are medians.
 */
#include <string.h>

#include "tests/bench/bench.h"
#include "tests/bench/raw-memory.h"
#include "tests/rigs/pair.h"

#define MIB	    (1024ull * 1024)
#define RATE_READ   (128u * 1024)
#define RATE_WINDOW 8

static int size_mib = 512, faults = 4000;

static const GOptionEntry options[] = {
	{"size", 's', 0, G_OPTION_ARG_INT, &size_mib, "guest RAM (64 to 8192)", "MIB"},
	{"faults", 'f', 0, G_OPTION_ARG_INT, &faults, "faults a round (100 to 10000)", "N"},
	{NULL},
};

/* The figures of one transport. */
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

static double measure_pull(const Bench *bench, const char *scheme)
{
	PairConfig config = {.scheme = scheme, .size = (uint64_t)size_mib * MIB, .paused = TRUE};
	g_autoptr(Pair) pair = pair_new(&config);
	g_auto(PrMigrationInfo) info = {0};

	bench_apply_settings(bench, &pair->source.params);
	bench_apply_settings(bench, &pair->destination.params);
	pair_migrate(pair);
	pair_wait(pair, PR_STATE_COMPLETED);
	pr_migration_query(pair->destination.engine, &info);
	gint64 from = side_reported_at(&pair->destination, PR_STATE_DEVICE);
	gint64 to = side_reported_at(&pair->destination, PR_STATE_COMPLETED);
	return (double)info.transferred * G_USEC_PER_SEC / (double)(to - from);
}

/* Touches each page once, in an order that no read-ahead predicts. */
static void touch_pages(TestGuest *guest, uint64_t *samples)
{
	volatile uint8_t *map = testguest_block_map(guest, 0);
	uint64_t n_pages = testguest_block_size(guest) / 4096;
	uint64_t stride = n_pages / 2 + 1;

	while (n_pages % stride == 0 || stride % 2 == 0)
		stride++;
	for (int i = 0; i < faults; i++) {
		uint64_t page = ((uint64_t)i * stride) % n_pages;
		uint64_t start = raw_now_ns();
		(void)map[page * 4096];
		samples[i] = raw_now_ns() - start;
	}
}

static void measure_faults(const Bench *bench, const char *scheme, Figures *figures)
{
	/* The bulk pull is as good as off, so that only the fault service is measured. */
	PairConfig config = {
		.scheme = scheme, .size = 2ull * faults * 4096 * 2, .paused = TRUE, .bandwidth = 1};
	g_autoptr(Pair) pair = pair_new(&config);
	g_autofree uint64_t *samples = g_new0(uint64_t, faults);
	g_auto(PrMigrationInfo) info = {0};

	bench_apply_settings(bench, &pair->source.params);
	bench_apply_settings(bench, &pair->destination.params);
	pair_migrate(pair);
	pair_wait(pair, PR_STATE_POSTCOPY_ACTIVE);
	touch_pages(pair->destination.guest, samples);
	pr_migration_query(pair->destination.engine, &info);
	pr_params_set(&pair->destination.params, "max-postcopy-bandwidth", 0, NULL);
	pair_wait(pair, PR_STATE_COMPLETED);

	RawLatency seen = raw_latency(samples, (guint)faults);
	series_add(&figures->mean, seen.mean_us);
	series_add(&figures->p50, seen.p50_us);
	series_add(&figures->p99, seen.p99_us);
	series_add(&figures->engine_mean, (double)info.fault_latency_ns / 1000);
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
	series_add(&figures->copy, rate);
	check(ofi ? raw_ofi_rate("net", total, RATE_READ, RATE_WINDOW, &rate, &error)
		  : raw_tcp_rate(total, RATE_READ, RATE_WINDOW, &rate, &error),
	      error);
	series_add(&figures->raw_read, rate);
	check(raw_minor_fault((guint)faults, RAW_SPIN, &fault, &error), error);
	check(ofi ? raw_ofi_latency("net", (guint)faults, RAW_SPIN, &read, &error)
		  : raw_tcp_latency((guint)faults, &read, &error),
	      error);
	series_add(&figures->floor_mean, fault.mean_us + read.mean_us);
	series_add(&figures->floor_p50, fault.p50_us + read.p50_us);
	series_add(&figures->floor_p99, fault.p99_us + read.p99_us);
}

/* ---- the report ---- */

static void print_latency(const Bench *bench, const char *name, const Series *seen,
			  const Series *floor)
{
	bench_say(bench, "  fault, %-12s  %8.1f us     %4.2f x floor (%.1f us)\n", name,
		  series_median(seen), series_median(seen) / series_median(floor),
		  series_median(floor));
}

static void print_table(const Bench *bench, const char *scheme, Figures *f)
{
	double pull = series_median(&f->pull), raw = series_median(&f->raw_read);
	double copy = series_median(&f->copy);

	bench_say(bench, "\n%s: medians of %d rounds\n", scheme, bench->rounds);
	bench_say(
		bench,
		"  bulk pull            %8.0f MB/s   %3.0f %% of raw READ (%.0f MB/s), %.0f %% of "
		"memcpy (%.0f MB/s)\n",
		pull / 1e6, pull / raw * 100, raw / 1e6, pull / copy * 100, copy / 1e6);
	print_latency(bench, "mean", &f->mean, &f->floor_mean);
	print_latency(bench, "p50", &f->p50, &f->floor_p50);
	print_latency(bench, "p99", &f->p99, &f->floor_p99);
	bench_say(bench, "  measured by the engine %7.1f us mean; distribution of all rounds:\n",
		  series_median(&f->engine_mean));
	for (guint i = 0; i < PR_LATENCY_BUCKETS; i++)
		if (f->dist[i])
			bench_say(bench, "    %8u us ..  %8" G_GUINT64_FORMAT "\n", i ? 1u << i : 0,
				  f->dist[i]);
}

static void add_json(const Bench *bench, const char *scheme, Figures *f)
{
	bench_json_object(bench, scheme);
	bench_json_number(bench, "pull", series_median(&f->pull));
	bench_json_number(bench, "raw_read", series_median(&f->raw_read));
	bench_json_number(bench, "memcpy", series_median(&f->copy));
	bench_json_object(bench, "fault_us");
	bench_json_number(bench, "mean", series_median(&f->mean));
	bench_json_number(bench, "p50", series_median(&f->p50));
	bench_json_number(bench, "p99", series_median(&f->p99));
	bench_json_number(bench, "engine_mean", series_median(&f->engine_mean));
	bench_json_end_object(bench);
	bench_json_object(bench, "floor_us");
	bench_json_number(bench, "mean", series_median(&f->floor_mean));
	bench_json_number(bench, "p50", series_median(&f->floor_p50));
	bench_json_number(bench, "p99", series_median(&f->floor_p99));
	bench_json_end_object(bench);
	bench_json_array(bench, "latency_dist");
	for (guint i = 0; i < PR_LATENCY_BUCKETS; i++)
		bench_json_number(bench, NULL, (double)f->dist[i]);
	bench_json_end_array(bench);
	bench_json_end_object(bench);
}

static void check_options(const Bench *bench)
{
	if (size_mib < 64 || size_mib > 8192)
		bench_usage_error(bench, "--size %d: 64 to 8192", size_mib);
	if (faults < 100 || faults > 10000)
		bench_usage_error(bench, "--faults %d: 100 to 10000", faults);
	if (bench->quick) {
		size_mib = 64;
		faults = 500;
	}
}

int main(int argc, char **argv)
{
	static const char *const schemes[] = {"ofi", "tcp"};
	static Figures figures[G_N_ELEMENTS(schemes)];
	Bench bench;

	bench_begin(&bench, "bench-engine", "- the engine and its floors", options, &argc, &argv);
	check_options(&bench);
	for (int round = 0; round < bench.rounds; round++)
		for (guint i = 0; i < G_N_ELEMENTS(schemes); i++) {
			measure_floors(schemes[i], &figures[i]);
			series_add(&figures[i].pull, measure_pull(&bench, schemes[i]));
			measure_faults(&bench, schemes[i], &figures[i]);
		}
	bench_json_number(&bench, "size_mib", size_mib);
	bench_json_number(&bench, "faults", faults);
	for (guint i = 0; i < G_N_ELEMENTS(schemes); i++) {
		print_table(&bench, schemes[i], &figures[i]);
		add_json(&bench, schemes[i], &figures[i]);
	}
	bench_end(&bench);
	return 0;
}
