/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/postcopy/bulk-window.h"

#define READ_MIN 4096.0 /* bytes */

void pr_bulk_window_init(PrBulkWindow *window, gint64 now_us)
{
	*window = (PrBulkWindow){
		.reads = PR_BULK_WINDOW_START,
		.read_bytes = PR_BULK_WINDOW_START_BYTES,
		.doubling = TRUE,
		.slack_us = PR_BULK_WINDOW_SLACK_MIN_US,
		.since_us = now_us,
	};
}

void pr_bulk_window_resume(PrBulkWindow *window, gint64 now_us)
{
	window->since_us = now_us;
	window->bytes = 0;
}

/* What the rail carries, bytes/us; 0: not known yet. It is the best rate of this round and the one
 * before, which fades. A window that was too small, or a host that was busy, must not make it
 * smaller at once. */
static double rail_rate(const PrBulkWindow *window)
{
	return MAX(window->best, window->best_before);
}

/* The round trip of a READ without the time of its bytes on the wire. */
static double empty_rtt(gint64 rtt_us, uint64_t bytes, double rate)
{
	return (double)rtt_us - (rate > 0 ? (double)bytes / rate : 0);
}

static void note_rtt(PrBulkWindow *window, gint64 rtt_us, uint64_t bytes)
{
	double rate = rail_rate(window);

	if (window->rtt_us > 0 &&
	    empty_rtt(rtt_us, bytes, rate) >= empty_rtt(window->rtt_us, window->rtt_bytes, rate))
		return;
	window->rtt_us = rtt_us;
	window->rtt_bytes = bytes;
}

/* Beyond the maximum a fault would wait longer than any rate is worth. */
static guint clamp_slack(const PrBulkWindow *window, double slack_us)
{
	double max = MAX(PR_BULK_WINDOW_SLACK_MAX_US,
			 PR_BULK_WINDOW_SLACK_MAX_BYTES / rail_rate(window));

	return (guint)CLAMP(slack_us, PR_BULK_WINDOW_SLACK_MIN_US, max);
}

static gboolean is_probe(const PrBulkWindow *window)
{
	return window->interval == PR_BULK_WINDOW_ROUND - 1;
}

/* The largest power of two that is not above `bytes`, but at least READ_MIN. */
static double round_down(double bytes)
{
	double power = READ_MIN;

	while (power * 2 <= bytes)
		power *= 2;
	return power;
}

/* Sets the window to so many bytes in flight, in READs of about `read` bytes. They are longer where
 * there would be too many of them. */
static void set_window(PrBulkWindow *window, double bytes, double read, uint64_t max_bytes,
		       guint max_reads)
{
	read = MAX(read, round_down(3 * bytes / max_reads));
	read = MIN(read, (double)max_bytes);
	window->read_bytes = (uint64_t)read;
	window->reads = (guint)CLAMP(bytes / read + 0.5, PR_BULK_WINDOW_MIN, G_MAXUINT16);
}

static void fit_to_rail(PrBulkWindow *window, uint64_t max_bytes, guint max_reads)
{
	double rate = rail_rate(window);
	double slack = window->slack_us * (is_probe(window) ? 4.0 : 1.0);
	double rtt = MAX(empty_rtt(window->rtt_us, window->rtt_bytes, rate), 1);
	double read = MIN(round_down(rate * slack), (double)max_bytes);

	/* A part of a long round trip is added. Without it a window that is too small would measure
	 * no more than what it carries itself. */
	slack += rtt / PR_BULK_WINDOW_RTT_PART;
	set_window(window, rate * (rtt + slack) + read, read, max_bytes, max_reads);
}

static void double_window(PrBulkWindow *window, double rate, uint64_t max_bytes, guint max_reads)
{
	double bytes = (double)window->reads * (double)window->read_bytes;

	window->doubling = rate > window->best * PR_BULK_WINDOW_GAIN;
	window->best = MAX(window->best, rate);
	if (window->doubling) {
		set_window(window, 2 * bytes, (double)window->read_bytes, max_bytes, max_reads);
		return;
	}
	/* This much was enough; the probes find out whether less is. */
	window->slack_us = clamp_slack(window, bytes / window->best);
	window->decreasing = TRUE;
	fit_to_rail(window, max_bytes, max_reads);
}

static void move_slack(PrBulkWindow *window, gboolean up)
{
	double factor = up ? 2 : window->decreasing ? 0.25 : 0.5;

	window->slack_us = clamp_slack(window, window->slack_us * factor);
	window->streak = 0;
}

/* The probe has ended, and the round with it. */
static void end_round(PrBulkWindow *window, double probed)
{
	double plain = (double)window->plain_bytes / (double)MAX(window->plain_us, 1);
	gboolean gained = probed > plain * PR_BULK_WINDOW_GAIN;
	gboolean leapt = probed > plain * PR_BULK_WINDOW_LEAP;

	/* One probe alone proves little, since hosts may be busy for a moment. */
	window->streak = window->streak * (gained ? 1 : -1) > 0 ? window->streak : 0;
	window->streak += gained ? 1 : -1;
	if (leapt || window->streak == PR_BULK_WINDOW_STREAK)
		move_slack(window, TRUE);
	else if (window->streak == -PR_BULK_WINDOW_STREAK || (window->decreasing && !gained))
		move_slack(window, FALSE);
	window->decreasing = window->decreasing && !gained;
	window->best_before = MAX(window->best, window->best_before * PR_BULK_WINDOW_FADE);
	/* More than ever before: the rail has become faster. */
	window->doubling = leapt && probed > window->best_before * PR_BULK_WINDOW_GAIN;
	window->best = window->doubling ? probed : 0;
	window->plain_bytes = 0;
	window->plain_us = 0;
	window->interval = 0;
}

static void end_interval(PrBulkWindow *window, gint64 length_us, uint64_t max_bytes,
			 guint max_reads)
{
	double rate = (double)window->bytes / (double)length_us;

	if (window->doubling) {
		double_window(window, rate, max_bytes, max_reads);
		return;
	}
	window->best = MAX(window->best, rate);
	if (is_probe(window)) {
		end_round(window, rate);
	} else {
		window->plain_bytes += window->bytes;
		window->plain_us += length_us;
		window->interval++;
	}
	fit_to_rail(window, max_bytes, max_reads);
}

void pr_bulk_window_completed(PrBulkWindow *window, uint64_t bytes, gint64 rtt_us,
			      uint64_t max_bytes, guint max_reads, gint64 now_us)
{
	gint64 length_us = now_us - window->since_us;

	note_rtt(window, MAX(rtt_us, 1), bytes);
	window->bytes += bytes;
	if (length_us <
	    MAX(window->doubling ? PR_BULK_WINDOW_DOUBLING_US : PR_BULK_WINDOW_INTERVAL_US,
		2 * window->rtt_us))
		return;
	end_interval(window, length_us, max_bytes, max_reads);
	pr_bulk_window_resume(window, now_us);
}
