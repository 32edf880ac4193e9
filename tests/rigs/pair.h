/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Two engines and two test guests in one process: a source, and a destination that listens. */
#pragma once

#include <glib.h>

#include "guest/guest.h"
#include "migration/migration.h"
#include "tests/guest/testguest.h"
#include "transport/faulty/faulty.h"

/* What was told of a path. */
typedef struct PathNews {
	char *uri;
	PrPathState state;
} PathNews;

/* One side. */
typedef struct Side {
	const char *name;
	TestGuest *guest;
	PrGuest *adapter;
	PrParams params;
	PrMigration *engine;

	GMutex lock; /* protects what follows */
	GCond changed;
	PrState state;	/* the last one told */
	GArray *states; /* PrState: all that were told, in order */
	GArray *times;	/* gint64: when, monotonic microseconds */
	GArray *path_news;
} Side;

typedef enum PairSides { PAIR_SOURCE = 1, PAIR_DESTINATION = 2 } PairSides;

typedef struct PairConfig {
	const char *scheme;	   /* "tcp", "ofi" */
	uint64_t size;		   /* bytes of guest RAM */
	uint64_t destination_size; /* 0: the same */
	guint n_blocks;		   /* 0: 2 */
	guint n_threads;	   /* 0: 3 */
	guint pace_us;
	uint64_t bandwidth;  /* of the bulk pull, bytes a second; 0: unlimited */
	const char *more[3]; /* schemes of further listeners */
	guint incremental_grants_us; /* the paths are incremental_grants (transport.h), and each MiB takes so long */
	gboolean paused;   /* the guest does not run; compared byte for byte at the end */
	guint small_pages; /* PairSides with pages of 4 KiB where PAIR_HUGE is in the environment */
	gboolean verify;   /* capability verify, on both sides */
	guint refused_runs;  /* the source's VMM refuses so many times to let its guest run on */
	const char *landing; /* fault-id: the destination's paths are faulty, too */
} PairConfig;

/*
 * For a configuration: the migration goes on for longer than anything that a test does meanwhile
 * takes on a busy machine. The guest's faults aren't throttled, so its threads rest between pages.
 */
#define PAIR_LASTS .size = 64 * MIB, .bandwidth = MIB, .pace_us = 200000

typedef struct Pair {
	Side source, destination;
	PrFaults *faults;  /* of the source's paths */
	char *uri;	   /* of the destination, with the source's faults around it */
	const char *certs; /* directory; NULL: no TLS */
	PrTls *tls;
} Pair;

/* With TLS where the environment has PAIR_TLS; guests of huge pages where it has PAIR_HUGE. */
Pair *pair_new(const PairConfig *config);
void pair_free(Pair *pair);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Pair, pair_free)

/* Ends a side's engine, whatever it is at, and makes another one that knows nothing. */
void side_end_engine(Side *side);
void side_begin_engine(Side *side);
/* The same, for another guest than the side's own: of this spec. */
void side_begin_engine_for(Side *side, const char *spec);

/* migrate, and migrate -r; asserts that they are accepted. */
void pair_migrate(Pair *pair);
void pair_resume(Pair *pair);

/*
 * A wait fails the test case when it has taken a minute, and says what there was instead. The other
 * cases of the program go on; the pair of the failed case lives until the program ends. Only the
 * thread that runs the case may wait: in another thread a failure ends the program.
 */

/* Waits until a side has been told this state as its last. */
void side_wait(Side *side, PrState state);
/* The same of a state that may have passed already. */
void side_wait_told(Side *side, PrState state);
/* Waits for any of the states in the mask (1u << PR_STATE_…); returns which. */
PrState side_wait_any(Side *side, guint mask);
/*
 * Waits until the destination has ended a migration whose guest stays at the source, if it has
 * heard of it at all. One that waits for a RUN that never comes is ended as an operator does it.
 */
void pair_wait_taken_back(Pair *pair);
PrState side_state(Side *side);
/* When a state was told last; it must have been. */
gint64 side_told_at(Side *side, PrState state);
void pair_wait(Pair *pair, PrState both);
/* Waits until both have left postcopy-paused for the n-th time. */
void pair_wait_recovered(Pair *pair, guint64 n);
/* State, round trip of the lanes, bytes and pulls of a path; PR_PATH_N_STATES: it is not known. */
PrPathInfo side_path(Side *side, const char *uri);
/* Fails if the path is in another state, and tells the state of every path then. */
void side_check_path(Side *side, const char *uri, PrPathState state);
void side_wait_path(Side *side, const char *uri, PrPathState state);
/* Waits until the source says that its guest's RAM is write-protected, or is so no more. */
void pair_wait_fenced(Pair *pair, gboolean fenced);
/* Waits until the destination has at least so many bytes in place. */
void pair_wait_received(Pair *pair, uint64_t bytes);
/* Resumes again and again until both have completed; at most `limit` times. */
void pair_resume_until_completed(Pair *pair, guint limit);

/*
 * The guest lives at the destination, all its pages are right, the statistics of both sides agree.
 */
void pair_check_completed(Pair *pair);
/* The guest runs on at the source and is sound. */
void pair_check_undone(Pair *pair);
