/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The pull threads: they read every page that nobody asked for yet, in bulk. Theory in pull.c. */
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
	/* The last page has come in; any number of times, but never without a path attached. From the
	 * first pull thread. */
	void (*complete)(void *opaque);
	/* The guest or the kernel failed us; once. From a pull thread, which goes on. */
	void (*broken)(const GError *error, void *opaque);
	void *opaque;
	PrWatchdog *watchdog;
} PrPullHooks;

/* Starts the first thread, with no path. All arguments outlive it. */
PrPull *pr_pull_start(PrRam *ram, int uffd, const PrParams *params, PrFaultService *faults,
		      const PrPullHooks *hooks, GError **error);
/* As pr_fault_attach() and pr_fault_detach(), for the bulk lane of the path in use. Without one the stripes post
 * nothing. */
void pr_pull_attach(PrPull *pull, PrDataPath *path);
void pr_pull_detach(PrPull *pull);
/* There may be something new to pull, or all is there now. */
void pr_pull_notify(PrPull *pull);
/* The path that was in use is fenced, fault threads and first pull thread are detached: forgets all claims but those
 * of the stripes. */
void pr_pull_reclaim_inflight(PrPull *pull);
/* Ends all threads, the stripes' too, and gives up the starter's reference. */
void pr_pull_stop(PrPull *pull);
/* For whoever waits in pr_pull_drain_rail() meanwhile. */
PrPull *pr_pull_ref(PrPull *pull);
void pr_pull_unref(PrPull *pull);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrPull, pr_pull_unref)

/*
 * Stripes: threads that pull over other paths at the same time. The caller sees to it that only one thread at a
 * time is in the functions below or in pr_pull_stop(), but for pr_pull_drain_rail(). An id that is unknown (any more)
 * is harmless.
 */

/* Whether there is a path in use, of the same kind, and capability multi-rail is on. */
gboolean pr_pull_wants_rail(PrPull *pull, PrDataPath *path);
/* The path's bulk lane is the stripe's from now on. Adds to *bytes, atomically, what it pulls. Returns its id. */
guint pr_pull_add_rail(PrPull *pull, PrDataPath *path, uint64_t *bytes, GError **error);
/* FALSE: READs are outstanding, and for so long none has come back. */
gboolean pr_pull_rail_moves(PrPull *pull, guint id, gint64 within_us);
/* Lets it post no more and waits for what is outstanding. FALSE: not every page has come in. */
gboolean pr_pull_drain_rail(PrPull *pull, guint id, gint64 deadline);
/* Ends the thread; the bulk lane is free. */
void pr_pull_end_rail(PrPull *pull, guint id);
/* It has ended, and nothing lands from its path any more: what it has not brought may be read by others. */
void pr_pull_reclaim_rail(PrPull *pull, guint id);
