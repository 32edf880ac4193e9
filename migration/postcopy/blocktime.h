/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * How long the guest's threads have waited for pages: each vCPU, all vCPUs at once (QEMU's
 * postcopy-blocktime), and all other threads together.
 *
 * The thread ids of the vCPUs may be known from the beginning. Otherwise the first threads that
 * fault are followed instead, up to PR_BLOCKTIME_LEARN of them, and nobody can say when all vCPUs
 * waited. Two kinds of faults count among the other threads: those without a thread id (tid 0: a
 * kernel without UFFD_FEATURE_THREAD_ID), and those that the kernel takes on a vCPU's behalf (KVM's
 * asynchronous faults).
 *
 * A vCPU that halts until its asynchronous fault is served waits, too, but its own thread has no
 * fault. So the time in which all vCPUs waited has an upper bound beside it: the time in which at
 * least as many waits went on as there are vCPUs, of whatever threads. What an operator would call
 * downtime lies between the two.
 *
 * No I/O; times are passed in: nanoseconds above 0, of any clock that never goes back.
 * pr_blocktime_new() allocates all memory. One thread at a time writes: blocked(), woken(),
 * close(). Other threads may read() at the same time, because every counter is atomic. A reader may
 * miss a wait that ends at that moment; it never counts a wait twice.
 */
#pragma once

#include <glib.h>
#include <stdint.h>

#define PR_BLOCKTIME_LEARN 64

typedef struct PrBlocktime PrBlocktime;

/* One thread's wait for one page. The writer keeps it while the wait lasts. */
typedef struct PrPageWait {
	int64_t since_ns;
	uint32_t tid;
	uint32_t slot;	 /* of the thread; PR_PAGE_WAIT_OTHER: the thread is not followed */
	uint32_t serial; /* number of the thread's wait */
} PrPageWait;
#define PR_PAGE_WAIT_OTHER G_MAXUINT32

/* How long one thread has waited. */
typedef struct PrThreadTime {
	uint32_t tid;	     /* as the guest's process sees it */
	uint64_t blocked_ns; /* in all, with a wait that goes on */
	uint64_t faults;     /* waits that have ended */
	uint64_t latency_ns; /* their mean */
} PrThreadTime;

typedef struct PrBlocktimeInfo {
	gboolean vcpus_known;
	uint64_t all_blocked_ns; /* all vCPUs at once; 0 where they are not known */
	GArray *threads;     /* PrThreadTime: the vCPUs in their order, or the first that faulted */
	uint64_t at_most_ns; /* upper bound of all_blocked_ns: see above */
	uint64_t other_faults;
	uint64_t other_latency_ns; /* mean */
	uint64_t other_blocked_ns; /* time in which at least one thread that is no vCPU waited */
} PrBlocktimeInfo;

/* vCPUs: their thread ids; several vCPUs may share a thread. n 0: they are not known. */
PrBlocktime *pr_blocktime_new(const uint32_t *vcpus, guint n);
void pr_blocktime_free(PrBlocktime *self);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrBlocktime, pr_blocktime_free)

/* Whether the vCPUs are known, and this thread is none of them. For the writer. */
gboolean pr_blocktime_is_other(const PrBlocktime *self, uint32_t tid);
/* A thread begins to wait. An earlier wait of the thread ends now, since it must have gone on. */
void pr_blocktime_blocked(PrBlocktime *self, uint32_t tid, int64_t now_ns, PrPageWait *ret);
/* The page of that wait is there. Does nothing for a thread that is in another wait already. */
void pr_blocktime_woken(PrBlocktime *self, const PrPageWait *wait, int64_t now_ns);
/* No thread waits any more. */
void pr_blocktime_close(PrBlocktime *self, int64_t now_ns);

/* From any thread. The caller unrefs ret->threads. */
void pr_blocktime_read(const PrBlocktime *self, int64_t now_ns, PrBlocktimeInfo *ret);
