/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Threads that touch pages of a guest at the destination, as its vCPUs would. Each thread touches
 * each page of its own slice once, in random order. The results have only the touches that the
 * kernel counts as page faults of the thread: these waited for the userfaultfd. A page that has
 * arrived is mapped already, and does not fault.
 */
#pragma once

#include <glib.h>
#include <stdint.h>

#include "tests/bench/raw.h"

typedef struct TouchConfig {
	const uint8_t *map;
	uint64_t n_pages; /* of 4 KiB */
	guint n_threads;
	guint n_each;  /* touches of each thread; 0: its whole slice, or until touch_finish() */
	guint rest_us; /* pause of each thread after each touch */
} TouchConfig;

typedef struct TouchResult {
	GArray *faults;	 /* uint64_t: ns of each fault */
	guint64 touched; /* pages, including those that did not fault */
	double seconds;	 /* from the first touch to the last thread's end */
} TouchResult;
void touch_result_clear(TouchResult *result);
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(TouchResult, touch_result_clear)
/* Sorts the faults. All values are 0 if there are no faults. */
RawLatency touch_latency(const TouchResult *result);

typedef struct Touch Touch;

/* Creates the threads, which wait for touch_go(). They skip the pages that the test guest leaves as
 * holes or zeros: those are not sent. */
Touch *touch_new(const TouchConfig *config);
void touch_go(Touch *touch);
/* Waits until all threads have ended, and frees the Touch. now: the threads stop after the current
 * touch. */
void touch_finish(Touch *touch, gboolean now, TouchResult *ret);
