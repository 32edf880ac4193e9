/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Many vCPUs that fault at once: 1 to 64 threads touch random pages of the guest at the
 * destination. Each thread has its own slice, and the bulk pull is as good as off. The same round
 * measures the kernel's ceiling with as many threads: the data is in memory, and a bare loop
 * continues each fault at once. Both are measured with one fault thread and with several; the bare
 * loop then runs in as many threads.
 */
#include <math.h>
#include <string.h>

#include "tests/bench/bench.h"
#include "tests/bench/touch.h"
#include "tests/rigs/pair.h"
#include "transport/transport.h"

#define PAGE	      4096ull
#define TOUCHES	      16000 /* all threads together, in each measurement */
#define QUICK_TOUCHES 1280
#define FAULTED_PART  0.5 /* the least part of the touches that must be faults */

static const guint thread_counts[] = {1, 2, 4, 8, 16, 32, 64};
/* The ceiling, and the transports. */
static const char *const kinds[] = {"ceiling", "ofi", "tcp"};
#define N_COUNTS G_N_ELEMENTS(thread_counts)
#define N_KINDS	 G_N_ELEMENTS(kinds)
#define N_ROWS	 (2 * N_KINDS) /* each kind with one fault thread, then with more */

static gint only_threads;
static gint more_fault_threads = 2;
static char *only_kind;

static const GOptionEntry options[] = {
	{"threads", 't', 0, G_OPTION_ARG_INT, &only_threads, "measure only this number of threads",
	 "N"},
	{"fault-threads", 'f', 0, G_OPTION_ARG_INT, &more_fault_threads,
	 "fault threads of the second row (1 to 8; default 2; 1: no such row)", "N"},
	{"kind", 'k', 0, G_OPTION_ARG_STRING, &only_kind, "measure only this: ceiling, ofi or tcp",
	 "KIND"},
	{NULL},
};

static guint fault_threads_of(guint row)
{
	return row < N_KINDS ? 1 : (guint)more_fault_threads;
}

/* kind: NULL stands for any kind. */
static gboolean is_wanted(guint count, const char *kind)
{
	return (only_threads == 0 || (guint)only_threads == count) &&
	       (!kind || !only_kind || strcmp(only_kind, kind) == 0);
}

/* The figures over all rounds; latencies in us, measured by the threads that touch. */
typedef struct Figures {
	Series rate; /* faults a second */
	Series mean, p50, p99, max;
	GArray *faults; /* uint64_t: ns; the faults of all rounds */
} Figures;

static void add_result(Figures *figures, const TouchResult *result, const char *kind)
{
	if (result->faults->len < FAULTED_PART * (double)result->touched)
		g_error("%s: only %u of %" G_GUINT64_FORMAT " touches were faults", kind,
			result->faults->len, result->touched);
	RawLatency latency = touch_latency(result);
	series_add(&figures->rate, result->faults->len / result->seconds);
	series_add(&figures->mean, latency.mean_us);
	series_add(&figures->p50, latency.p50_us);
	series_add(&figures->p99, latency.p99_us);
	series_add(&figures->max, latency.max_us);
	g_array_append_vals(figures->faults, result->faults->data, result->faults->len);
}

static void touch(const void *map, uint64_t n_pages, guint n_threads, guint n_touches,
		  TouchResult *ret)
{
	TouchConfig config = {
		.map = map,
		.n_pages = n_pages,
		.n_threads = n_threads,
		.n_each = n_touches / n_threads,
	};
	Touch *running = touch_new(&config);

	touch_go(running);
	touch_finish(running, /* now= */ FALSE, ret);
}

static void measure_ceiling(guint n_fault_threads, guint n_threads, guint n_touches,
			    uint64_t n_pages, Figures *figures)
{
	guint spin_us = (guint)pr_param_info(PR_PARAM_FAULT_SPIN)->def;
	g_autoptr(GError) error = NULL;
	g_autoptr(RawGuest) guest = raw_guest_new(n_pages, n_fault_threads, spin_us, &error);
	g_auto(TouchResult) result = {0};

	if (!guest)
		g_error("%s", error->message);
	touch(raw_guest_map(guest), n_pages, n_threads, n_touches, &result);
	add_result(figures, &result, "ceiling");
}

static void measure_engine(const Bench *bench, const char *scheme, guint n_fault_threads,
			   guint n_threads, guint n_touches, uint64_t n_pages, Figures *figures)
{
	/* With this limit, hours pass between the first bulk READ and the second. */
	PairConfig config = {.scheme = scheme,
			     .size = n_pages * PAGE,
			     .n_blocks = 1,
			     .paused = TRUE,
			     .bandwidth = 1};
	g_autoptr(Pair) pair = pair_new(&config);
	g_auto(TouchResult) result = {0};

	bench_apply_settings(bench, &pair->source.params);
	bench_apply_settings(bench, &pair->destination.params);
	pr_params_set(&pair->destination.params, "fault-threads", n_fault_threads, NULL);
	pr_params_set_capability(&pair->source.params, "zero-pages", FALSE, NULL);
	pair_migrate(pair);
	pair_wait(pair, PR_STATE_POSTCOPY_ACTIVE);
	touch(testguest_block_map(pair->destination.guest, 0), n_pages, n_threads, n_touches,
	      &result);
	add_result(figures, &result, scheme);
	pr_params_set(&pair->destination.params, "max-postcopy-bandwidth", 0, NULL);
	pair_wait(pair, PR_STATE_COMPLETED);
}

static void measure(const Bench *bench, const char *kind, guint n_fault_threads, guint n_threads,
		    guint n_touches, Figures *figures)
{
	uint64_t n_pages = n_touches * 2ull; /* 14 of 16 pages can be touched (touch.c) */

	if (strcmp(kind, "ceiling") == 0)
		measure_ceiling(n_fault_threads, n_threads, n_touches, n_pages, figures);
	else
		measure_engine(bench, kind, n_fault_threads, n_threads, n_touches, n_pages,
			       figures);
}

/* The part of the faults that took at least this long, at eight points for each doubling. */
static void report_distribution(const Bench *bench, Figures *figures)
{
	guint n = figures->faults->len, i = 0;

	raw_latency((uint64_t *)(void *)figures->faults->data, n); /* sorts */
	bench_json_array(bench, "slower");
	for (guint step = 0; step < 8 * 24 && i < n; step++) {
		double us = exp2(step / 8.0);

		while (i < n && (double)g_array_index(figures->faults, uint64_t, i) < us * 1000)
			i++;
		bench_json_array(bench, NULL);
		bench_json_number(bench, NULL, us);
		bench_json_number(bench, NULL, (double)(n - i) / n);
		bench_json_end_array(bench);
	}
	bench_json_end_array(bench);
}

static void report_kind(const Bench *bench, const char *kind, guint n_fault_threads, Figures *f,
			const Figures *ceiling)
{
	double rate = series_ratio(&f->rate, &ceiling->rate);
	double mean = series_ratio(&f->mean, &ceiling->mean);
	g_autofree char *name = n_fault_threads > 1
					? g_strdup_printf("%s-%u", kind, n_fault_threads)
					: g_strdup(kind);

	bench_say(bench, "  %-8s %5u %10.0f %9.1f %9.1f %9.1f %10.1f %9u", kind, n_fault_threads,
		  series_median(&f->rate), series_median(&f->mean), series_median(&f->p50),
		  series_median(&f->p99), series_median(&f->max), f->faults->len);
	if (f == ceiling)
		bench_say(bench, "\n");
	else
		bench_say(bench, " %10.2f %10.2f\n", rate, mean);
	bench_json_object(bench, name);
	bench_json_number(bench, "n", f->faults->len);
	bench_json_number(bench, "faults_per_s", series_median(&f->rate));
	bench_json_number(bench, "mean_us", series_median(&f->mean));
	bench_json_number(bench, "p50_us", series_median(&f->p50));
	bench_json_number(bench, "p99_us", series_median(&f->p99));
	bench_json_number(bench, "max_us", series_median(&f->max));
	bench_json_number(bench, "rate_ratio", rate);
	bench_json_number(bench, "mean_ratio", mean);
	report_distribution(bench, f);
	bench_json_end_object(bench);
}

static void report(const Bench *bench, Figures figures[N_COUNTS][N_ROWS])
{
	bench_say(
		bench,
		"\nThreads that touch random pages, medians of %d; ceiling: the data is in memory, "
		"and a bare loop continues each fault\n",
		bench->rounds);
	bench_say(bench, "  %-8s %5s %10s %9s %9s %9s %10s %9s %10s %10s\n", "", "f.thr",
		  "faults/s", "mean us", "p50 us", "p99 us", "max us", "n", "rate/ceil.",
		  "mean/ceil.");
	bench_json_object(bench, "threads");
	for (guint i = 0; i < N_COUNTS; i++) {
		if (!is_wanted(thread_counts[i], NULL))
			continue;
		g_autofree char *name = g_strdup_printf("%u", thread_counts[i]);

		bench_say(bench, " %u thread%s\n", thread_counts[i],
			  thread_counts[i] > 1 ? "s" : "");
		bench_json_object(bench, name);
		for (guint row = 0; row < N_ROWS; row++)
			if (figures[i][row].rate.n > 0)
				report_kind(bench, kinds[row % N_KINDS], fault_threads_of(row),
					    &figures[i][row], &figures[i][row - row % N_KINDS]);
		bench_json_end_object(bench);
	}
	bench_json_end_object(bench);
}

int main(int argc, char **argv)
{
	static Figures figures[N_COUNTS][N_ROWS];
	guint n_rows;
	Bench bench;

	bench_begin(&bench, "bench-threads", "- many threads that fault at once", options, &argc,
		    &argv);
	if (more_fault_threads < 1 || more_fault_threads > PR_URGENT_LANES_MAX)
		bench_usage_error(&bench, "--fault-threads %d: 1 to %d", more_fault_threads,
				  PR_URGENT_LANES_MAX);
	n_rows = more_fault_threads > 1 ? N_ROWS : N_KINDS;
	for (guint i = 0; i < N_COUNTS; i++)
		for (guint row = 0; row < N_ROWS; row++)
			figures[i][row].faults = g_array_new(FALSE, FALSE, sizeof(uint64_t));
	for (int round = 0; round < bench.rounds; round++)
		for (guint i = 0; i < N_COUNTS; i++)
			for (guint row = 0; row < n_rows; row++)
				if (is_wanted(thread_counts[i], kinds[row % N_KINDS]))
					measure(&bench, kinds[row % N_KINDS], fault_threads_of(row),
						thread_counts[i],
						bench.quick ? QUICK_TOUCHES : TOUCHES,
						&figures[i][row]);
	report(&bench, figures);
	for (guint i = 0; i < N_COUNTS; i++)
		for (guint row = 0; row < N_ROWS; row++)
			g_array_unref(figures[i][row].faults);
	bench_end(&bench);
	return 0;
}
