/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The fault threads: they serve the page faults of the destination's guest. Theory in fault.c. */
#pragma once

#include "migration/postcopy/blocktime.h"
#include "migration/core/types.h"
#include "migration/core/params.h"
#include "migration/memory/ram.h"
#include "transport/transport.h"
#include "util/stall-watchdog.h"

typedef struct PrFaultService PrFaultService;

typedef struct PrFaultHooks {
	/* The last page has come in; any number of times. From any fault thread. */
	void (*complete)(void *opaque);
	/* A fault waits for a page that the source has not told about yet (pr_ram_mark_ungranted()). From any fault thread. */
	void (*want)(guint block, uint64_t page, void *opaque);
	/* No READ for a fault on a huge page is under way any more. From any fault thread. */
	void (*no_huge_read)(void *opaque);
	/* The guest or the kernel failed us; once. From a fault thread, which goes on. */
	void (*broken)(const GError *error, void *opaque);
	void *opaque;
	PrWatchdog *watchdog;
} PrFaultHooks;

typedef struct PrFaultStats {
	uint64_t requests; /* READs posted for faults */
	uint64_t helped;   /* faults that others than the first thread have read */
	uint64_t repeats;  /* reports of faults that were pending already */
	uint64_t resolved; /* faults that had to wait for a page, one for each thread that waits */
	uint64_t total_ns; /* of their latencies, from reading the fault to waking the guest */
	uint64_t max_ns;
	uint64_t dist[PR_LATENCY_BUCKETS];
	uint64_t ahead_pages;  /* read ahead of faults */
	uint64_t ahead_waited; /* of these, what a fault came for while they were on their way */
} PrFaultStats;

/* Starts as many threads as params say now, with no path. uffd, ram, times and params outlive them; they are the
 * ones that write to times. */
PrFaultService *pr_fault_start(PrRam *ram, int uffd, PrBlocktime *times, const PrParams *params,
			       const PrFaultHooks *hooks, GError **error);
/* Gives them a path: its urgent lanes are the fault threads' from now on; every fault that still waits is
 * asked for again. */
void pr_fault_attach(PrFaultService *self, PrDataPath *path);
/* Takes the path away; returns when no thread uses it any more. Harmless without one. */
void pr_fault_detach(PrFaultService *self);
/* Pages with a `waiting` bit have been received by somebody else. */
void pr_fault_notify(PrFaultService *self);
void pr_fault_stop(PrFaultService *self);
void pr_fault_stats(const PrFaultService *self, PrFaultStats *ret);
