/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The time that the fault thread spends on a fault's block time and on the choice of read-ahead. */
#include <stdio.h>
#include <time.h>

#include "migration/postcopy/blocktime.h"
#include "migration/postcopy/readahead.h"

#define ROUNDS 2000000u

static int64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000000000ll + ts.tv_nsec;
}

static void show(const char *what, int64_t start_ns)
{
	printf("%-40s %6.1f ns a fault\n", what, (double)(now_ns() - start_ns) / ROUNDS);
}

static void blocktime(guint n_vcpus, const char *what)
{
	g_autofree uint32_t *tids = g_new(uint32_t, n_vcpus);

	for (guint i = 0; i < n_vcpus; i++)
		tids[i] = 30000 + 3 * i;
	g_autoptr(PrBlocktime) times = pr_blocktime_new(tids, n_vcpus);
	int64_t start = now_ns();
	for (guint i = 0; i < ROUNDS; i++) {
		PrPageWait wait;

		pr_blocktime_blocked(times, tids[i % n_vcpus], i + 1, &wait);
		pr_blocktime_woken(times, &wait, i + 2);
	}
	show(what, start);
}

static void readahead(uint32_t tid, uint64_t step, guint limit, const char *what)
{
	g_autofree PrReadahead *state = g_new0(PrReadahead, 1);
	uint64_t page = 0, suggested = 0;
	PrReadaheadRun run;
	int64_t start = now_ns();

	for (guint i = 0; i < ROUNDS; i++) {
		page = (page + step) % (1u << 30);
		pr_readahead_fault(state, tid ? tid + i % 4 : 0, 0, page, 1u << 30, limit, &run);
		suggested += run.n;
	}
	show(what, start);
	if (suggested == 0 && limit > 0 && step < PR_READAHEAD_STRIDE)
		fprintf(stderr, "%s: nothing was suggested\n", what);
}

int main(void)
{
	blocktime(2, "block times, 2 vCPUs");
	blocktime(256, "block times, 256 vCPUs");
	readahead(30000, 1, 0, "read-ahead, off");
	readahead(30000, 1, 16, "read-ahead, 4 threads, regular");
	readahead(30000, 2654435761u, 16, "read-ahead, 4 threads, random");
	readahead(PR_READAHEAD_NO_THREAD, 1, 16, "read-ahead, by address, regular");
	readahead(PR_READAHEAD_NO_THREAD, 2654435761u, 16, "read-ahead, by address, random");
	return 0;
}
