/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Counters of a fault thread. Only the thread writes its PrFaultStats; any thread may read them. */
#pragma once

#include <glib.h>
#include <stdint.h>

#include "migration/core/types.h"

typedef struct PrFaultStats {
	uint64_t requests; /* READs posted for faults */
	uint64_t helped;   /* faults that helpers have read */
	uint64_t repeats;  /* reports of faults that were pending already */
	uint64_t resolved; /* waits that have ended, one for each guest thread and page */
	uint64_t total_ns; /* sum of their latencies, from the reading of the fault to the waking */
	uint64_t max_ns;
	uint64_t dist[PR_LATENCY_BUCKETS];
	uint64_t ahead_pages;  /* pages read ahead */
	uint64_t ahead_waited; /* of these, pages for which a fault waited before they landed */
} PrFaultStats;

static inline void pr_fault_count(uint64_t *counter, uint64_t value)
{
	__atomic_fetch_add(counter, value, __ATOMIC_RELAXED);
}

/* A wait for a page has ended after so many nanoseconds. */
void pr_fault_count_latency(PrFaultStats *stats, int64_t ns);
/* Adds the counters of one thread to a sum. */
void pr_fault_stats_sum(PrFaultStats *sum, const PrFaultStats *from);
