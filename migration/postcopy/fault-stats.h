/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Counting what a fault thread does: it alone writes its PrFaultStats, and anybody may read them. */
#pragma once

#include "migration/postcopy/fault.h"

static inline void pr_fault_count(uint64_t *counter, uint64_t value)
{
	__atomic_fetch_add(counter, value, __ATOMIC_RELAXED);
}

/* A fault was resolved that had to wait for so long. */
void pr_fault_count_latency(PrFaultStats *stats, int64_t ns);
/* Adds a thread's to those of others. */
void pr_fault_stats_sum(PrFaultStats *sum, const PrFaultStats *from);
