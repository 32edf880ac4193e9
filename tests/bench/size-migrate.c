/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Whole migrations of guests of different sizes show the costs that grow with the size, and their
 * part of the downtime. The guests of both sides record the times at which the engines call them.
 *
 * The test guest has 1 MiB of device state for each GiB of RAM, and the column "state" shows it. A
 * VMM's device state does not grow with its RAM.
 */
#include <math.h>
#include <string.h>

#include "tests/bench/size.h"
#include "tests/rigs/pair.h"

#define MIB	    (1024ull * 1024)
#define MARGIN	    (1024 * MIB) /* memory that stays free */
#define LARGE_MIB   4096	 /* guests of this size and more have one round */
#define MAX_SIZES   8
#define PACE_US	    1000 /* the guest's thread reads and writes 16 pages each time */
#define STATE_SHARE 1024 /* bytes of RAM for each byte of the test guest's device state */

static const guint sizes_mib[] = {256, 1024, 2048, 4096, 8192};

/* A guest's operations, and the times of their last calls in us. */
typedef struct Watch {
	PrGuestOps ops;
	const PrGuestOps *real;
	gint64 stopped, save_began, saved;				 /* source */
	gint64 uffd_enable_began, uffd_enabled, load_began, loaded, ran; /* destination */
} Watch;

static Watch *watch_of(PrGuest *guest)
{
	return (Watch *)(gpointer)guest->ops;
}

static gboolean watched_stop(PrGuest *guest, gboolean *ret_was_running, GError **error)
{
	gboolean done = watch_of(guest)->real->stop(guest, ret_was_running, error);

	watch_of(guest)->stopped = g_get_monotonic_time();
	return done;
}

static gboolean watched_save(PrGuest *guest, GCancellable *cancel, PrGuestSink sink, void *opaque,
			     GError **error)
{
	watch_of(guest)->save_began = g_get_monotonic_time();
	gboolean done = watch_of(guest)->real->save(guest, cancel, sink, opaque, error);
	watch_of(guest)->saved = g_get_monotonic_time();
	return done;
}

static int watched_uffd_enable(PrGuest *guest, GError **error)
{
	watch_of(guest)->uffd_enable_began = g_get_monotonic_time();
	int fd = watch_of(guest)->real->uffd_enable(guest, error);
	watch_of(guest)->uffd_enabled = g_get_monotonic_time();
	return fd;
}

static gboolean watched_load_begin(PrGuest *guest, GError **error)
{
	watch_of(guest)->load_began = g_get_monotonic_time();
	return watch_of(guest)->real->load_begin(guest, error);
}

static gboolean watched_load_end(PrGuest *guest, GError **error)
{
	gboolean done = watch_of(guest)->real->load_end(guest, error);

	watch_of(guest)->loaded = g_get_monotonic_time();
	return done;
}

static gboolean watched_run(PrGuest *guest, GError **error)
{
	gboolean done = watch_of(guest)->real->run(guest, error);

	watch_of(guest)->ran = g_get_monotonic_time();
	return done;
}

/* Called before the engine calls the guest. */
static void watch_begin(Watch *watch, PrGuest *guest)
{
	*watch = (Watch){.ops = *guest->ops, .real = guest->ops};
	watch->ops.stop = watched_stop;
	watch->ops.save = watched_save;
	watch->ops.uffd_enable = watched_uffd_enable;
	watch->ops.load_begin = watched_load_begin;
	watch->ops.load_end = watched_load_end;
	watch->ops.run = watched_run;
	guest->ops = &watch->ops;
}

static const struct {
	const char *name, *unit;
	gboolean per_gib;
} columns[] = {
	{"total", "ms", TRUE},	    {"set-up", "ms", TRUE}, {"downtime", "ms", TRUE},
	{"stop", "ms", FALSE},	    {"holes", "ms", TRUE},  {"state", "ms", TRUE},
	{"fault mode", "ms", TRUE}, {"run", "ms", FALSE},   {"bulk pull", "MB/s", FALSE},
	{"memory", "MiB", TRUE},
};
enum { TOTAL, SETUP, DOWNTIME, STOP, HOLES, STATE, FAULT_MODE, RUN, PULL, MEMORY, N_COLUMNS };

typedef struct Figures {
	guint mib;
	Series of[N_COLUMNS];
} Figures;

/* Returns the private memory of this process in bytes; memfds do not count. */
static double anonymous_memory(void)
{
	g_autofree char *text = NULL;
	const char *line;

	if (!g_file_get_contents("/proc/self/smaps_rollup", &text, NULL, NULL))
		return NAN;
	line = strstr(text, "\nAnonymous:");
	return line ? g_ascii_strtod(line + strlen("\nAnonymous:"), NULL) * 1024 : NAN;
}

static double ms_between(gint64 from, gint64 to)
{
	return (double)(to - from) / 1000;
}

static void add_times(Figures *f, Pair *pair, const Watch *here, const Watch *there)
{
	Side *source = &pair->source, *destination = &pair->destination;
	gint64 began = side_reported_at(source, PR_STATE_SETUP);
	gint64 device = side_reported_at(source, PR_STATE_DEVICE);
	gint64 handed_over = side_reported_at(source, PR_STATE_POSTCOPY_ACTIVE);
	gint64 completed = side_reported_at(destination, PR_STATE_COMPLETED);
	gint64 pull_began = side_reported_at(destination, PR_STATE_DEVICE);
	g_auto(PrMigrationInfo) info = {0};

	pr_migration_query(destination->engine, &info);
	g_assert(here->stopped && here->save_began && there->uffd_enabled && there->ran);
	series_add(&f->of[TOTAL], ms_between(began, completed));
	series_add(&f->of[SETUP], ms_between(began, device));
	series_add(&f->of[DOWNTIME], ms_between(device, there->ran));
	series_add(&f->of[STOP], ms_between(device, here->stopped));
	series_add(&f->of[HOLES], ms_between(here->stopped, here->save_began));
	series_add(&f->of[STATE], ms_between(here->save_began, handed_over));
	series_add(&f->of[FAULT_MODE], ms_between(there->uffd_enable_began, there->uffd_enabled));
	series_add(&f->of[RUN], ms_between(handed_over, there->ran));
	series_add(&f->of[PULL], (double)info.transferred / (double)(completed - pull_began));
}

static void migrate(const Bench *bench, const char *scheme, Figures *f)
{
	uint64_t size = f->mib * MIB;
	PairConfig config = {
		.scheme = scheme, .size = size, .n_blocks = 1, .n_threads = 1, .pace_us = PACE_US};
	Watch here, there;
	g_autoptr(Pair) pair = pair_new(&config);

	bench_apply_settings(bench, &pair->source.params);
	bench_apply_settings(bench, &pair->destination.params);
	watch_begin(&here, pair->source.adapter);
	watch_begin(&there, pair->destination.adapter);
	double before = anonymous_memory();
	pair_migrate(pair);
	pair_wait(pair, PR_STATE_POSTCOPY_ACTIVE);
	double active = anonymous_memory();
	pair_wait(pair, PR_STATE_COMPLETED);
	double during = MAX(active, anonymous_memory());
	add_times(f, pair, &here, &there);
	/* The device state of the incoming guest is memory of the test guest. */
	series_add(&f->of[MEMORY], (during - before - (double)size / STATE_SHARE) / (double)MIB);
	if (testguest_corrupt(pair->destination.guest) > 0)
		g_error("%s, %u MiB: the guest found corrupt pages", scheme, f->mib);
	pair->source.adapter->ops = here.real;
	pair->destination.adapter->ops = there.real;
}

static gboolean enough_memory(const Bench *bench, guint mib)
{
	uint64_t needed = mib * MIB * 2 + mib * MIB * 2 / STATE_SHARE + MARGIN;
	uint64_t available = bench_memory_available();

	if (available < needed)
		bench_say(bench,
			  "  %7u skipped: both guests need %" G_GUINT64_FORMAT
			  " MiB, only %" G_GUINT64_FORMAT " MiB are available\n",
			  mib, (guint64)(needed / MIB), (guint64)(available / MIB));
	return available >= needed;
}

static void report_head(const Bench *bench, const char *scheme)
{
	bench_say(bench,
		  "\nWhole migrations over %s, medians of %d (%d MiB and more: one round)\n  %7s",
		  scheme, bench->rounds, LARGE_MIB, "MiB");
	for (guint c = 0; c < N_COLUMNS; c++)
		bench_say(bench, " %11s", columns[c].name);
	bench_say(bench, "\n  %7s", "");
	for (guint c = 0; c < N_COLUMNS; c++)
		bench_say(bench, " %11s", columns[c].unit);
	bench_say(bench, "\n");
}

static void report(const Bench *bench, const Figures *f)
{
	bench_say(bench, "  %7u", f->mib);
	bench_json_object(bench, NULL);
	bench_json_number(bench, "mib", f->mib);
	bench_json_number(bench, "n", f->of[0].n);
	for (guint c = 0; c < N_COLUMNS; c++) {
		bench_say(bench, " %11.2f", series_median(&f->of[c]));
		bench_json_number(bench, columns[c].name, series_median(&f->of[c]));
	}
	bench_say(bench, "\n");
	bench_json_end_object(bench);
}

/* Reports the cost of each GiB, from the smallest guest and the largest. */
static void report_slope(const Bench *bench, const Figures *small, const Figures *large)
{
	double gib = (large->mib - small->mib) / 1024.0;

	if (gib <= 0)
		return;
	bench_say(bench, "  per GiB");
	bench_json_object(bench, "per_gib");
	for (guint c = 0; c < N_COLUMNS; c++) {
		double more = series_median(&large->of[c]) - series_median(&small->of[c]);

		if (columns[c].per_gib)
			bench_say(bench, " %11.3f", more / gib);
		else
			bench_say(bench, " %11s", "");
		bench_json_number(bench, columns[c].name, columns[c].per_gib ? more / gib : NAN);
	}
	bench_say(bench, "\n");
	bench_json_end_object(bench);
}

static void measure(const Bench *bench, const char *scheme, guint max_mib)
{
	Figures figures[MAX_SIZES] = {0};
	guint n = 0;

	report_head(bench, scheme);
	bench_json_object(bench, scheme);
	bench_json_array(bench, "sizes");
	for (guint i = 0; i < G_N_ELEMENTS(sizes_mib) && sizes_mib[i] <= max_mib; i++) {
		int rounds = sizes_mib[i] >= LARGE_MIB ? 1 : bench->rounds;

		if (!enough_memory(bench, sizes_mib[i]))
			continue;
		figures[n].mib = sizes_mib[i];
		for (int round = 0; round < rounds; round++)
			migrate(bench, scheme, &figures[n]);
		report(bench, &figures[n++]);
	}
	bench_json_end_array(bench);
	if (n > 0)
		report_slope(bench, &figures[0], &figures[n - 1]);
	bench_json_end_object(bench);
}

void size_migrations(const Bench *bench, guint max_mib)
{
	G_STATIC_ASSERT(G_N_ELEMENTS(columns) == N_COLUMNS);
	G_STATIC_ASSERT(G_N_ELEMENTS(sizes_mib) <= MAX_SIZES);
	bench_json_object(bench, "migrations");
	measure(bench, "ofi", max_mib);
	measure(bench, "tcp", max_mib);
	bench_json_end_object(bench);
	bench_say(
		bench,
		"  downtime = stop + holes + state + run. holes: the source's scan for holes, and\n"
		"  grants; state: the device state, 1 MiB for each GiB of this guest (a VMM's\n"
		"  does not grow with its RAM), and the destination's fault mode, for which the\n"
		"  source waits; memory: private memory of both engines together\n");
}
