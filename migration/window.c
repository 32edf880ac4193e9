/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/window.h"

void pr_window_init(PrWindow *window, gint64 now_us)
{
	*window = (PrWindow){.reads = PR_WINDOW_START, .since_us = now_us};
}

void pr_window_resume(PrWindow *window, gint64 now_us)
{
	window->since_us = now_us;
	window->bytes = 0;
}

void pr_window_completed(PrWindow *window, uint64_t bytes, gint64 trip_us, uint64_t read_bytes,
			 gint64 now_us)
{
	gint64 passed = now_us - window->since_us;

	trip_us = MAX(trip_us, 1);
	if (window->trip_us == 0 || trip_us < window->trip_us)
		window->trip_us = trip_us;
	window->bytes += bytes;
	if (passed < PR_WINDOW_LOOK_US)
		return;
	/* Rounded up: a window that is too small for a long round trip measures too small a rate, and has to
	 * grow all the same. */
	double carried = (double)window->bytes / (double)passed *
			 (double)(window->trip_us + PR_WINDOW_QUEUE_US);
	double reads = carried / (double)read_bytes + 1;
	window->reads = (guint)CLAMP(reads, PR_WINDOW_MIN, G_MAXUINT16);
	pr_window_resume(window, now_us);
}
