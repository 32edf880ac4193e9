/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The effect of the bulk pull on faults where the link is the bottleneck. The benchmark measures
 * faults with the pull as good as off and with the pull at full speed. It compares the rate of the
 * pull with that of raw reads. The extra latency of a fault is the time that bytes sent before it
 * spend on the wire. The engine has to keep it below 100 us, and the link full.
 *
 * The link is the loopback device of the program's own network namespace (needs root). A token
 * bucket limits the direction from the source's address to the destination's, and another one the
 * opposite direction.
 */
#include <math.h>
#include <sched.h>

#include "tests/bench/bench.h"
#include "tests/bench/touch.h"
#include "tests/rigs/pair.h"

#define MB	   1000000ull
#define N_THREADS  1
#define REST_US	   1000
#define SECONDS	   0.8 /* duration of the pull while faults are measured */
#define N_QUIET	   200 /* faults without the pull */
#define SOURCE	   "127.0.0.2"
#define RAW_READ   (128u * 1024)
#define RAW_WINDOW 8
#define MOST_US	   100.0
#define LEAST_RATE 0.9

static const guint rates[] = {1000, 4000}; /* Mbit/s */
#define N_RATES G_N_ELEMENTS(rates)
static const char *qdisc = "pfifo limit 4000";

static const GOptionEntry options[] = {
	{"qdisc", 0, 0, G_OPTION_ARG_STRING, &qdisc,
	 "queueing discipline of the link (default: \"pfifo limit 4000\")", "TC"},
	{NULL},
};

/* The figures of one link over all rounds. */
typedef struct Figures {
	Series pull, raw;	     /* bytes a second */
	Series quiet_p50, quiet_p99; /* us */
	Series busy_p50, busy_p99;
	Series ahead; /* us: busy_p50 - quiet_p50 of each round */
	guint n_faults;
} Figures;

static void run(const char *format, ...) G_GNUC_PRINTF(1, 2);
static void run(const char *format, ...)
{
	g_autofree char *command = NULL, *complaint = NULL;
	g_autoptr(GError) error = NULL;
	va_list args;
	int status;

	va_start(args, format);
	command = g_strdup_vprintf(format, args);
	va_end(args);
	if (!g_spawn_command_line_sync(command, NULL, &complaint, &status, &error))
		g_error("%s: %s", command, error->message);
	if (!g_spawn_check_wait_status(status, NULL))
		g_error("%s: %s", command, complaint);
}

/* Limits both directions. The largest segment takes 25 us, so that the packets of several
 * connections alternate. */
static void set_link(guint mbit)
{
	guint us_bytes = mbit / 8;

	run("ip link set lo gso_max_size %u", MAX(3000, us_bytes * 25));
	for (guint way = 1; way <= 2; way++) {
		/* The burst keeps the link busy when a timer is up to 50 us late. */
		run("tc class replace dev lo parent 1: classid 1:%u htb "
		    "rate %umbit burst %u cburst %u",
		    way, mbit, us_bytes * 50 + 3028, us_bytes * 50 + 3028);
		run("tc qdisc replace dev lo parent 1:%u handle %u: %s", way, way + 1, qdisc);
	}
}

/* Called before the first thread starts: unshare() affects only the calling thread. */
static void make_namespace(const Bench *bench)
{
	if (unshare(CLONE_NEWNET) < 0)
		bench_usage_error(bench, "can't create a network namespace (%s); run it as root",
				  g_strerror(errno));
	run("ip link set lo mtu 1500 up");
	run("tc qdisc add dev lo root handle 1: htb default 1");
	set_link(rates[0]);
	run("tc filter add dev lo parent 1: protocol ip u32 match ip dst " SOURCE "/32 flowid 1:2");
}

static Pair *start(const Bench *bench, const PairConfig *config)
{
	Pair *pair = pair_new(config);
	char *uri = g_strdup_printf("%s&bind=" SOURCE, pair->uri);

	g_free(pair->uri);
	pair->uri = uri;
	bench_apply_settings(bench, &pair->source.params);
	bench_apply_settings(bench, &pair->destination.params);
	/* The source's scan for zero pages would take CPU time from the pull. */
	pr_params_set_capability(&pair->source.params, "zero-pages", FALSE, NULL);
	return pair;
}

static uint64_t size_for(const Bench *bench, guint mbit)
{
	return (uint64_t)(mbit * MB / 8 * (bench->quick ? 0.3 : SECONDS));
}

static void measure_pull(const Bench *bench, const char *scheme, guint mbit, Figures *figures)
{
	uint64_t size = size_for(bench, mbit) & ~(uint64_t)4095;
	PairConfig config = {.scheme = scheme, .size = size, .n_blocks = 1, .paused = TRUE};
	g_autoptr(Pair) pair = start(bench, &config);
	g_auto(PrMigrationInfo) info = {0};
	g_autoptr(GError) error = NULL;
	double raw;

	pair_migrate(pair);
	pair_wait(pair, PR_STATE_COMPLETED);
	pr_migration_query(pair->destination.engine, &info);
	gint64 from = side_reported_at(&pair->destination, PR_STATE_POSTCOPY_ACTIVE);
	gint64 to = side_reported_at(&pair->destination, PR_STATE_COMPLETED);
	series_add(&figures->pull, (double)info.transferred * G_USEC_PER_SEC / (double)(to - from));
	if (!raw_tcp_rate(size, RAW_READ, RAW_WINDOW, &raw, &error))
		g_error("%s", error->message);
	series_add(&figures->raw, raw);
}

/* Measures faults during a pull. bandwidth: its limit in bytes a second; 0: no limit. */
static RawLatency measure_faults(const Bench *bench, const char *scheme, guint mbit,
				 uint64_t bandwidth)
{
	PairConfig config = {.scheme = scheme,
			     .size = size_for(bench, mbit) & ~(uint64_t)4095,
			     .n_blocks = 1,
			     .paused = TRUE,
			     .bandwidth = bandwidth};
	g_autoptr(Pair) pair = start(bench, &config);
	g_auto(TouchResult) result = {0};
	TouchConfig touch = {.map = testguest_block_map(pair->destination.guest, 0),
			     .n_pages = config.size / 4096,
			     .n_threads = N_THREADS,
			     .n_each = bandwidth ? N_QUIET : 0,
			     .rest_us = REST_US};
	Touch *running = touch_new(&touch);

	pair_migrate(pair);
	side_wait(&pair->destination, PR_STATE_POSTCOPY_ACTIVE);
	touch_go(running);
	if (bandwidth == 0)
		side_wait(&pair->destination, PR_STATE_COMPLETED);
	touch_finish(running, /* now= */ bandwidth == 0, &result);
	pr_params_set(&pair->destination.params, "max-postcopy-bandwidth", 0, NULL);
	pair_wait(pair, PR_STATE_COMPLETED);
	return touch_latency(&result);
}

static void measure(const Bench *bench, const char *scheme, guint mbit, Figures *figures)
{
	set_link(mbit);
	RawLatency quiet = measure_faults(bench, scheme, mbit, 1);
	RawLatency busy = measure_faults(bench, scheme, mbit, 0);

	if (quiet.n == 0 || busy.n == 0)
		g_error("%s at %u Mbit/s: no faults", scheme, mbit);
	series_add(&figures->quiet_p50, quiet.p50_us);
	series_add(&figures->quiet_p99, quiet.p99_us);
	series_add(&figures->busy_p50, busy.p50_us);
	series_add(&figures->busy_p99, busy.p99_us);
	series_add(&figures->ahead, busy.p50_us - quiet.p50_us);
	figures->n_faults += busy.n;
	measure_pull(bench, scheme, mbit, figures);
}

static void report(const Bench *bench, const char *scheme, guint mbit, const Figures *f)
{
	double ahead = series_median(&f->ahead), rate = series_ratio(&f->pull, &f->raw);
	g_autofree char *name = g_strdup_printf("%s-%u", scheme, mbit);

	bench_say(bench, "  %-4s %6u %9.1f %9.1f %9.1f %9.1f %10.0f %9.1f %8.1f %6.2f %7u  %s%s\n",
		  scheme, mbit, series_median(&f->quiet_p50), series_median(&f->quiet_p99),
		  series_median(&f->busy_p50), series_median(&f->busy_p99), ahead,
		  ahead * mbit / 8 / 1024, series_median(&f->pull) / 1e6, rate, f->n_faults,
		  ahead <= MOST_US ? "" : "WAITS ", rate >= LEAST_RATE ? "" : "SLOW");
	bench_json_object(bench, name);
	bench_json_number(bench, "fault_p50_us", series_median(&f->quiet_p50));
	bench_json_number(bench, "fault_p99_us", series_median(&f->quiet_p99));
	bench_json_number(bench, "fault_p50_beside_pull_us", series_median(&f->busy_p50));
	bench_json_number(bench, "fault_p99_beside_pull_us", series_median(&f->busy_p99));
	bench_json_number(bench, "wire_time_ahead_us", ahead);
	bench_json_number(bench, "pull_bytes_per_s", series_median(&f->pull));
	bench_json_number(bench, "pull_to_raw", rate);
	bench_json_end_object(bench);
}

int main(int argc, char **argv)
{
	static const char *const schemes[] = {"ofi", "tcp"};
	static Figures figures[G_N_ELEMENTS(schemes)][N_RATES];
	Bench bench;

	bench_begin(&bench, "bench-wire", "- faults during the bulk pull on a full link", options,
		    &argc, &argv);
	make_namespace(&bench);
	for (int round = 0; round < bench.rounds; round++)
		for (guint s = 0; s < G_N_ELEMENTS(schemes); s++)
			for (guint i = 0; i < N_RATES; i++)
				measure(&bench, schemes[s], rates[i], &figures[s][i]);
	bench_say(&bench,
		  "\nmedians of %d, us; 'ahead': extra latency of the median fault, also as KiB "
		  "on this link; pull in MB/s, and divided by raw reads; queue: %s\n",
		  bench.rounds, qdisc);
	bench_say(&bench, "  %-4s %6s %9s %9s %9s %9s %10s %9s %8s %6s %7s\n", "", "Mbit/s", "p50",
		  "p99", "p50 busy", "p99 busy", "ahead", "KiB", "pull", "/raw", "n");
	for (guint s = 0; s < G_N_ELEMENTS(schemes); s++)
		for (guint i = 0; i < N_RATES; i++)
			report(&bench, schemes[s], rates[i], &figures[s][i]);
	bench_end(&bench);
	return 0;
}
