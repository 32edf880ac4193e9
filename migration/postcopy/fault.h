/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The fault threads: they serve the page faults of the destination's guest. Theory in fault.c. */
#pragma once

#include "migration/core/params.h"
#include "migration/memory/ram.h"
#include "migration/postcopy/blocktime.h"
#include "migration/postcopy/fault-stats.h"
#include "transport/transport.h"
#include "util/stall-watchdog.h"

typedef struct PrFaultService PrFaultService;

typedef struct PrFaultHooks {
	/* Every page is received; called any number of times, from any fault thread. */
	void (*complete)(void *opaque);
	/* A fault waits for a page that the source has not granted (pr_ram_mark_ungranted()). From
	 * any fault thread. */
	void (*request_grant)(guint block, uint64_t page, void *opaque);
	/* No READ for a fault on a huge page is in flight any more. From any fault thread. */
	void (*no_huge_read)(void *opaque);
	/* The guest's process or the kernel failed. Called once for each attached path, from a
	 * fault thread, which goes on. */
	void (*broken)(const GError *error, void *opaque);
	void *opaque;
	PrWatchdog *watchdog;
} PrFaultHooks;

/* Starts as many threads as params say now, without a path. uffd, ram, times and params outlive the
 * threads. Nobody else writes to times. */
PrFaultService *pr_fault_start(PrRam *ram, int uffd, PrBlocktime *times, const PrParams *params,
			       const PrFaultHooks *hooks, GError **error);
/* Gives the threads a path: they own its urgent lanes from now on, and read the page of every
 * pending fault over it. */
void pr_fault_attach(PrFaultService *self, PrDataPath *path);
/* Takes the path away; returns when no thread uses it any more. Does nothing without a path. */
void pr_fault_detach(PrFaultService *self);
/* Another thread has placed pages, granted pages, or ended claims: what waits for them can go
 * on. */
void pr_fault_notify(PrFaultService *self);
void pr_fault_stop(PrFaultService *self);
void pr_fault_stats(const PrFaultService *self, PrFaultStats *ret);
