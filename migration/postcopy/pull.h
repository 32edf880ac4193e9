/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The pull threads: they read in bulk every page that no fault has asked for yet. Theory in
 * pull.c. */
#pragma once

#include "migration/postcopy/fault.h"
#include "migration/core/params.h"
#include "migration/memory/ram.h"
#include "transport/transport.h"
#include "util/stall-watchdog.h"

typedef struct PrPull PrPull;

typedef struct PrPullHooks {
	/* About every 100 ms while a path is attached. From the first pull thread. */
	void (*progress)(void *opaque);
	/* Every page is received; called any number of times, but only with a path attached. From
	 * the first pull thread. */
	void (*complete)(void *opaque);
	/* The guest's process or the kernel failed. Called once, from a pull thread, which goes
	 * on. */
	void (*broken)(const GError *error, void *opaque);
	void *opaque;
	PrWatchdog *watchdog;
} PrPullHooks;

/* Starts the first thread, without a path. All arguments outlive it. */
PrPull *pr_pull_start(PrRam *ram, int uffd, const PrParams *params, PrFaultService *faults,
		      const PrPullHooks *hooks, GError **error);
/* As pr_fault_attach() and pr_fault_detach(), for the bulk lane of the path in use. Without a path
 * in use the rails post nothing. */
void pr_pull_attach(PrPull *pull, PrDataPath *path);
void pr_pull_detach(PrPull *pull);
/* New pages may be there to pull, or every page is received now. */
void pr_pull_notify(PrPull *pull);
/* The path that was in use is fenced, and the fault threads and the first pull thread are detached:
 * ends all claims but those of the other rails. */
void pr_pull_reclaim_inflight(PrPull *pull);
/* Ends all threads, and drops the reference of pr_pull_start(). */
void pr_pull_stop(PrPull *pull);
/* A caller of pr_pull_drain_rail() holds a reference while it waits. */
PrPull *pr_pull_ref(PrPull *pull);
void pr_pull_unref(PrPull *pull);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrPull, pr_pull_unref)

/*
 * Rails beside the path in use: standbys over which a thread of its own pulls at the same time.
 * Callers make sure that only one thread at a time is in the functions below or in pr_pull_stop();
 * only pr_pull_drain_rail() may be called at any time. The functions do nothing for an id that is
 * not known, or no longer known.
 */

/* Whether a path of the same transport is in use, and capability multi-rail is on. */
gboolean pr_pull_wants_rail(PrPull *pull, PrDataPath *path);
/* Starts a thread, which owns the path's bulk lane from now on and adds to *bytes, atomically, what
 * it pulls. Returns the rail's id; 0 with an error: no thread could be started. */
guint pr_pull_add_rail(PrPull *pull, PrDataPath *path, uint64_t *bytes, GError **error);
/* FALSE: READs are in flight, and none has completed for within_us. */
gboolean pr_pull_rail_moves(PrPull *pull, guint id, gint64 within_us);
/* Stops the posting of READs and waits until none is in flight. FALSE: a READ was lost, or the
 * deadline has passed. */
gboolean pr_pull_drain_rail(PrPull *pull, guint id, gint64 deadline);
/* Ends the thread; afterwards the bulk lane is free. */
void pr_pull_end_rail(PrPull *pull, guint id);
/* The rail has ended, and its path is fenced: ends its claims, so that other threads may read those
 * pages. */
void pr_pull_reclaim_rail(PrPull *pull, guint id);
