/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The floors: what memory, the kernel and the network do without the engine, over loopback, on this
 * machine, now. Nothing in here uses Postroad's code.
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

/* Every rate is in bytes per second and goes into a fresh memfd: pages are allocated on the way. */

/* memcpy of `total` bytes, by `chunk`. */
gboolean raw_memcpy(uint64_t total, uint32_t chunk, double *ret_rate, GError **error);

/* libfabric READs over one connection, the source being another thread that only makes progress.
 * provider: "net", "tcp", … */
gboolean raw_ofi_rate(const char *provider, uint64_t total, uint32_t size, guint window,
		      double *ret_rate, GError **error);
/* One READ of 4 KiB after the other. */
gboolean raw_ofi_latency(const char *provider, guint n, RawWait wait, RawLatency *ret,
			 GError **error);

/* The same over a plain TCP connection: a request of 16 bytes for each answer. */
gboolean raw_tcp_rate(uint64_t total, uint32_t size, guint window, double *ret_rate,
		      GError **error);
gboolean raw_tcp_latency(guint n, RawLatency *ret, GError **error);

/* A minor fault of a memfd's second mapping, from the touch to its return: a handler thread waits for
 * the userfaultfd, reads it and continues the fault. */
gboolean raw_minor_fault(guint n, RawWait wait, RawLatency *ret, GError **error);

/* The same for any number of threads: a mapping of n pages, filled, whose faults a thread continues at once.
 * It polls for spin_us after the last fault before it sleeps. */
typedef struct RawGuest RawGuest;
RawGuest *raw_guest_new(uint64_t n_pages, guint n_threads, guint spin_us, GError **error);
const uint8_t *raw_guest_map(const RawGuest *guest);
void raw_guest_free(RawGuest *guest);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(RawGuest, raw_guest_free)
