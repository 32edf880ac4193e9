/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * One side of a data path, as a test drives it: its memory, its path, and the commands on them.
 *
 * The memory is BLOCKS memfds of BLOCK_BYTES each. The value of each word follows from its block,
 * its offset and a seed, so that both sides can verify it without the other.
 */
#pragma once

#include "transport/rdma/path.h"

#define BLOCKS	    2
#define BLOCK_BYTES (64ull * 1024 * 1024)
#define PULL_BYTES  (BLOCK_BYTES / 4) /* READs that go round and round stay within these */
#define READ_MS	    10000	      /* limit for one READ, and for the end of a path */

/* A page that anybody may write. It shows that an operation works which is refused elsewhere. */
typedef struct AttackPage {
	uint64_t *page;
	struct ibv_mr *mr;
} AttackPage;

/* One lane, kept full of READs by a thread of its own. */
typedef struct Puller {
	struct Side *side;
	PrLaneId lane;
	guint length;
	guint posted;	  /* the thread's, until it is joined */
	guint ok, failed; /* atomic */
	GThread *thread;
} Puller;

/* All fields belong to the main thread, but for those under the lock. */
typedef struct Side {
	gboolean source;
	PrUri *uri; /* NULL: no side has begun */
	const PrTransportOps *ops;
	PrDataListener *listener; /* of a destination */
	PrDataPath *path;
	PrRegion regions[BLOCKS];
	guint n_lanes; /* of the next path; 0: the default number */
	Puller pullers[PR_LANES_MAX];
	AttackPage open_page;

	GMutex lock;
	GCond changed;
	char *reason;	  /* of the path's failure; under lock */
	gint64 failed_at; /* real time, microseconds; under lock */
	guint n_failures; /* under lock */
} Side;

typedef enum Needs {
	NEEDS_NOTHING,
	NEEDS_SIDE,
	NEEDS_PATH,
} Needs;

/* Appends the answer to *ret. words[0] is the command's name. */
typedef gboolean (*Action)(Side *side, char **words, GString *ret, GError **error);

typedef struct Command {
	const char *name; /* NULL ends a table */
	guint n_words;	  /* the least number of arguments */
	Needs needs;
	Action action;
} Command;

extern const Command side_commands[];
extern const Command path_commands[];
extern const Command read_commands[];
extern const Command pull_commands[];
extern const Command attack_commands[];

/* Sets the error; returns FALSE. */
gboolean fail(GError **error, const char *text);
uint64_t parse_number(const char *word);

/* Closes the path, frees the memory. Does nothing without a side. */
void side_end(Side *side);
uint64_t *side_address(Side *side, guint block, uint64_t offset);
/* Fails unless each word of a range has the value that "fill" writes with this seed. */
gboolean side_verify(Side *side, guint block, uint64_t start, uint64_t end, uint64_t seed,
		     GError **error);

/* Does nothing without a page. To be called before the path ends. */
void attack_free_page(AttackPage *page);

/* Waits for completions on a lane, for READ_MS. Returns their number; 0 after that time. */
guint side_await(Side *side, PrLaneId lane, PrCompletion *ret, guint max);
/* Sets the error after a READ has failed, with the path's own reason; returns FALSE. */
gboolean side_fail_read(Side *side, GError **error);
