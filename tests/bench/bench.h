/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Code that the benchmark programs share: options, medians, and figures as a table and as JSON. */
#pragma once

#include <glib.h>
#include <json-glib/json-glib.h>
#include <stdint.h>

#include "migration/core/params.h"
#include "tests/bench/raw.h"

#define BENCH_MAX_ROUNDS 25

/* The values of one figure, one from each round. */
typedef struct Series {
	double value[BENCH_MAX_ROUNDS];
	guint n;
} Series;

void series_add(Series *series, double value);
/* Ignores NANs. Returns NAN if there are no values. */
double series_median(const Series *series);
/* The median of the ratios value / reference of the single rounds. A machine's load changes between
 * rounds, and a round's ratio does not show it. */
double series_ratio(const Series *series, const Series *reference);

typedef struct Bench {
	const char *name;
	int rounds;
	gboolean quick;	   /* a check that the program works; the figures mean nothing */
	gboolean sandbox;  /* run with postroad's filter of system calls */
	char **settings;   /* NAME=VALUE for the engines; or NULL */
	char *output;	   /* file for the JSON; "-": stdout, without a table; NULL: no JSON */
	JsonBuilder *json; /* inside the outermost object */
	gint64 began;
} Bench;

/* Parses --rounds, --quick, --set, --sandbox, --json, and the program's own options. Other
 * arguments stay in argv. Exits when an option is wrong, or with the help. Hides the engines'
 * messages. */
void bench_begin(Bench *bench, const char *name, const char *summary, const GOptionEntry *more,
		 int *argc, char ***argv);
/* Writes the JSON, prints the duration, and frees the contents of the Bench. */
void bench_end(Bench *bench);

/* Sets a parameter or a capability (on, off) from the text that an operator types. */
gboolean bench_set(PrParams *params, const char *name, const char *value, GError **error);
/* Applies the settings of --set. */
void bench_apply_settings(const Bench *bench, PrParams *params);

/* Exits with status 2. */
G_NORETURN void bench_usage_error(const Bench *bench, const char *format, ...) G_GNUC_PRINTF(2, 3);
/* Prints text of the table, unless stdout has the JSON. */
void bench_say(const Bench *bench, const char *format, ...) G_GNUC_PRINTF(2, 3);

void bench_json_number(const Bench *bench, const char *name, double value);
void bench_json_text(const Bench *bench, const char *name, const char *value);
void bench_json_object(const Bench *bench, const char *name); /* NULL: an element of an array */
void bench_json_array(const Bench *bench, const char *name);
void bench_json_end_object(const Bench *bench);
void bench_json_end_array(const Bench *bench);

/* MemAvailable, in bytes. */
uint64_t bench_memory_available(void);
