/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Threads that touch pages of a guest at the destination, as its vCPUs would: each a slice of its own, in random
 * order, each page once. What is timed are the touches that the kernel counts as the thread's page faults: those are
 * the ones that waited for the userfaultfd. What is in place has been mapped, too, and does not fault.
 */
#pragma once

#include <glib.h>
#include <stdint.h>

#include "tests/bench/raw.h"

typedef struct TouchConfig {
	const uint8_t *map;
	uint64_t n_pages; /* of 4 KiB */
	guint n_threads;
	guint n_each; /* touches of each thread; 0: until it is told to stop, or has touched its slice */
	guint rest_us; /* of each thread after each touch */
} TouchConfig;

typedef struct TouchResult {
	GArray *faults;	 /* uint64_t: ns of each */
	guint64 touched; /* pages, those that did not fault included */
	double seconds;	 /* from the first touch to the last thread's end */
} TouchResult;
void touch_result_clear(TouchResult *result);
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(TouchResult, touch_result_clear)
/* Sorts them. All are 0 without faults. */
RawLatency touch_latency(const TouchResult *result);

typedef struct Touch Touch;

/* Makes the threads, which wait. Pages that the test guest leaves as holes or fills with zeros are left out:
 * they do not travel. */
Touch *touch_new(const TouchConfig *config);
void touch_go(Touch *touch);
/* Waits for the end, which with `now` is told to come at once; frees it. */
void touch_finish(Touch *touch, gboolean now, TouchResult *ret);
