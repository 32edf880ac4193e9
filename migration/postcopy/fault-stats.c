/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/postcopy/fault-stats.h"

void pr_fault_count_latency(PrFaultStats *stats, int64_t ns)
{
	uint64_t us = (uint64_t)ns / 1000;
	guint bucket = us == 0 ? 0 : 63 - (guint)__builtin_clzll(us);

	pr_fault_count(&stats->resolved, 1);
	pr_fault_count(&stats->total_ns, (uint64_t)ns);
	pr_fault_count(&stats->dist[MIN(bucket, PR_LATENCY_BUCKETS - 1)], 1);
	if ((uint64_t)ns > stats->max_ns)
		__atomic_store_n(&stats->max_ns, (uint64_t)ns, __ATOMIC_RELAXED);
}

static uint64_t get(const uint64_t *counter)
{
	return __atomic_load_n(counter, __ATOMIC_RELAXED);
}

void pr_fault_stats_sum(PrFaultStats *sum, const PrFaultStats *from)
{
	sum->requests += get(&from->requests);
	sum->helped += get(&from->helped);
	sum->repeats += get(&from->repeats);
	sum->resolved += get(&from->resolved);
	sum->total_ns += get(&from->total_ns);
	sum->ahead_pages += get(&from->ahead_pages);
	sum->ahead_waited += get(&from->ahead_waited);
	sum->max_ns = MAX(sum->max_ns, get(&from->max_ns));
	for (guint i = 0; i < PR_LATENCY_BUCKETS; i++)
		sum->dist[i] += get(&from->dist[i]);
}
