/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The costs of a recovery that grow with the guest: to encode the received bitmap, to decode it,
 * and to rebuild the dirty bitmap from it. The guest has the given size (default 1 TiB) and pages
 * of 4 KiB. The memory measured is that of the bitmaps themselves.
 */
#include <string.h>
#include <sys/resource.h>

#include "migration/memory/bitmap.h"
#include "tests/bench/size.h"
#include "transport/wire/wire.h"

#define PAGE	  4096
#define RUN_PAGES 512 /* 2 MiB */

static double ms_since(gint64 began)
{
	return (double)(g_get_monotonic_time() - began) / 1000;
}

static double peak_mib(void)
{
	struct rusage usage;

	getrusage(RUSAGE_SELF, &usage);
	return (double)usage.ru_maxrss / 1024;
}

static void fill_runs(unsigned long *bits, uint64_t n_words)
{
	for (uint64_t i = 0; i < n_words; i++)
		bits[i] = i / (RUN_PAGES / 64) % 2 ? ~0ul : 0;
}

static void fill_random(unsigned long *bits, uint64_t n_words)
{
	uint64_t x = 88172645463325252ull;

	for (uint64_t i = 0; i < n_words; i++) {
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		bits[i] = x;
	}
}

static double rebuild_ms(const unsigned long *received, uint64_t n_words)
{
	g_autofree unsigned long *dirty = g_new(unsigned long, n_words);

	/* The engine's dirty bitmap exists before the recovery, so its pages are allocated. */
	memset(dirty, 1, n_words * sizeof(*dirty));
	gint64 began = g_get_monotonic_time();
	for (uint64_t i = 0; i < n_words; i++)
		__atomic_store_n(&dirty[i], ~received[i], __ATOMIC_RELAXED);
	return ms_since(began);
}

static void report(const Bench *bench, const char *what, gboolean zstd, guint bytes, double encode,
		   double decode, double rebuild, double gib)
{
	double all = encode + decode + rebuild;

	bench_say(bench, "  %-20s %-5s %10u %9.1f %9.1f %9.1f %9.1f %12.4f\n", what,
		  zstd ? "zstd" : "raw", bytes, encode, decode, rebuild, all, all / gib);
	bench_json_object(bench, NULL);
	bench_json_text(bench, "received", what);
	bench_json_text(bench, "sent", zstd ? "zstd" : "raw");
	bench_json_number(bench, "bytes", bytes);
	bench_json_number(bench, "encode_ms", encode);
	bench_json_number(bench, "decode_ms", decode);
	bench_json_number(bench, "rebuild_ms", rebuild);
	bench_json_number(bench, "ms_per_gib", all / gib);
	bench_json_end_object(bench);
}

static void measure(const Bench *bench, const char *what, const unsigned long *bits,
		    uint64_t n_pages, gboolean compress)
{
	Series encode = {0}, decode = {0}, rebuild = {0};
	gboolean zstd = FALSE;
	guint bytes = 0;

	for (int round = 0; round < bench->rounds; round++) {
		g_autoptr(GByteArray) body = g_byte_array_new();
		g_autofree unsigned long *received = NULL;
		char idstr[PR_IDSTR_MAX + 1];
		g_autoptr(GError) error = NULL;

		gint64 began = g_get_monotonic_time();
		uint16_t type = pr_recv_bitmap_encode(body, "mem0", bits, n_pages, compress);
		series_add(&encode, ms_since(began));
		began = g_get_monotonic_time();
		if (!pr_recv_bitmap_decode(type, body->data, body->len, idstr, n_pages, &received,
					   &error))
			g_error("%s", error->message);
		series_add(&decode, ms_since(began));
		series_add(&rebuild, rebuild_ms(received, pr_bitmap_words(n_pages)));
		zstd = type == PR_RP_RECV_BITMAP_ZSTD;
		bytes = body->len;
	}
	report(bench, what, zstd, bytes, series_median(&encode), series_median(&decode),
	       series_median(&rebuild), (double)n_pages * PAGE / (1 << 30));
}

void size_bitmaps(const Bench *bench, uint64_t gib)
{
	uint64_t n_pages = gib * (1 << 30) / PAGE;
	g_autofree unsigned long *bits = g_new(unsigned long, pr_bitmap_words(n_pages));

	bench_say(bench,
		  "\nThe received bitmap in a recovery of a guest of %" G_GUINT64_FORMAT
		  " GiB; times in ms, medians of %d\n  %-20s %-5s %10s %9s %9s %9s %9s %12s\n",
		  gib, bench->rounds, "received", "sent", "bytes", "encode", "decode", "rebuild",
		  "all", "ms per GiB");
	bench_json_object(bench, "bitmaps");
	bench_json_number(bench, "gib", gib);
	bench_json_array(bench, "cases");
	fill_runs(bits, pr_bitmap_words(n_pages));
	measure(bench, "every other 2 MiB", bits, n_pages, FALSE);
	measure(bench, "every other 2 MiB", bits, n_pages, TRUE);
	fill_random(bits, pr_bitmap_words(n_pages));
	measure(bench, "at random", bits, n_pages, FALSE);
	measure(bench, "at random", bits, n_pages, TRUE);
	bench_json_end_array(bench);
	bench_json_number(bench, "peak_mib", peak_mib());
	bench_json_end_object(bench);
	bench_say(bench, "  peak memory %.0f MiB; the bitmap itself has %.0f MiB\n", peak_mib(),
		  (double)pr_bitmap_words(n_pages) * sizeof(*bits) / (1 << 20));
}
