/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/postcopy/bulk-window.h"

#define READ_LEAST 4096.0 /* bytes */

void pr_window_init(PrWindow *window, gint64 now_us)
{
	*window = (PrWindow){
		.reads = PR_WINDOW_START,
		.read_bytes = PR_WINDOW_START_BYTES,
		.doubling = TRUE,
		.slack_us = PR_WINDOW_LEAST_US,
		.since_us = now_us,
	};
}

void pr_window_resume(PrWindow *window, gint64 now_us)
{
	window->since_us = now_us;
	window->bytes = 0;
	window->n = 0;
}

/* What the rail carries, bytes per us; 0: not known yet. The best that was seen, which fades: a
 * window that was too small, or a host that was busy, is not to make it smaller. */
static double carries(const PrWindow *window)
{
	return MAX(window->best, window->best_before);
}

/* How long a READ took without its bytes' time on the wire. */
static double empty_trip(gint64 trip_us, uint64_t bytes, double rate)
{
	return (double)trip_us - (rate > 0 ? (double)bytes / rate : 0);
}

static void note_trip(PrWindow *window, gint64 trip_us, uint64_t bytes)
{
	double rate = carries(window);

	if (window->trip_us > 0 && empty_trip(trip_us, bytes, rate) >=
					   empty_trip(window->trip_us, window->trip_bytes, rate))
		return;
	window->trip_us = trip_us;
	window->trip_bytes = bytes;
}

/* However late the hosts are: with more a fault would wait longer than is worth any rate. */
static guint limited(const PrWindow *window, double slack_us)
{
	double most = MAX(PR_WINDOW_MOST_US, PR_WINDOW_MOST_BYTES / carries(window));

	return (guint)CLAMP(slack_us, PR_WINDOW_LEAST_US, most);
}

static gboolean is_probe(const PrWindow *window)
{
	return window->look == PR_WINDOW_ROUND - 1;
}

/* The power of two at or below it. */
static double whole(double bytes)
{
	double power = READ_LEAST;

	while (power * 2 <= bytes)
		power *= 2;
	return power;
}

/* So many bytes in flight, in READs of about `read`; larger ones where there would be too many. */
static void fill(PrWindow *window, double bytes, double read, uint64_t most_bytes, guint most_reads)
{
	read = MAX(read, whole(3 * bytes / most_reads));
	read = MIN(read, (double)most_bytes);
	window->read_bytes = (uint64_t)read;
	window->reads = (guint)CLAMP(bytes / read + 0.5, PR_WINDOW_MIN, G_MAXUINT16);
}

static void answer(PrWindow *window, uint64_t most_bytes, guint most_reads)
{
	double rate = carries(window);
	double slack = window->slack_us * (is_probe(window) ? 4.0 : 1.0);
	double empty = empty_trip(window->trip_us, window->trip_bytes, rate);
	double read = MIN(whole(rate * slack), (double)most_bytes);

	/* And a little of a long trip, or a window that is too small would measure just what it
	 * carries. */
	slack += MAX(empty, 1) / PR_WINDOW_GROW;
	fill(window, rate * (MAX(empty, 1) + slack) + read, read, most_bytes, most_reads);
}

static void double_it(PrWindow *window, double rate, uint64_t most_bytes, guint most_reads)
{
	double bytes = (double)window->reads * (double)window->read_bytes;

	window->doubling = rate > window->best * PR_WINDOW_GAIN;
	window->best = MAX(window->best, rate);
	if (window->doubling) {
		fill(window, 2 * bytes, (double)window->read_bytes, most_bytes, most_reads);
		return;
	}
	/* What was enough, and from there downwards. */
	window->slack_us = limited(window, bytes / window->best);
	window->falling = TRUE;
	answer(window, most_bytes, most_reads);
}

static void move_slack(PrWindow *window, gboolean up)
{
	double factor = up ? 2 : window->falling ? 0.25 : 0.5;

	window->slack_us = limited(window, window->slack_us * factor);
	window->score = 0;
}

static void end_round(PrWindow *window, double probed)
{
	double plain = (double)window->plain_bytes / (double)MAX(window->plain_us, 1);

	gboolean gained = probed > plain * PR_WINDOW_GAIN;

	gboolean leap = probed > plain * PR_WINDOW_LEAP;

	/* Hosts that are busy make one probe look good and the next one bad. */
	window->score = window->score * (gained ? 1 : -1) > 0 ? window->score : 0;
	window->score += gained ? 1 : -1;
	if (leap || window->score == PR_WINDOW_SURE)
		move_slack(window, TRUE);
	else if (window->score == -PR_WINDOW_SURE || (window->falling && !gained))
		move_slack(window, FALSE);
	window->falling = window->falling && !gained;
	window->best_before = MAX(window->best, window->best_before * PR_WINDOW_FADE);
	/* More than was ever seen: a rail that has become faster. */
	window->doubling = leap && probed > window->best_before * PR_WINDOW_GAIN;
	window->best = window->doubling ? probed : 0;
	window->plain_bytes = 0;
	window->plain_us = 0;
	window->look = 0;
}

static void look(PrWindow *window, gint64 passed, uint64_t most_bytes, guint most_reads)
{
	double rate = (double)window->bytes / (double)passed;

	if (window->doubling) {
		double_it(window, rate, most_bytes, most_reads);
		return;
	}
	window->best = MAX(window->best, rate);
	if (is_probe(window)) {
		end_round(window, rate);
	} else {
		window->plain_bytes += window->bytes;
		window->plain_us += passed;
		window->look++;
	}
	answer(window, most_bytes, most_reads);
}

void pr_window_completed(PrWindow *window, uint64_t bytes, gint64 trip_us, uint64_t most_bytes,
			 guint most_reads, gint64 now_us)
{
	gint64 passed = now_us - window->since_us;

	note_trip(window, MAX(trip_us, 1), bytes);
	window->bytes += bytes;
	if (passed <
	    MAX(window->doubling ? PR_WINDOW_FIRST_US : PR_WINDOW_LOOK_US, 2 * window->trip_us))
		return;
	look(window, passed, most_bytes, most_reads);
	pr_window_resume(window, now_us);
}
