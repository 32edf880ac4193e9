/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Counters of a fault thread. Only the thread writes its PrFaultStats; any thread may read them. */
#pragma once

#include "migration/postcopy/fault.h"

static inline void pr_fault_count(uint64_t *counter, uint64_t value)
{
	__atomic_fetch_add(counter, value, __ATOMIC_RELAXED);
}

/* A wait for a page has ended after so many nanoseconds. */
void pr_fault_count_latency(PrFaultStats *stats, int64_t ns);
/* Adds the counters of one thread to a sum. */
void pr_fault_stats_sum(PrFaultStats *sum, const PrFaultStats *from);
