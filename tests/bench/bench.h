/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the benchmark programs share: options, medians, and figures as a table and as JSON. */
#pragma once

#include <glib.h>
#include <json-glib/json-glib.h>
#include <stdint.h>

#include "migration/core/params.h"
#include "tests/bench/raw.h"

#define BENCH_MAX_ROUNDS 25

/* One figure over the rounds. */
typedef struct Series {
	double value[BENCH_MAX_ROUNDS];
	guint n;
} Series;

void series_add(Series *series, double value);
/* Leaves NANs out. NAN: there are no values. */
double series_median(const Series *series);
/* The median of value / reference, each round's by itself: machines are noisy. */
double series_ratio(const Series *series, const Series *reference);

typedef struct Bench {
	const char *name;
	int rounds;
	gboolean quick;	   /* does it work? The figures mean nothing */
	gboolean sandbox;  /* as postroad's */
	char **settings;   /* NAME=VALUE: for the engines; or NULL */
	char *output;	   /* where the JSON goes; "-": stdout, and no table; NULL: nowhere */
	JsonBuilder *json; /* inside the outermost object */
	gint64 began;
} Bench;

/* Takes --rounds, --quick, --set and --json, and the program's own options; leaves other arguments. Exits when an
 * option is wrong, or with the help. Engines' messages are not shown. */
void bench_begin(Bench *bench, const char *name, const char *summary, const GOptionEntry *more,
		 int *argc, char ***argv);
/* Writes the JSON, says how long it took, and frees what the Bench has. */
void bench_end(Bench *bench);

/* A parameter or a capability (on, off), as an operator types it. */
gboolean bench_set(PrParams *params, const char *name, const char *value, GError **error);
/* What --set says. */
void bench_apply_settings(const Bench *bench, PrParams *params);

/* Exits with status 2. */
G_NORETURN void bench_usage_error(const Bench *bench, const char *format, ...) G_GNUC_PRINTF(2, 3);
/* A line or a part of it, for the reader. */
void bench_say(const Bench *bench, const char *format, ...) G_GNUC_PRINTF(2, 3);

void bench_json_number(const Bench *bench, const char *name, double value);
void bench_json_text(const Bench *bench, const char *name, const char *value);
void bench_json_object(const Bench *bench, const char *name); /* NULL: an element of an array */
void bench_json_array(const Bench *bench, const char *name);
void bench_json_end_object(const Bench *bench);
void bench_json_end_array(const Bench *bench);

/* MemAvailable, in bytes. */
uint64_t bench_memory_available(void);
