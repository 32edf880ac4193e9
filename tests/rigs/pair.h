/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Two engines and two test guests in one process: a source, and a destination that listens. */
#pragma once

#include <glib.h>

#include "guest/guest.h"
#include "migration/migration.h"
#include "tests/guest/testguest.h"
#include "transport/faulty/faulty.h"

/* A state of a path that the engine reported. */
typedef struct PathEvent {
	char *uri;
	PrPathState state;
} PathEvent;

/* The engine and the guest of one side. */
typedef struct Side {
	const char *name;
	TestGuest *guest;
	PrGuest *adapter;
	PrParams params;
	PrMigration *engine;

	GMutex lock; /* protects what follows */
	GCond changed;
	PrState state;	/* the last reported state */
	GArray *states; /* PrState: all reported states, in order */
	GArray *times;	/* gint64: the times of these reports, monotonic microseconds */
	GArray *path_events;
} Side;

typedef enum PairSides { PAIR_SOURCE = 1, PAIR_DESTINATION = 2 } PairSides;

typedef struct PairConfig {
	const char *scheme;	   /* "tcp", "ofi" */
	uint64_t size;		   /* guest RAM, bytes */
	uint64_t destination_size; /* guest RAM of the destination, bytes; 0: `size` */
	guint n_blocks;		   /* RAM blocks; 0: two */
	guint n_threads;	   /* threads of the guest; 0: three */
	guint pace_us;
	uint64_t bandwidth;	     /* limit of the bulk pull, bytes a second; 0: unlimited */
	const char *more[3];	     /* schemes of additional listeners */
	guint incremental_grants_us; /* us a MiB; not 0: incremental grants (transport.h) */
	gboolean paused;     /* the guest does not run, so tests can compare it byte for byte */
	guint small_pages;   /* PairSides that use 4 KiB pages even with PAIR_HUGE */
	gboolean verify;     /* capability verify on both sides */
	guint refused_runs;  /* how often the source's VMM refuses to resume its guest */
	const char *landing; /* fault ID for the destination's paths; NULL: no faults */
} PairConfig;

/*
 * Part of a configuration. The migration takes longer than any step of a test on a busy machine.
 * Faults of the guest are not throttled, so its threads sleep between pages.
 */
#define PAIR_LASTS .size = 64 * MIB, .bandwidth = MIB, .pace_us = 200000

typedef struct Pair {
	Side source, destination;
	PrFaults *faults;  /* fault injection of the source's paths */
	char *uri;	   /* the destination's, with the source's fault injection */
	const char *certs; /* directory of certificates; NULL: no TLS */
	PrTls *tls;
} Pair;

/* The pair uses TLS if the environment has PAIR_TLS, and huge pages if it has PAIR_HUGE. */
Pair *pair_new(const PairConfig *config);
void pair_free(Pair *pair);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Pair, pair_free)

/*
 * side_end_engine() ends a side's engine in any state. side_begin_engine() then makes a new engine,
 * which knows nothing of the migration.
 */
void side_end_engine(Side *side);
void side_begin_engine(Side *side);
/* The same with another guest, given by its spec. */
void side_begin_engine_for(Side *side, const char *spec);

/* Give the commands `migrate` and `migrate -r`, and assert that they are accepted. */
void pair_migrate(Pair *pair);
void pair_resume(Pair *pair);

/*
 * Each wait fails the test case after a minute, and prints the actual state. The other cases of the
 * program go on. The pair of the failed case lives until the program ends. Only the thread of the
 * test case may call a wait: in another thread a failure ends the program.
 */

/* Waits until this is the last state that the side has reported. */
void side_wait(Side *side, PrState state);
/* Waits until the side has reported this state, which may have passed already. */
void side_wait_reported(Side *side, PrState state);
/* Waits for any of the states in the mask (1u << PR_STATE_…). Returns the state. */
PrState side_wait_any(Side *side, guint mask);
/*
 * Waits until the destination has ended a migration whose guest stays at the source, if it has
 * started one at all. A destination that waits for a RUN that never comes is cancelled, as an
 * operator would do it.
 */
void pair_wait_taken_back(Pair *pair);
PrState side_state(Side *side);
/* Returns when the side last reported this state. Fails if it never did. */
gint64 side_reported_at(Side *side, PrState state);
void pair_wait(Pair *pair, PrState both);
/* Waits until both sides have left postcopy-paused for the n-th time. */
void pair_wait_recovered(Pair *pair, guint64 n);
/*
 * Returns state, round trip of the lanes, bytes and pulls of a path. State PR_PATH_N_STATES: the
 * side does not know the path.
 */
PrPathInfo side_path(Side *side, const char *uri);
/* Fails if the path is in another state, and prints the states of all paths. */
void side_check_path(Side *side, const char *uri, PrPathState state);
void side_wait_path(Side *side, const char *uri, PrPathState state);
/* Waits until the source reports that its guest's RAM is write-protected, or no longer is. */
void pair_wait_fenced(Pair *pair, gboolean fenced);
/* Waits until the destination has received at least so many bytes. */
void pair_wait_received(Pair *pair, uint64_t bytes);
/* Resumes until both sides have completed. Fails after `limit` recoveries. */
void pair_resume_until_completed(Pair *pair, guint limit);

/*
 * Checks that the guest runs at the destination, that all its pages are correct, and that the
 * statistics of both sides agree.
 */
void pair_check_completed(Pair *pair);
/* Checks that the guest runs at the source and that its pages are correct. */
void pair_check_undone(Pair *pair);
