/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * max-postcopy-bandwidth. One run compares the rate of the bulk pull with the limit, over more than
 * a second and without faults. A second run compares the latency of faults under the limit with
 * that of faults without a limit.
 */
#include <math.h>

#include "tests/bench/bench.h"
#include "tests/bench/touch.h"
#include "tests/rigs/pair.h"

#define MB	  1000000ull
#define N_THREADS 2
#define REST_US	  200
#define TOLERANCE 0.05
#define SECONDS	  1.5 /* duration of the pull under each limit */
#define WARM_UP	  0.2 /* seconds at its start that are not measured: the limiter's first burst */
#define SLICE_US  (50 * 1000)

static const guint limits[] = {50, 100, 200, 400, 0}; /* MB/s; 0: none */
#define N_LIMITS     G_N_ELEMENTS(limits)
#define NO_LIMIT     (N_LIMITS - 1)
#define UNLIMITED_MB 400 /* assumed MB/s without a limit; sets the guest's size */

/* The figures of one limit over all rounds. */
typedef struct Figures {
	Series rate;	  /* bytes a second */
	Series most;	  /* bytes a second, in the fastest 50 ms */
	Series seconds;	  /* duration of the measurement */
	Series mean, p99; /* us */
	guint n_faults;
} Figures;

static PairConfig config_for(const char *scheme, guint limit, double seconds)
{
	uint64_t size = (uint64_t)((limit ? limit : UNLIMITED_MB) * seconds * MB);

	/* The test guest leaves one page in eight as a hole or as zeros: those are not sent. */
	return (PairConfig){.scheme = scheme,
			    .size = size * 8 / 7,
			    .n_blocks = 1,
			    .paused = TRUE,
			    .bandwidth = limit * MB};
}

static void start(const Bench *bench, Pair *pair)
{
	bench_apply_settings(bench, &pair->source.params);
	bench_apply_settings(bench, &pair->destination.params);
	/* The source's scan for zero pages would take CPU time from the start of the pull. */
	pr_params_set_capability(&pair->source.params, "zero-pages", FALSE, NULL);
	pair_migrate(pair);
	side_wait(&pair->destination, PR_STATE_POSTCOPY_ACTIVE);
}

typedef struct Sample {
	gint64 us;
	uint64_t bytes;
} Sample;

static Sample take_sample(Pair *pair, gboolean *ret_active)
{
	g_auto(PrMigrationInfo) info = {0};
	gint64 before = g_get_monotonic_time();

	pr_migration_query(pair->destination.engine, &info);
	*ret_active = info.state == PR_STATE_POSTCOPY_ACTIVE;
	return (Sample){(before + g_get_monotonic_time()) / 2, info.transferred};
}

static double rate_between(Sample from, Sample to)
{
	return (double)(to.bytes - from.bytes) * G_USEC_PER_SEC / (double)(to.us - from.us);
}

/* Samples the received bytes from the end of the warm-up to the last sample during the pull. */
static void measure_rate(const Bench *bench, const char *scheme, guint limit, double seconds,
			 Figures *figures)
{
	PairConfig config = config_for(scheme, limit, seconds);
	g_autoptr(Pair) pair = pair_new(&config);
	gboolean active;
	double most = 0;

	start(bench, pair);
	g_usleep(limit ? (gulong)(WARM_UP * G_USEC_PER_SEC) : 0);
	Sample first = take_sample(pair, &active), last = first;
	while (active) {
		g_usleep(limit ? SLICE_US : SLICE_US / 10);
		Sample now = take_sample(pair, &active);
		if (!active)
			break;
		most = MAX(most, rate_between(last, now));
		last = now;
	}
	pair_wait(pair, PR_STATE_COMPLETED);
	if (last.us == first.us)
		g_error("%s, %u MB/s: the pull was over before it could be measured", scheme,
			limit);
	series_add(&figures->rate, rate_between(first, last));
	series_add(&figures->most, most);
	series_add(&figures->seconds, (double)(last.us - first.us) / G_USEC_PER_SEC);
}

static void measure_latency(const Bench *bench, const char *scheme, guint limit, double seconds,
			    Figures *figures)
{
	PairConfig config = config_for(scheme, limit, seconds);
	g_autoptr(Pair) pair = pair_new(&config);
	g_auto(TouchResult) result = {0};
	TouchConfig touch = {.map = testguest_block_map(pair->destination.guest, 0),
			     .n_pages = config.size / 4096,
			     .n_threads = N_THREADS,
			     .rest_us = REST_US};
	Touch *running = touch_new(&touch);

	start(bench, pair);
	touch_go(running);
	side_wait(&pair->destination, PR_STATE_COMPLETED);
	touch_finish(running, /* now= */ TRUE, &result);
	side_wait(&pair->source, PR_STATE_COMPLETED);
	RawLatency latency = touch_latency(&result);
	series_add(&figures->mean, latency.n > 0 ? latency.mean_us : NAN);
	series_add(&figures->p99, latency.n > 0 ? latency.p99_us : NAN);
	figures->n_faults += latency.n;
}

/* Returns whether the limit holds. */
static gboolean report_limit(const Bench *bench, guint i, const Figures figures[N_LIMITS])
{
	const Figures *f = &figures[i], *without = &figures[NO_LIMIT];
	double rate = series_median(&f->rate);
	double ratio = limits[i] ? rate / (limits[i] * (double)MB) : NAN;
	double most = limits[i] ? series_median(&f->most) / (limits[i] * (double)MB) : NAN;
	gboolean holds = isnan(ratio) || fabs(ratio - 1) <= TOLERANCE;
	g_autofree char *name =
		limits[i] ? g_strdup_printf("%u", limits[i]) : g_strdup("unlimited");

	bench_say(bench,
		  "  %-10s %7.1f MB/s %6.3f %7.2f %6.1f s %8.1f us %6.2f %9.1f us %6.2f %7u%s\n",
		  name, rate / 1e6, ratio, most, series_median(&f->seconds),
		  series_median(&f->mean), series_ratio(&f->mean, &without->mean),
		  series_median(&f->p99), series_ratio(&f->p99, &without->p99), f->n_faults,
		  holds ? "" : "  DOES NOT HOLD");
	bench_json_object(bench, name);
	bench_json_number(bench, "bytes_per_s", rate);
	bench_json_number(bench, "rate_ratio", ratio);
	bench_json_number(bench, "fastest_50ms_ratio", most);
	bench_json_number(bench, "measured_s", series_median(&f->seconds));
	bench_json_number(bench, "fault_mean_us", series_median(&f->mean));
	bench_json_number(bench, "fault_p99_us", series_median(&f->p99));
	bench_json_number(bench, "mean_ratio", series_ratio(&f->mean, &without->mean));
	bench_json_number(bench, "p99_ratio", series_ratio(&f->p99, &without->p99));
	bench_json_number(bench, "n_faults", f->n_faults);
	bench_json_end_object(bench);
	return holds;
}

static gboolean report(const Bench *bench, const char *scheme, const Figures figures[N_LIMITS])
{
	gboolean hold = TRUE;

	bench_say(bench,
		  "\n%s, medians of %d; faults: %d threads at random pages, "
		  "a pause of %d us after each\n",
		  scheme, bench->rounds, N_THREADS, REST_US);
	bench_say(bench, "  %-10s %12s %6s %7s %8s %11s %6s %12s %6s %7s\n", "limit, MB/s",
		  "bulk pull", "/limit", "50 ms", "over", "fault mean", "ratio", "fault p99",
		  "ratio", "n");
	bench_json_object(bench, scheme);
	for (guint i = 0; i < N_LIMITS; i++)
		hold = report_limit(bench, i, figures) && hold;
	bench_json_end_object(bench);
	return hold;
}

int main(int argc, char **argv)
{
	static const char *const schemes[] = {"ofi", "tcp"};
	static Figures figures[G_N_ELEMENTS(schemes)][N_LIMITS];
	gboolean hold = TRUE;
	Bench bench;

	bench_begin(&bench, "bench-limit", "- whether max-postcopy-bandwidth holds", NULL, &argc,
		    &argv);
	double seconds = bench.quick ? 0.5 : SECONDS;
	for (int round = 0; round < bench.rounds; round++)
		for (guint s = 0; s < G_N_ELEMENTS(schemes); s++)
			for (guint i = 0; i < N_LIMITS; i++) {
				measure_rate(&bench, schemes[s], limits[i], seconds,
					     &figures[s][i]);
				measure_latency(&bench, schemes[s], limits[i], seconds,
						&figures[s][i]);
			}
	for (guint s = 0; s < G_N_ELEMENTS(schemes); s++)
		hold = report(&bench, schemes[s], figures[s]) && hold;
	bench_say(&bench,
		  "'50 ms': the rate of the fastest 50 ms, divided by the limit;\n"
		  "'ratio': the latency, divided by that of faults without a limit\n"
		  "all limits hold within %.0f %%: %s\n",
		  TOLERANCE * 100, hold ? "yes" : "NO");
	bench_json_number(&bench, "hold", hold);
	bench_end(&bench);
	return 0;
}
