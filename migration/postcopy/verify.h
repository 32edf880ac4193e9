/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Verified pages: what has been read is placed only once it has the hash of what the source has. Theory in verify.c. */
#pragma once

#include "migration/memory/ram.h"

#define PR_VERIFY_STRIKES 3 /* so often may a page come in wrong, one time after the other */

typedef struct PrVerify PrVerify;

typedef struct PrVerifyStats {
	uint64_t pages;	  /* that were right */
	uint64_t corrupt; /* pages that came in wrong, each time counted */
} PrVerifyStats;

/* A page that came in wrong. */
typedef struct PrCorrupt {
	guint block;
	uint64_t page;
	guint stripe;  /* by which it came (pull.h); 0: the path in use */
	guint strikes; /* how often, one time after the other */
} PrCorrupt;

/* All of them from the verify thread; ask() and complete() never without a connection attached. */
typedef struct PrVerifyHooks {
	/* Asks the source for the hashes of n ranges of one block. */
	void (*ask)(guint block, const PrWireRange *ranges, guint n, void *opaque);
	/* Pages that faults may wait for are in place, or may be read again. */
	void (*settled)(void *opaque);
	/* The last page has come in; any number of times. */
	void (*complete)(void *opaque);
	/* With PR_VERIFY_STRIKES the path is not to be used any more. */
	void (*corrupt)(const PrCorrupt *corrupt, void *opaque);
	/* The guest or the kernel failed us. */
	void (*broken)(const GError *error, void *opaque);
	void *opaque;
} PrVerifyHooks;

/* XXH3, 64 bits. */
uint64_t pr_verify_hash(const void *data, gsize length);

/* Starts the thread; ram outlives it. NULL: there is none to be had. */
PrVerify *pr_verify_start(PrRam *ram, int uffd, const PrVerifyHooks *hooks, GError **error);
/* There is a connection to ask over. */
void pr_verify_attach(PrVerify *verify);
/* There is none any more, and nothing uses it when this returns; it was shut down before. What was read is kept, and asked
 * for again. */
void pr_verify_detach(PrVerify *verify);
/* Ends the thread; afterwards pages may still land, in vain. */
void pr_verify_stop(PrVerify *verify);
void pr_verify_free(PrVerify *verify);
void pr_verify_stats(PrVerify *verify, PrVerifyStats *ret);

/* The lanes' threads. A READ with this token was posted. */
void pr_verify_want(PrVerify *verify, uint64_t token, gboolean urgent);
/* Its data is here. The claim is the verify thread's from now on. */
void pr_verify_landed(PrVerify *verify, uint64_t token, guint stripe);
/* Its data is not going to come. */
void pr_verify_drop(PrVerify *verify, uint64_t token);
/* FALSE: so much waits for hashes already that no more is to be read in bulk now. */
gboolean pr_verify_has_room(PrVerify *verify);
/* Appends the tokens of what has landed: claims that live on. */
void pr_verify_add_landed(PrVerify *verify, GArray *tokens);

/* From any thread; does not wait. The source's answer. Ranges that nobody asked for are ignored. */
void pr_verify_answer(PrVerify *verify, const PrHashes *hashes);
