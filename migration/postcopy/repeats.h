/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * How long a fault thread rests while the kernel reports only faults that are pending already,
 * again and again.
 *
 * That happens when the kernel itself reads or writes a missing page for a guest thread (in a
 * system call, or in KVM's record_steal_time()) and the thread has a signal pending. The kernel
 * does not let the thread sleep then: it reports the same fault over and over until the page is
 * there. So after PR_REPEATS_ROW repeats in a row the fault thread rests before it reads faults
 * again: PR_REST_MIN_US at first, twice as long each time, up to PR_REST_MAX_US. A new fault in the
 * batch ends the row, so a new fault waits for one rest at most. Repeats that are more than
 * PR_REPEATS_SELDOM_NS apart make no row.
 *
 * No I/O; times are passed in: nanoseconds of any clock that never goes back. All zeros is a valid
 * beginning.
 */
#pragma once

#include <glib.h>
#include <stdint.h>

#define PR_REPEATS_ROW	     16	      /* repeats without a rest */
#define PR_REPEATS_SELDOM_NS 10000000 /* so far apart they cost next to nothing */
#define PR_REST_MIN_US	     50
#define PR_REST_MAX_US	     1000

typedef struct PrRepeats {
	guint row;	 /* repeats in a row */
	guint rests;	 /* rests since the row began */
	guint rest_us;	 /* the rest that is due; 0: none */
	int64_t last_ns; /* when the last repeat was read */
} PrRepeats;

/* A batch of n faults was read; `fresh` of them were not pending before. */
void pr_repeats_note(PrRepeats *self, guint n, guint fresh, int64_t now_ns);
/* Returns the rest that is due, in microseconds, once; 0: none is due. */
guint pr_repeats_take_rest(PrRepeats *self);
