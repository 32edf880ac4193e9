/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The effect of each knob by itself: the rate of the bulk pull, and the latency of faults during
 * it. The benchmark tries some values of one parameter or capability, with all others at their
 * defaults. Each round measures all values of a knob, its default among them. A ratio compares a
 * value with the default in the same round.
 */
#include <math.h>
#include <string.h>

#include "tests/bench/bench.h"
#include "tests/bench/touch.h"
#include "tests/rigs/pair.h"

#define MIB	   (1024ull * 1024)
#define MAX_VALUES 12
#define N_THREADS  2   /* threads that touch pages */
#define REST_US	   200 /* pause after each touch, as in a guest that also computes */

typedef struct Knob {
	const char *name;   /* a parameter or a capability; set on both sides */
	const char *values; /* as an operator types them; the default is added if it is missing */
} Knob;

static const Knob knobs[] = {
	{"bulk-window", "1 2 4 8 16 32"},
	{"bulk-read-size", "16K 32K 64K 128K 256K 512K 1M"},
	{"fault-spin", "0 20 50 200"},
	{"fault-readahead", "0 8 32"},
	{"zero-pages", "off on"},
	{"fault-threads", "1 2 4"},
	{"verify", "off on"},
};

static int size_mib = 512;
static char **others, **only;

static const GOptionEntry options[] = {
	{"size", 's', 0, G_OPTION_ARG_INT, &size_mib, "guest RAM (64 to 8192; default 512)", "MIB"},
	{"only", 'o', 0, G_OPTION_ARG_STRING_ARRAY, &only,
	 "measure only this knob (may be repeated)", "NAME"},
	{"knob", 'k', 0, G_OPTION_ARG_STRING_ARRAY, &others,
	 "measure this knob, not the built-in ones (may be repeated)", "NAME=VALUE,VALUE…"},
	{NULL},
};

/* The figures of one value over all rounds. */
typedef struct Figures {
	Series rate;	  /* bytes a second */
	Series mean, p99; /* us */
	guint n_faults;
} Figures;

typedef struct Sweep {
	char *name;
	char *values[MAX_VALUES];
	guint n_values;
	guint def; /* index of the default */
	Figures figures[MAX_VALUES];
} Sweep;

/* ---- one measurement ---- */

/* Stops when the pull ends: later faults would not compete with bulk READs. */
static void touch_while_pulled(Pair *pair, Touch *touch, TouchResult *ret)
{
	side_wait(&pair->destination, PR_STATE_POSTCOPY_ACTIVE);
	touch_go(touch);
	side_wait(&pair->destination, PR_STATE_COMPLETED);
	touch_finish(touch, /* now= */ TRUE, ret);
}

static double pull_rate(Pair *pair)
{
	g_auto(PrMigrationInfo) info = {0};
	gint64 from = side_reported_at(&pair->destination, PR_STATE_DEVICE);
	gint64 to = side_reported_at(&pair->destination, PR_STATE_COMPLETED);

	pr_migration_query(pair->destination.engine, &info);
	return (double)info.transferred * G_USEC_PER_SEC / (double)(to - from);
}

static void measure(const Bench *bench, const char *scheme, const char *name, const char *value,
		    Figures *figures)
{
	PairConfig config = {
		.scheme = scheme, .size = size_mib * MIB, .n_blocks = 1, .paused = TRUE};
	g_autoptr(Pair) pair = pair_new(&config);
	g_autoptr(GError) error = NULL;
	g_auto(TouchResult) result = {0};
	TouchConfig touch = {.map = testguest_block_map(pair->destination.guest, 0),
			     .n_pages = config.size / 4096,
			     .n_threads = N_THREADS,
			     .rest_us = REST_US};

	bench_apply_settings(bench, &pair->source.params);
	bench_apply_settings(bench, &pair->destination.params);
	if (!bench_set(&pair->source.params, name, value, &error) ||
	    !bench_set(&pair->destination.params, name, value, &error))
		g_error("%s", error->message);
	Touch *running = touch_new(&touch);
	pair_migrate(pair);
	touch_while_pulled(pair, running, &result);
	side_wait(&pair->source, PR_STATE_COMPLETED);
	RawLatency latency = touch_latency(&result);
	series_add(&figures->rate, pull_rate(pair));
	series_add(&figures->mean, latency.n > 0 ? latency.mean_us : NAN);
	series_add(&figures->p99, latency.n > 0 ? latency.p99_us : NAN);
	figures->n_faults += latency.n;
}

/* ---- the table of knobs ---- */

/* Returns the text that an operator types, or NULL if there is no such knob. */
static char *default_of(const char *name)
{
	for (guint i = 0; i < PR_N_CAPABILITIES; i++)
		if (strcmp(pr_capability_info(i)->name, name) == 0)
			return g_strdup(pr_capability_info(i)->def ? "on" : "off");
	for (guint i = 0; i < PR_N_PARAMS; i++) {
		uint64_t def = pr_param_info(i)->def;

		if (strcmp(pr_param_info(i)->name, name) != 0)
			continue;
		if (def >= MIB && def % MIB == 0)
			return g_strdup_printf("%" G_GUINT64_FORMAT "M", def / (uint64_t)MIB);
		if (def >= 1024 && def % 1024 == 0)
			return g_strdup_printf("%" G_GUINT64_FORMAT "K", def / 1024);
		return g_strdup_printf("%" G_GUINT64_FORMAT, def);
	}
	return NULL;
}

static void add_value(const Bench *bench, Sweep *sweep, const char *value)
{
	PrParams scratch;
	g_autoptr(GError) error = NULL;

	pr_params_init(&scratch);
	if (sweep->n_values == MAX_VALUES)
		bench_usage_error(bench, "knob %s: more than %d values", sweep->name, MAX_VALUES);
	if (!bench_set(&scratch, sweep->name, value, &error))
		bench_usage_error(bench, "%s", error->message);
	sweep->values[sweep->n_values++] = g_strdup(value);
}

static void sweep_init(const Bench *bench, Sweep *sweep, const char *name, const char *values)
{
	g_auto(GStrv) list = g_strsplit_set(values, " ,", -1);
	g_autofree char *def = default_of(name);

	*sweep = (Sweep){.name = g_strdup(name), .def = G_MAXUINT};
	if (!def)
		bench_usage_error(bench, "knob '%s': there is no such parameter or capability",
				  name);
	for (guint i = 0; list[i]; i++) {
		if (strcmp(list[i], def) == 0)
			sweep->def = i;
		add_value(bench, sweep, list[i]);
	}
	if (sweep->def == G_MAXUINT) {
		sweep->def = sweep->n_values;
		add_value(bench, sweep, def);
	}
}

static void sweep_clear(gpointer data)
{
	Sweep *sweep = data;

	for (guint i = 0; i < sweep->n_values; i++)
		g_free(sweep->values[i]);
	g_free(sweep->name);
}

static void add_sweep(const Bench *bench, GArray *sweeps, const char *name, const char *values)
{
	g_array_set_size(sweeps, sweeps->len + 1);
	sweep_init(bench, &g_array_index(sweeps, Sweep, sweeps->len - 1), name, values);
}

static GArray *choose_sweeps(const Bench *bench)
{
	GArray *sweeps = g_array_new(FALSE, TRUE, sizeof(Sweep));

	g_array_set_clear_func(sweeps, sweep_clear);
	for (guint i = 0; others && others[i]; i++) {
		g_auto(GStrv) parts = g_strsplit(others[i], "=", 2);

		if (!parts[0] || !parts[1])
			bench_usage_error(bench, "--knob %s: not NAME=VALUE,VALUE…", others[i]);
		add_sweep(bench, sweeps, parts[0], parts[1]);
	}
	for (guint i = 0; !others && i < G_N_ELEMENTS(knobs); i++)
		if (!only || g_strv_contains((const char *const *)only, knobs[i].name))
			add_sweep(bench, sweeps, knobs[i].name, knobs[i].values);
	if (sweeps->len == 0)
		bench_usage_error(bench, "--only %s: no such knob here; see --knob",
				  only ? only[0] : "");
	return sweeps;
}

/* ---- the report ---- */

static void report_value(const Bench *bench, const Sweep *sweep, guint i)
{
	const Figures *f = &sweep->figures[i], *def = &sweep->figures[sweep->def];
	double rate = series_ratio(&f->rate, &def->rate);
	double mean = series_ratio(&f->mean, &def->mean);
	double p99 = series_ratio(&f->p99, &def->p99);

	bench_say(bench, "  %8s%c %7.0f MB/s %6.2f %8.1f us %6.2f %9.1f us %6.2f %8u\n",
		  sweep->values[i], i == sweep->def ? '*' : ' ', series_median(&f->rate) / 1e6,
		  rate, series_median(&f->mean), mean, series_median(&f->p99), p99, f->n_faults);
	bench_json_object(bench, sweep->values[i]);
	bench_json_number(bench, "bytes_per_s", series_median(&f->rate));
	bench_json_number(bench, "fault_mean_us", series_median(&f->mean));
	bench_json_number(bench, "fault_p99_us", series_median(&f->p99));
	bench_json_number(bench, "rate_ratio", rate);
	bench_json_number(bench, "mean_ratio", mean);
	bench_json_number(bench, "p99_ratio", p99);
	bench_json_number(bench, "n_faults", f->n_faults);
	bench_json_end_object(bench);
}

static void report(const Bench *bench, const char *scheme, const Sweep *sweep)
{
	bench_say(bench, "\n%s over %s: (*: the default; n: faults)\n", sweep->name, scheme);
	bench_say(bench, "  %8s  %12s %6s %11s %6s %12s %6s %8s\n", "", "bulk pull", "ratio",
		  "fault mean", "ratio", "fault p99", "ratio", "n");
	bench_json_object(bench, sweep->name);
	bench_json_text(bench, "default", sweep->values[sweep->def]);
	bench_json_object(bench, "values");
	for (guint i = 0; i < sweep->n_values; i++)
		report_value(bench, sweep, i);
	bench_json_end_object(bench);
	bench_json_end_object(bench);
}

static void run(const Bench *bench, const char *scheme)
{
	g_autoptr(GArray) sweeps = choose_sweeps(bench);

	bench_json_object(bench, scheme);
	for (guint s = 0; s < sweeps->len; s++) {
		Sweep *sweep = &g_array_index(sweeps, Sweep, s);

		for (int round = 0; round < bench->rounds; round++)
			for (guint i = 0; i < sweep->n_values; i++)
				measure(bench, scheme, sweep->name, sweep->values[i],
					&sweep->figures[i]);
		report(bench, scheme, sweep);
	}
	bench_json_end_object(bench);
}

int main(int argc, char **argv)
{
	static const char *const schemes[] = {"ofi", "tcp"};
	Bench bench;

	bench_begin(&bench, "bench-knobs", "- the effect of each knob by itself", options, &argc,
		    &argv);
	if (size_mib < 64 || size_mib > 8192)
		bench_usage_error(&bench, "--size %d: 64 to 8192", size_mib);
	if (bench.quick)
		size_mib = 128;
	bench_say(&bench,
		  "a guest of %d MiB; %d threads touch random pages, and pause for %d us after "
		  "each; medians of %d\n",
		  size_mib, N_THREADS, REST_US, bench.rounds);
	bench_json_number(&bench, "size_mib", size_mib);
	for (guint i = 0; i < G_N_ELEMENTS(schemes); i++)
		run(&bench, schemes[i]);
	bench_end(&bench);
	g_clear_pointer(&others, g_strfreev);
	g_clear_pointer(&only, g_strfreev);
	return 0;
}
