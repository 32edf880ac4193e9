/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What a recovery costs that grows with the guest: the received bitmap encoded, decoded and turned into the dirty
 * bitmap, for a guest of the given size (1 TiB) in pages of 4 KiB. Memory is the bitmaps themselves.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "migration/bitmap.h"
#include "transport/wire.h"

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

static void measure(const char *what, const unsigned long *bits, uint64_t n_pages,
		    gboolean compress)
{
	g_autoptr(GByteArray) body = g_byte_array_new();
	g_autofree unsigned long *received = NULL, *dirty = NULL;
	char idstr[PR_IDSTR_MAX + 1];
	g_autoptr(GError) error = NULL;

	gint64 began = g_get_monotonic_time();
	uint16_t type = pr_recv_bitmap_encode(body, "mem0", bits, n_pages, compress);
	double encode = ms_since(began);
	began = g_get_monotonic_time();
	if (!pr_recv_bitmap_decode(type, body->data, body->len, idstr, n_pages, &received, &error))
		g_error("%s", error->message);
	double decode = ms_since(began);
	/* The engine has it already. */
	dirty = g_new(unsigned long, pr_bitmap_words(n_pages));
	memset(dirty, 1, pr_bitmap_words(n_pages) * sizeof(*dirty));
	began = g_get_monotonic_time();
	for (uint64_t i = 0; i < pr_bitmap_words(n_pages); i++)
		__atomic_store_n(&dirty[i], ~received[i], __ATOMIC_RELAXED);
	double rebuild = ms_since(began);
	double all = encode + decode + rebuild;
	printf("%-26s %-5s %10u %9.1f %9.1f %9.1f %9.1f %12.4f\n", what,
	       type == PR_RP_RECV_BITMAP_ZSTD ? "zstd" : "raw", body->len, encode, decode, rebuild,
	       all, all / ((double)n_pages * PAGE / (1 << 30)));
}

int main(int argc, char **argv)
{
	uint64_t gib = argc > 1 ? strtoull(argv[1], NULL, 10) : 1024;
	uint64_t n_pages = gib * (1 << 30) / PAGE;
	g_autofree unsigned long *bits = g_new(unsigned long, pr_bitmap_words(n_pages));

	printf("a guest of %" G_GUINT64_FORMAT
	       " GiB, times in ms\n%-26s %-5s %10s %9s %9s %9s %9s %12s\n",
	       gib, "received", "sent", "bytes", "encode", "decode", "rebuild", "all",
	       "ms per GiB");
	fill_runs(bits, pr_bitmap_words(n_pages));
	measure("every other 2 MiB", bits, n_pages, FALSE);
	measure("every other 2 MiB", bits, n_pages, TRUE);
	fill_random(bits, pr_bitmap_words(n_pages));
	measure("at random", bits, n_pages, FALSE);
	measure("at random", bits, n_pages, TRUE);
	printf("peak memory %.0f MiB, of which the bitmap itself %.0f MiB\n", peak_mib(),
	       (double)pr_bitmap_words(n_pages) * sizeof(*bits) / (1 << 20));
	return 0;
}
