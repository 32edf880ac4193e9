/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Fault injection as a transport: faulty+SCHEME:HOST:PORT?… behaves as SCHEME: does, except for
 * the faults that its options ask for, or a test through this header.
 *
 * A cut, a stall, an error and a corruption happen once each and are then used up, so that a
 * recovery over the same URI succeeds. The delay stays. Counters continue from path to path.
 *
 * The option fault-id identifies the faults of a URI; without it the URI's text does. So the two
 * sides in one process need different fault-ids.
 */
#pragma once

#include <glib.h>

/* Which faults happen when. 0: never. */
typedef struct PrFaultPlan {
	guint64 cut_after_messages; /* the N-th control message, either way, cuts the channel */
	guint64 cut_after_reads;    /* the N-th READ is not posted: the path fails */
	guint64 stall_after_reads;  /* READs after the N-th are not answered until shutdown */
	guint64 error_read;	    /* the N-th READ to complete fails, and the path with it */
	guint64 corrupt_read;	    /* flips a bit that the N-th READ to complete has brought */
	guint64 corrupt_reads;	    /* of how many READs from there on; 0: of that one */
	guint64 delay_ms;	    /* delay of each completion */
	/* Not 0, on both sides: the path has incremental grants (transport.h), and registering a
	 * MiB takes so long. */
	guint64 incremental_grants_us;
} PrFaultPlan;

/* Thread-safe. */
typedef struct PrFaults PrFaults;

/* A reference to the faults with this id, which are made with an empty plan if they do not exist.
 * The id goes into a URI as ?fault-id=ID. The other options of that URI become the plan when the
 * URI is first used. */
PrFaults *pr_faults_new(const char *id);
void pr_faults_free(PrFaults *faults);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrFaults, pr_faults_free)

/* Replaces the plan: each fault in it can happen (again). Counters continue. */
void pr_faults_set_plan(PrFaults *faults, const PrFaultPlan *plan);
/* Fails the data paths that are up, at once. */
void pr_faults_cut_paths(PrFaults *faults);
/* The next control message cuts its channel. */
void pr_faults_cut_next_message(PrFaults *faults);
/* On the paths that are up, READs posted from now on are not answered. */
void pr_faults_stall_paths(PrFaults *faults);

typedef struct PrFaultCounts {
	guint64 messages;    /* control messages seen, heartbeats excluded */
	guint64 reads;	     /* post_read() calls on paths that were up */
	guint64 completions; /* READs that succeeded */
	guint64 fired;	     /* cuts, stalls and errors that happened */
	guint64 corrupted;   /* READs with a flipped bit */
	guint64 paths;	     /* data paths opened */
} PrFaultCounts;
PrFaultCounts pr_faults_counts(PrFaults *faults);
