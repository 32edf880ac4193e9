/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * How long the bulk READs of a rail are, and how many of them are in flight.
 *
 * Goal: the rail is full, and an urgent READ waits for at most 100 us of the wire's time. An urgent
 * READ, or a fault on a page that a bulk READ covers, waits for whatever is in flight beyond what
 * the rail carries during a round trip: that is queued somewhere. So:
 *  - In flight is what the rail carries during a round trip, and `slack` more.
 *  - A READ takes no longer on the wire than the slack.
 * With the smallest slack, 33 us, an urgent READ then waits for the slack, for a READ that has
 * begun, and for one more because of rounding.
 *
 * So little slack keeps a rail busy only where both hosts are quick. Whether it is enough is
 * measured: of PR_BULK_WINDOW_ROUND intervals, the last one is a probe with four times the slack.
 * If two probes in a row carry a tenth more than the other intervals, the slack is doubled; if two
 * in a row do not, it is halved.
 *
 * At the start nothing is known about the rail. The same holds after a probe that has carried half
 * as much again as the other intervals, and more than ever before. Then the window is doubled in
 * each interval until that carries no more.
 *
 * A pure function of what was measured: the caller passes the time, in microseconds. Not for
 * several threads at once.
 */
#pragma once

#include <glib.h>
#include <stdint.h>

#define PR_BULK_WINDOW_START	       4 /* READs */
#define PR_BULK_WINDOW_START_BYTES     (16u * 1024)
#define PR_BULK_WINDOW_MIN	       2 /* READs: one on the wire, one behind it */
#define PR_BULK_WINDOW_SLACK_MIN_US    33
#define PR_BULK_WINDOW_SLACK_MAX_US    1000.0 /* or the time for PR_BULK_WINDOW_SLACK_MAX_BYTES */
#define PR_BULK_WINDOW_SLACK_MAX_BYTES (256.0 * 1024)
#define PR_BULK_WINDOW_INTERVAL_US     10000 /* at least; and two round trips */
#define PR_BULK_WINDOW_DOUBLING_US     2000  /* the same while the window is doubled */
#define PR_BULK_WINDOW_STREAK	       2     /* probes with the same result that change the slack */
#define PR_BULK_WINDOW_ROUND	       8     /* intervals */
#define PR_BULK_WINDOW_RTT_PART	       32    /* this part of the round trip is added to the slack */
#define PR_BULK_WINDOW_GAIN	       1.1   /* what more slack must carry to be worth it */
#define PR_BULK_WINDOW_FADE	       0.9   /* of the best rate, each round */
#define PR_BULK_WINDOW_LEAP	       1.5   /* a probe that carries so much more: another rail */

typedef struct PrBulkWindow {
	/* the result */
	guint reads;	     /* that may be in flight */
	uint64_t read_bytes; /* the length of each */

	gboolean doubling;   /* nothing is known about the rail */
	gboolean decreasing; /* the slack shrinks from the size that doubling has found */
	int streak; /* probes in a row that have carried more (above 0) or have not (below 0) */
	guint slack_us;
	gint64 rtt_us;	    /* the shortest time that a READ took; 0: no READ has completed */
	uint64_t rtt_bytes; /* the length of that READ */

	/* the current round */
	guint interval;	      /* its index */
	double best;	      /* bytes/us of the best interval */
	double best_before;   /* the same of the round before, faded */
	uint64_t plain_bytes; /* of the intervals that were no probes */
	gint64 plain_us;      /* their length */

	/* the current interval */
	gint64 since_us; /* when it began */
	uint64_t bytes;	 /* that have come in since then */
} PrBulkWindow;

/* For a new path. */
void pr_bulk_window_init(PrBulkWindow *window, gint64 now_us);
/* READs are posted again after a time in which the window was not full for lack of READs. What was
 * measured in that time does not count. */
void pr_bulk_window_resume(PrBulkWindow *window, gint64 now_us);
/* A READ of so many bytes has completed after rtt_us. max_bytes: the longest READ allowed.
 * max_reads: how many may be in flight at most. */
void pr_bulk_window_completed(PrBulkWindow *window, uint64_t bytes, gint64 rtt_us,
			      uint64_t max_bytes, guint max_reads, gint64 now_us);
