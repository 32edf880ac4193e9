/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Fault injection as a transport: faulty+SCHEME:HOST:PORT?… behaves as SCHEME: does, except for the
 * faults that its options (or a test, through this header) ask for.
 *
 * A cut, a stall, an error and a corruption each happen once and are then used up, so that a recovery over the same
 * URI succeeds; the delay stays. What is counted is counted on from path to path.
 *
 * The state of a URI's faults is found by its option fault-id, or else by its text. Two sides in one
 * process therefore give different fault-ids.
 */
#pragma once

#include <glib.h>

/* What to do, and when. 0: never. */
typedef struct PrFaultPlan {
	guint64 cut_after_messages; /* the N-th control message (either way) cuts the channel instead */
	guint64 cut_after_reads;   /* the N-th READ is not posted: the path dies */
	guint64 stall_after_reads; /* READs after the N-th stay without an answer until shutdown */
	guint64 error_read;	   /* the N-th READ to complete fails, and the path with it */
	guint64 corrupt_read;  /* a bit of what the N-th READ to complete has brought is flipped */
	guint64 corrupt_reads; /* and of so many from there on; 0: of that one */
	guint64 delay_ms;      /* every completion comes so much later */
	guint64 incremental_grants_us; /* the path is incremental_grants (transport.h), and a MiB takes so long; for both sides */
} PrFaultPlan;

/* Thread-safe. */
typedef struct PrFaults PrFaults;

/* The faults with this id, made if they do not exist; with a plan that is empty. The id goes into a URI
 * as ?fault-id=ID; options beside it there become the plan when their URI is first used. */
PrFaults *pr_faults_new(const char *id);
void pr_faults_free(PrFaults *faults);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrFaults, pr_faults_free)

/* Replaces the plan: everything in it can happen (again). Counters go on. */
void pr_faults_set_plan(PrFaults *faults, const PrFaultPlan *plan);
/* At once: fails the data paths that are up. */
void pr_faults_cut_paths(PrFaults *faults);
/* The next control message cuts its channel. */
void pr_faults_cut_next_message(PrFaults *faults);
/* READs that are posted from now on stay without an answer, on the paths that are up. */
void pr_faults_stall_paths(PrFaults *faults);

typedef struct PrFaultCounts {
	guint64 messages;    /* control messages seen, heartbeats excluded */
	guint64 reads;	     /* post_read() calls on paths that were up */
	guint64 completions; /* READs that succeeded */
	guint64 fired;	     /* cuts, stalls and errors that happened */
	guint64 corrupted;   /* READs of which a bit was flipped */
	guint64 paths;	     /* data paths opened */
} PrFaultCounts;
PrFaultCounts pr_faults_counts(PrFaults *faults);
