/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "tests/bench/bench.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>

#include "monitor/sandbox.h"

void series_add(Series *series, double value)
{
	g_assert(series->n < BENCH_MAX_ROUNDS);
	series->value[series->n++] = value;
}

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return x < y ? -1 : x > y;
}

double series_median(const Series *series)
{
	Series sorted = {.n = 0};

	for (guint i = 0; i < series->n; i++)
		if (!isnan(series->value[i]))
			series_add(&sorted, series->value[i]);
	if (sorted.n == 0)
		return NAN;
	qsort(sorted.value, sorted.n, sizeof(double), by_value);
	return sorted.n % 2 ? sorted.value[sorted.n / 2]
			    : (sorted.value[sorted.n / 2 - 1] + sorted.value[sorted.n / 2]) / 2;
}

double series_ratio(const Series *series, const Series *reference)
{
	Series ratios = {.n = MIN(series->n, reference->n)};

	for (guint i = 0; i < ratios.n; i++)
		ratios.value[i] = series->value[i] / reference->value[i];
	return series_median(&ratios);
}

void bench_usage_error(const Bench *bench, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	g_autofree char *text = g_strdup_vprintf(format, args);
	va_end(args);
	fprintf(stderr, "%s: %s\n", bench->name, text);
	exit(2);
}

static gboolean to_stdout(const Bench *bench)
{
	return g_strcmp0(bench->output, "-") == 0;
}

void bench_say(const Bench *bench, const char *format, ...)
{
	va_list args;

	if (to_stdout(bench))
		return;
	va_start(args, format);
	vprintf(format, args);
	va_end(args);
	fflush(stdout);
}

static void no_log(const char *domain, GLogLevelFlags level, const char *message, gpointer opaque)
{
}

static void parse(Bench *bench, const char *summary, const GOptionEntry *more, int *argc,
		  char ***argv)
{
	const GOptionEntry common[] = {
		{"rounds", 'r', 0, G_OPTION_ARG_INT, &bench->rounds,
		 "rounds of each measurement (1 to 25; default 3)", "N"},
		{"quick", 'q', 0, G_OPTION_ARG_NONE, &bench->quick,
		 "only check that it works, in seconds; the figures mean nothing", NULL},
		{"set", 'S', 0, G_OPTION_ARG_STRING_ARRAY, &bench->settings,
		 "set a parameter or a capability of both engines (may be repeated)", "NAME=VALUE"},
		{"sandbox", 0, 0, G_OPTION_ARG_NONE, &bench->sandbox,
		 "run with the filter of system calls that postroad has", NULL},
		{"json", 'j', 0, G_OPTION_ARG_FILENAME, &bench->output,
		 "also write the figures to this file; -: to stdout, without a table", "FILE"},
		{NULL},
	};
	g_autoptr(GOptionContext) context = g_option_context_new(summary);
	g_autoptr(GError) error = NULL;

	g_option_context_add_main_entries(context, common, NULL);
	if (more)
		g_option_context_add_main_entries(context, more, NULL);
	if (!g_option_context_parse(context, argc, argv, &error))
		bench_usage_error(bench, "%s", error->message);
	if (bench->rounds < 1 || bench->rounds > BENCH_MAX_ROUNDS)
		bench_usage_error(bench, "--rounds %d: 1 to %d", bench->rounds, BENCH_MAX_ROUNDS);
	if (bench->quick)
		bench->rounds = 1;
}

/* The threads that the program starts later inherit the filter. */
static void enter_sandbox(const Bench *bench)
{
	g_autoptr(GError) error = NULL;

	if (bench->sandbox && !pr_sandbox_enter(&(PrSandbox){.filter = TRUE}, &error))
		bench_usage_error(bench, "%s", error->message);
}

gboolean bench_set(PrParams *params, const char *name, const char *value, GError **error)
{
	for (guint i = 0; i < PR_N_CAPABILITIES; i++)
		if (strcmp(pr_capability_info(i)->name, name) == 0)
			return pr_params_set_capability(params, name, strcmp(value, "on") == 0,
							error);
	return pr_params_set_text(params, name, value, error);
}

void bench_apply_settings(const Bench *bench, PrParams *params)
{
	for (guint i = 0; bench->settings && bench->settings[i]; i++) {
		g_auto(GStrv) parts = g_strsplit(bench->settings[i], "=", 2);
		g_autoptr(GError) error = NULL;

		if (!parts[0] || !parts[1])
			bench_usage_error(bench, "--set %s: not NAME=VALUE", bench->settings[i]);
		if (!bench_set(params, parts[0], parts[1], &error))
			bench_usage_error(bench, "--set: %s", error->message);
	}
}

/* Reports a wrong setting before the first measurement. */
static void check_settings(const Bench *bench)
{
	PrParams scratch;

	pr_params_init(&scratch);
	bench_apply_settings(bench, &scratch);
	for (guint i = 0; bench->settings && bench->settings[i]; i++)
		bench_say(bench, "set: %s\n", bench->settings[i]);
	bench_json_array(bench, "set");
	for (guint i = 0; bench->settings && bench->settings[i]; i++)
		json_builder_add_string_value(bench->json, bench->settings[i]);
	bench_json_end_array(bench);
}

static void describe_machine(const Bench *bench)
{
	struct utsname machine;
	double load = NAN;

	uname(&machine);
	if (getloadavg(&load, 1) != 1)
		load = NAN;
	bench_json_number(bench, "cpus", g_get_num_processors());
	bench_json_text(bench, "kernel", machine.release);
	bench_json_number(bench, "load", load);
	bench_say(bench, "%s: %d rounds%s; Linux %s, %u CPUs, load %.2f\n", bench->name,
		  bench->rounds, bench->quick ? " (quick: the figures mean nothing)" : "",
		  machine.release, g_get_num_processors(), load);
}

void bench_begin(Bench *bench, const char *name, const char *summary, const GOptionEntry *more,
		 int *argc, char ***argv)
{
	*bench = (Bench){.name = name, .rounds = 3, .began = g_get_monotonic_time()};
	parse(bench, summary, more, argc, argv);
	enter_sandbox(bench);
	g_log_set_handler(NULL, G_LOG_LEVEL_MESSAGE, no_log, NULL);
	bench->json = json_builder_new();
	json_builder_begin_object(bench->json);
	bench_json_text(bench, "benchmark", name);
	bench_json_number(bench, "rounds", bench->rounds);
	bench_json_number(bench, "quick", bench->quick);
	describe_machine(bench);
	check_settings(bench);
}

static void write_json(const Bench *bench)
{
	g_autoptr(JsonGenerator) generator = json_generator_new();
	g_autoptr(JsonNode) root = json_builder_get_root(bench->json);
	g_autoptr(GError) error = NULL;

	json_generator_set_root(generator, root);
	json_generator_set_pretty(generator, TRUE);
	if (to_stdout(bench)) {
		g_autofree char *text = json_generator_to_data(generator, NULL);
		printf("%s\n", text);
	} else if (!json_generator_to_file(generator, bench->output, &error)) {
		bench_usage_error(bench, "--json %s: %s", bench->output, error->message);
	}
}

void bench_end(Bench *bench)
{
	double seconds = (double)(g_get_monotonic_time() - bench->began) / G_USEC_PER_SEC;

	bench_json_number(bench, "seconds", seconds);
	json_builder_end_object(bench->json);
	if (bench->output)
		write_json(bench);
	bench_say(bench, "%s: %.0f s%s%s\n", bench->name, seconds,
		  bench->output ? "; figures: " : "", bench->output ? bench->output : "");
	g_clear_object(&bench->json);
	g_clear_pointer(&bench->output, g_free);
	g_clear_pointer(&bench->settings, g_strfreev);
}

/* JSON has no NAN; it becomes null. */
void bench_json_number(const Bench *bench, const char *name, double value)
{
	if (name)
		json_builder_set_member_name(bench->json, name);
	if (!isfinite(value))
		json_builder_add_null_value(bench->json);
	else if (value == floor(value) && fabs(value) < 1e15)
		json_builder_add_int_value(bench->json, (gint64)value);
	else
		json_builder_add_double_value(bench->json, value);
}

void bench_json_text(const Bench *bench, const char *name, const char *value)
{
	json_builder_set_member_name(bench->json, name);
	json_builder_add_string_value(bench->json, value);
}

void bench_json_object(const Bench *bench, const char *name)
{
	if (name)
		json_builder_set_member_name(bench->json, name);
	json_builder_begin_object(bench->json);
}

void bench_json_array(const Bench *bench, const char *name)
{
	if (name)
		json_builder_set_member_name(bench->json, name);
	json_builder_begin_array(bench->json);
}

void bench_json_end_object(const Bench *bench)
{
	json_builder_end_object(bench->json);
}

void bench_json_end_array(const Bench *bench)
{
	json_builder_end_array(bench->json);
}

uint64_t bench_memory_available(void)
{
	g_autofree char *text = NULL;

	if (!g_file_get_contents("/proc/meminfo", &text, NULL, NULL))
		return 0;
	const char *line = strstr(text, "MemAvailable:");
	return line ? g_ascii_strtoull(line + strlen("MemAvailable:"), NULL, 10) * 1024 : 0;
}
