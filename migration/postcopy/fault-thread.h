/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The state of the fault threads, and the entries that wait for pages. fault.c runs the threads and
 * has the theory; fault-pending.c keeps the entries.
 */
#pragma once

#include <time.h>

#include "migration/core/params.h"
#include "migration/memory/ram.h"
#include "migration/postcopy/blocktime.h"
#include "migration/postcopy/fault.h"
#include "migration/postcopy/readahead.h"
#include "migration/postcopy/repeats.h"
#include "migration/postcopy/worker.h"

#define PR_PENDING_MAX	   4096
#define PR_FAULT_PLANS_MAX 8
#define PR_FAULT_AHEAD                                                                             \
	(1ull << 55) /* in the token of a READ ahead: the token's page count is smaller */
G_STATIC_ASSERT(PR_READ_MAX / 4096 < PR_FAULT_AHEAD >> 40);

/* One thread of the guest that waits for one page. */
typedef struct PrPending {
	uint64_t token; /* of the host page's first page */
	PrPageWait wait;
	gboolean grant_requested; /* from the source, over the current path */
	gboolean posted;	  /* our own READ covers the page; never set for a huge page */
} PrPending;

typedef struct PrFaultThread {
	/* constant */
	PrFaultService *service;
	guint index; /* 0: the first thread; the others are helpers */
	PrLaneId lane;
	PrRam *ram;
	int uffd;
	const PrParams *params;

	PrWorker worker; /* has its own rules */
	int asleep;	 /* atomic: a helper that may be woken to read faults */

	/* the thread's own */
	PrPending pending[PR_PENDING_MAX];
	guint n_pending;    /* atomic: written by the thread; others read whether it is 0 */
	guint outstanding;  /* READs on the current path */
	guint huge_reads;   /* of these, READs for faults on huge pages */
	gboolean path_dead; /* the path has refused a READ; it is about to be detached */
	PrReadaheadRun plans[PR_FAULT_PLANS_MAX]; /* what is to be read ahead, oldest first */
	guint n_plans;
	uint64_t ahead_pages; /* whose READs ahead are in flight */
	PrWatch *watch;
	gboolean uffd_dead; /* the guest's address space has ended */
	PrRepeats repeats;

	PrFaultStats stats; /* atomic; written by the thread */
} PrFaultThread;

struct PrFaultService {
	/* constant */
	PrRam *ram;
	int uffd;
	const PrParams *params;
	PrFaultHooks hooks;
	guint n_threads;
	PrFaultThread *threads;

	int broken; /* atomic: the hook was called */

	GMutex lock;	    /* protects what follows; taken last */
	GArray *handed_off; /* PrPending of helpers without a lane, for the first thread */
	guint n_handed_off; /* its length; atomic, written under the lock */

	GMutex stats_lock; /* protects what follows if there are several threads; taken last */
	PrBlocktime *times;
	PrReadahead readahead;
};

static inline int64_t pr_fault_now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000000000ll + ts.tv_nsec;
}

/* Calls the hook unless it was called already. Takes the error. */
static inline void pr_fault_note_broken(PrFaultService *service, GError *error)
{
	if (!__atomic_exchange_n(&service->broken, TRUE, __ATOMIC_RELAXED))
		service->hooks.broken(error, service->hooks.opaque);
	g_error_free(error);
}

static inline void pr_fault_lock_stats(PrFaultService *service)
{
	if (service->n_threads > 1)
		g_mutex_lock(&service->stats_lock);
}

static inline void pr_fault_unlock_stats(PrFaultService *service)
{
	if (service->n_threads > 1)
		g_mutex_unlock(&service->stats_lock);
}

/* Whether the path takes another READ on the thread's lane. */
gboolean pr_fault_may_post(const PrFaultThread *self);
/* Posts the READ of n claimed pages. flag: PR_FAULT_AHEAD or 0. FALSE: the path has refused it; the
 * claim stays until the path is fenced. */
gboolean pr_fault_post(PrFaultThread *self, guint index, uint64_t page, uint64_t n, uint64_t flag);

/* Maps a host page that is whole. page: its first. */
void pr_pending_resolve(PrFaultThread *self, PrRamBlock *block, uint64_t page);
/* A thread of the guest waits for the host page that begins with this page: adds an entry, and
 * posts READs. There is room. FALSE: the wait is known already. */
gboolean pr_pending_add(PrFaultThread *self, guint index, uint64_t page, uint32_t tid);
/* n pages were placed: ends the waits for host pages that are whole now. */
void pr_pending_placed(PrFaultThread *self, guint index, uint64_t page, uint64_t n);
/* Does for each entry what can be done now. */
void pr_pending_advance_all(PrFaultThread *self);
/* A helper without a lane gives its entries to the first thread. */
void pr_pending_hand_off(PrFaultThread *self);
/* Whether entries of helpers are there and the first thread has room for one. */
gboolean pr_pending_may_adopt(const PrFaultThread *self);
/* The first thread takes as many of them as it has room for. */
void pr_pending_adopt(PrFaultThread *self);
