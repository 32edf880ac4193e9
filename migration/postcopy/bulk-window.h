/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * How large a rail's bulk READs are and how many are in flight. A READ of the urgent lane, or a
 * fault on a page that a bulk READ covers, waits for what is in flight beyond what the rail carries
 * during a round trip: it has queued up somewhere. So:
 *  - in flight is what the rail carries during a round trip and `slack` more;
 *  - a READ is no longer on the wire than the slack.
 * With the least slack an urgent READ then waits for 100 us of the wire's time at most: the slack,
 * a READ that was begun and one more for rounding.
 *
 * So little keeps a rail busy where everybody is quick. Whether it does here is found out: of
 * PR_WINDOW_ROUND looks, the last one is with four times the slack. If that carries a tenth more
 * twice in a row, the slack is doubled; if twice it does not, it is halved.
 *
 * In the beginning, and when a probe has carried half as much again and more than was ever seen,
 * nothing is known: the window is doubled from look to look until that carries no more.
 *
 * A pure function of what was measured: times are the caller's, in microseconds.
 */
#pragma once

#include <glib.h>
#include <stdint.h>

#define PR_WINDOW_START	      4 /* READs */
#define PR_WINDOW_START_BYTES (16u * 1024)
#define PR_WINDOW_MIN	      2 /* one that is carried, one that waits behind it */
#define PR_WINDOW_LEAST_US    33
#define PR_WINDOW_MOST_US     1000.0 /* or what this takes on a slow rail: */
#define PR_WINDOW_MOST_BYTES  (256.0 * 1024)
#define PR_WINDOW_LOOK_US     10000 /* and until the window was emptied PR_WINDOW_TURNS times */
#define PR_WINDOW_FIRST_US    2000  /* while it is doubled */
#define PR_WINDOW_TURNS	      4
#define PR_WINDOW_SURE	      2 /* probes that say the same */
#define PR_WINDOW_ROUND	      8
#define PR_WINDOW_GROW	      32  /* the part of the trip that is slack, too */
#define PR_WINDOW_GAIN	      1.1 /* to be worth more slack */
#define PR_WINDOW_FADE	      0.9 /* of what was seen to be carried, each round */
#define PR_WINDOW_LEAP	      1.5 /* nothing is known any more */

typedef struct PrWindow {
	guint reads;	     /* the answer: so many in flight, */
	uint64_t read_bytes; /* each of so many bytes */

	gboolean doubling;
	gboolean falling; /* from what was enough while it was doubled */
	int score;	  /* so many probes in a row have carried more, or (below 0) have not */
	guint slack_us;
	gint64 trip_us;	     /* the shortest time that a READ took, 0: none has come back; */
	uint64_t trip_bytes; /* and of how many bytes it was */

	guint look; /* in this round */
	double best,
		best_before;  /* bytes per us, of the best look of this round, of the one before */
	uint64_t plain_bytes; /* of this round's looks without more slack, */
	gint64 plain_us;      /* and how long they took */
	gint64 since_us;      /* the look began */
	uint64_t bytes;	      /* that came since then */
	guint n;	      /* READs that were */
} PrWindow;

/* On a new path. */
void pr_window_init(PrWindow *window, gint64 now_us);
/* READs go out again after the window was not full, for lack of READs: what was seen meanwhile does
 * not count. */
void pr_window_resume(PrWindow *window, gint64 now_us);
/* A READ of so many bytes is back after trip_us. No READ may be longer than most_bytes, and no more
 * than most_reads in flight. */
void pr_window_completed(PrWindow *window, uint64_t bytes, gint64 trip_us, uint64_t most_bytes,
			 guint most_reads, gint64 now_us);
