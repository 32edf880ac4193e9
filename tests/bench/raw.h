/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The floors: the speed of memory, the kernel and the network without the engine, over loopback, on
 * this machine. None of this code uses Postroad's.
 */
#pragma once

#include <glib.h>
#include <stdint.h>

typedef struct RawLatency {
	guint n; /* samples */
	double mean_us, p50_us, p99_us, max_us;
} RawLatency;

/* Sorts the samples (nanoseconds). */
RawLatency raw_latency(uint64_t *samples, guint n);

/* How a side waits for the next completion. */
typedef enum RawWait { RAW_SLEEP, RAW_SPIN } RawWait;

/* Rates are in bytes per second. The target is a new memfd, so that a rate includes the allocation
 * of its pages. */

/* memcpy of `total` bytes, in pieces of `chunk` bytes. */
gboolean raw_memcpy(uint64_t total, uint32_t chunk, double *ret_rate, GError **error);

/* libfabric READs over one connection. The source is another thread, which only makes progress.
 * provider: "net", "tcp", … */
gboolean raw_ofi_rate(const char *provider, uint64_t total, uint32_t size, guint window,
		      double *ret_rate, GError **error);
/* READs of 4 KiB, one at a time. */
gboolean raw_ofi_latency(const char *provider, guint n, RawWait wait, RawLatency *ret,
			 GError **error);

/* The same over a plain TCP connection: a request of 16 bytes for each answer. */
gboolean raw_tcp_rate(uint64_t total, uint32_t size, guint window, double *ret_rate,
		      GError **error);
gboolean raw_tcp_latency(guint n, RawLatency *ret, GError **error);

/* The latency of a minor fault in a memfd's second mapping, from the touch to its return. A handler
 * thread waits for the userfaultfd, reads it and continues the fault. */
gboolean raw_minor_fault(guint n, RawWait wait, RawLatency *ret, GError **error);

/* The same for any number of threads: a mapping of n filled pages, whose faults n_threads threads
 * continue at once. They poll for spin_us after the last fault before they sleep. */
typedef struct RawGuest RawGuest;
RawGuest *raw_guest_new(uint64_t n_pages, guint n_threads, guint spin_us, GError **error);
const uint8_t *raw_guest_map(const RawGuest *guest);
void raw_guest_free(RawGuest *guest);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(RawGuest, raw_guest_free)
