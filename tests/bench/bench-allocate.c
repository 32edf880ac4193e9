/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The cost of allocation by another process: the allocator allocates the guest's pages before the
 * engine reads them (migration/postcopy/allocate.c). The benchmark measures the bulk pull, and the
 * faults of a guest that touches pages in an unpredictable order while the bulk pull is as good as
 * off. Each round measures both without the allocator, as where engine and guest share a memory
 * cgroup, and with it.
 */
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "guest/allocator.h"
#include "tests/bench/bench.h"
#include "tests/bench/raw-memory.h"
#include "tests/rigs/pair.h"

#define MIB (1024ull * 1024)

typedef enum Way { WITHOUT_ALLOCATOR, WITH_ALLOCATOR, N_WAYS } Way;

static const char *const way_names[] = {"without", "with"};

static int size_mib = 512, faults = 4000;

static const GOptionEntry options[] = {
	{"size", 's', 0, G_OPTION_ARG_INT, &size_mib, "guest RAM (64 to 8192)", "MIB"},
	{"faults", 'f', 0, G_OPTION_ARG_INT, &faults, "faults a round (100 to 10000)", "N"},
	{NULL},
};

typedef struct Figures {
	Series pull;	       /* bytes a second */
	Series total;	       /* ms, from the guest's stop to the last page */
	Series mean, p50, p99; /* us */
} Figures;

/* The process of the allocator. Only one exists at a time. */
static struct {
	pid_t pid;
	int socket;
	PrGuestOps ops;
} allocator;

static int allocator_socket(PrGuest *guest, GError **error)
{
	return allocator.socket;
}

/* The allocator is a child process, like that of the attach helper. */
static void begin_allocator(Pair *pair, Way way)
{
	int sockets[2];

	if (way == WITHOUT_ALLOCATOR)
		return;
	g_assert(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sockets) == 0);
	allocator.pid = fork();
	if (allocator.pid == 0) {
		close(sockets[0]);
		pr_allocator_serve(sockets[1]);
		_exit(0);
	}
	close(sockets[1]);
	allocator.socket = sockets[0];
	allocator.ops = *pair->destination.adapter->ops;
	allocator.ops.allocator = allocator_socket;
	pair->destination.adapter->ops = &allocator.ops;
}

/* Called after pair_free(): the engine uses the socket until then. */
static void end_allocator(Way way)
{
	if (way == WITHOUT_ALLOCATOR)
		return;
	close(allocator.socket);
	/* The allocator ends when its socket is closed. */
	waitpid(allocator.pid, NULL, 0);
}

static Pair *begin(const Bench *bench, const PairConfig *config, Way way)
{
	Pair *pair = pair_new(config);

	bench_apply_settings(bench, &pair->source.params);
	bench_apply_settings(bench, &pair->destination.params);
	begin_allocator(pair, way);
	return pair;
}

static void measure_pull(const Bench *bench, const char *scheme, Way way, Figures *figures)
{
	PairConfig config = {.scheme = scheme, .size = (uint64_t)size_mib * MIB, .paused = TRUE};
	g_auto(PrMigrationInfo) info = {0};
	Pair *pair = begin(bench, &config, way);

	pair_migrate(pair);
	pair_wait(pair, PR_STATE_COMPLETED);
	pr_migration_query(pair->destination.engine, &info);
	gint64 from = side_reported_at(&pair->destination, PR_STATE_DEVICE);
	gint64 to = side_reported_at(&pair->destination, PR_STATE_COMPLETED);
	series_add(&figures->pull, (double)info.transferred * G_USEC_PER_SEC / (double)(to - from));
	series_add(&figures->total, (double)(to - from) / 1000);
	pair_free(pair);
	end_allocator(way);
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

static void measure_faults(const Bench *bench, const char *scheme, Way way, Figures *figures)
{
	PairConfig config = {
		.scheme = scheme, .size = 2ull * faults * 4096 * 2, .paused = TRUE, .bandwidth = 1};
	g_autofree uint64_t *samples = g_new0(uint64_t, faults);
	Pair *pair = begin(bench, &config, way);

	pair_migrate(pair);
	pair_wait(pair, PR_STATE_POSTCOPY_ACTIVE);
	touch_pages(pair->destination.guest, samples);
	RawLatency seen = raw_latency(samples, (guint)faults);
	series_add(&figures->mean, seen.mean_us);
	series_add(&figures->p50, seen.p50_us);
	series_add(&figures->p99, seen.p99_us);
	pr_params_set(&pair->destination.params, "max-postcopy-bandwidth", 0, NULL);
	pair_wait(pair, PR_STATE_COMPLETED);
	pair_free(pair);
	end_allocator(way);
}

static void print(const Bench *bench, const char *scheme, Figures *figures)
{
	const struct {
		const char *name, *unit;
		gsize offset;
		double scale;
	} rows[] = {
		{"bulk pull", "MB/s", G_STRUCT_OFFSET(Figures, pull), 1e-6},
		{"total", "ms", G_STRUCT_OFFSET(Figures, total), 1},
		{"fault, mean", "us", G_STRUCT_OFFSET(Figures, mean), 1},
		{"fault, p50", "us", G_STRUCT_OFFSET(Figures, p50), 1},
		{"fault, p99", "us", G_STRUCT_OFFSET(Figures, p99), 1},
	};

	bench_say(bench,
		  "\n%s: medians of %d rounds without the allocator, and the ratio with it\n",
		  scheme, bench->rounds);
	bench_json_object(bench, scheme);
	for (guint i = 0; i < G_N_ELEMENTS(rows); i++) {
		const Series *without =
			&G_STRUCT_MEMBER(Series, &figures[WITHOUT_ALLOCATOR], rows[i].offset);

		bench_say(bench, "  %-12s %10.1f %-4s", rows[i].name,
			  series_median(without) * rows[i].scale, rows[i].unit);
		bench_json_object(bench, rows[i].name);
		bench_json_number(bench, way_names[WITHOUT_ALLOCATOR],
				  series_median(without) * rows[i].scale);
		for (guint way = WITH_ALLOCATOR; way < N_WAYS; way++) {
			const Series *series =
				&G_STRUCT_MEMBER(Series, &figures[way], rows[i].offset);
			bench_say(bench, "   %s: %.2f x", way_names[way],
				  series_ratio(series, without));
			bench_json_number(bench, way_names[way], series_ratio(series, without));
		}
		bench_json_end_object(bench);
		bench_say(bench, "\n");
	}
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
	static Figures figures[G_N_ELEMENTS(schemes)][N_WAYS];
	Bench bench;

	bench_begin(&bench, "bench-allocate", "- the cost of allocation by another process",
		    options, &argc, &argv);
	check_options(&bench);
	for (int round = 0; round < bench.rounds; round++)
		for (guint i = 0; i < G_N_ELEMENTS(schemes); i++)
			for (Way way = WITHOUT_ALLOCATOR; way < N_WAYS; way++) {
				measure_pull(&bench, schemes[i], way, &figures[i][way]);
				measure_faults(&bench, schemes[i], way, &figures[i][way]);
			}
	for (guint i = 0; i < G_N_ELEMENTS(schemes); i++)
		print(&bench, schemes[i], figures[i]);
	bench_end(&bench);
	return 0;
}
