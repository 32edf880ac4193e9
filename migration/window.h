/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * How many bulk READs a rail keeps in flight: as many as it carries during a round trip, and PR_WINDOW_QUEUE_US
 * more, so that it never runs dry. More would only queue up somewhere, and a fault on a page that is queued
 * waits for all before it. A pure function of what was measured: times are the caller's, in microseconds.
 */
#pragma once

#include <glib.h>
#include <stdint.h>

#define PR_WINDOW_START	   8
#define PR_WINDOW_MIN	   2	/* one that is carried, one that waits behind it */
#define PR_WINDOW_QUEUE_US 1000 /* what may queue up */
#define PR_WINDOW_LOOK_US  20000

typedef struct PrWindow {
	guint reads;	 /* the answer */
	gint64 trip_us;	 /* the shortest time that a READ took, 0: none has come back */
	gint64 since_us; /* the rate is measured since then */
	uint64_t bytes;	 /* that came since then */
} PrWindow;

/* On a new path. */
void pr_window_init(PrWindow *window, gint64 now_us);
/* READs go out again after there were none. */
void pr_window_resume(PrWindow *window, gint64 now_us);
/* A READ of so many bytes is back after trip_us; a full one has read_bytes. */
void pr_window_completed(PrWindow *window, uint64_t bytes, gint64 trip_us, uint64_t read_bytes,
			 gint64 now_us);
