/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * How long the guest's threads have waited for pages: each vCPU, all vCPUs at once (QEMU's
 * postcopy-blocktime), and the other threads together.
 *
 * The vCPUs are known by their thread ids from the beginning, or else the first threads that fault
 * are followed instead, up to PR_BLOCKTIME_LEARN of them; then nobody can say when all vCPUs
 * waited. A fault whose thread is not told (tid 0: a kernel without UFFD_FEATURE_THREAD_ID), or
 * that the kernel took on a vCPU's behalf (KVM's asynchronous faults), counts among the others.
 *
 * A vCPU that halts until its asynchronous fault is served waits as well, and nobody tells: its
 * thread has no fault. So the time in which all vCPUs waited is given with an upper bound: the time
 * in which as many waits went on as there are vCPUs, whoever's they were. In between lies what an
 * operator would call downtime.
 *
 * No I/O; times are passed in: nanoseconds of any clock that never goes back, above 0. All memory
 * is allocated by pr_blocktime_new(). One thread at a time writes: blocked(), woken(), close().
 * Others may read() at the same time: every counter is atomic. A reader may miss a wait that ends
 * at that moment; it never counts one twice.
 */
#pragma once

#include <glib.h>
#include <stdint.h>

#define PR_BLOCKTIME_LEARN 64

typedef struct PrBlocktime PrBlocktime;

/* One thread's wait for one page: the writer keeps it while it lasts. */
typedef struct PrPageWait {
	int64_t since_ns;
	uint32_t tid;
	uint32_t slot;	 /* of the thread; PR_PAGE_WAIT_OTHER: not followed */
	uint32_t serial; /* which wait of the thread's */
} PrPageWait;
#define PR_PAGE_WAIT_OTHER G_MAXUINT32

/* What one thread has waited. */
typedef struct PrThreadTime {
	uint32_t tid;	     /* as the guest's process sees it */
	uint64_t blocked_ns; /* in all, a wait that goes on included */
	uint64_t faults;     /* waits that have ended */
	uint64_t latency_ns; /* their mean */
} PrThreadTime;

typedef struct PrBlocktimeInfo {
	gboolean vcpus_known;
	uint64_t all_blocked_ns; /* all vCPUs at once; 0 where they are not known */
	GArray *threads;     /* PrThreadTime: the vCPUs in their order, or the first that faulted */
	uint64_t at_most_ns; /* the same, had each wait of another thread been one of a vCPU */
	uint64_t other_faults;
	uint64_t other_latency_ns; /* mean */
	uint64_t other_blocked_ns; /* at least one thread that is no vCPU waited */
} PrBlocktimeInfo;

/* n 0: the vCPUs are not known. Several of them may be of one thread. */
PrBlocktime *pr_blocktime_new(const uint32_t *vcpus, guint n);
void pr_blocktime_free(PrBlocktime *self);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrBlocktime, pr_blocktime_free)

/* Whether the vCPUs are known, and this thread is none of them (the writer asks). */
gboolean pr_blocktime_is_other(const PrBlocktime *self, uint32_t tid);
/* A thread begins to wait. If it was waiting already, it has gone on since: that wait ends now. */
void pr_blocktime_blocked(PrBlocktime *self, uint32_t tid, int64_t now_ns, PrPageWait *ret);
/* The page of that wait is there; harmless for the thread when it is at another wait already. */
void pr_blocktime_woken(PrBlocktime *self, const PrPageWait *wait, int64_t now_ns);
/* Nobody waits any more. */
void pr_blocktime_close(PrBlocktime *self, int64_t now_ns);

/* From any thread; g_array_unref() the threads. */
void pr_blocktime_read(const PrBlocktime *self, int64_t now_ns, PrBlocktimeInfo *ret);
