/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Verified pages: a page that was read is placed only if it has the hash of the source's page.
 * Theory in verify.c. */
#pragma once

#include "migration/memory/ram.h"

#define PR_VERIFY_STRIKES 3 /* so many times in a row a page may be corrupt before its path fails */

typedef struct PrVerify PrVerify;

typedef struct PrVerifyStats {
	uint64_t pages;	  /* that had the right hash */
	uint64_t corrupt; /* that had a wrong one; a page counts each time */
} PrVerifyStats;

/* A page whose data had the wrong hash. */
typedef struct PrCorrupt {
	guint block;
	uint64_t page;
	guint rail;    /* that carried it (pull.h); 0: the path in use */
	guint strikes; /* how many times in a row */
} PrCorrupt;

/* Called by the verify thread; request_hashes() and complete() only while a connection is
 * attached. */
typedef struct PrVerifyHooks {
	/* Requests the hashes of n ranges of one block from the source. */
	void (*request_hashes)(guint block, const PrWireRange *ranges, guint n, void *opaque);
	/* Pages that faults may wait for are placed, or may be claimed again. */
	void (*unblocked)(void *opaque);
	/* Every page is received; called any number of times. */
	void (*complete)(void *opaque);
	/* With PR_VERIFY_STRIKES strikes the path must not be used any more. */
	void (*corrupt)(const PrCorrupt *corrupt, void *opaque);
	/* The guest's process or the kernel failed. */
	void (*broken)(const GError *error, void *opaque);
	void *opaque;
} PrVerifyHooks;

/* XXH3, 64 bits. */
uint64_t pr_verify_hash(const void *data, gsize length);

/* Starts the thread; ram outlives it. NULL: no thread could be started. */
PrVerify *pr_verify_start(PrRam *ram, int uffd, const PrVerifyHooks *hooks, GError **error);
/* Hashes can be requested from now on. */
void pr_verify_attach(PrVerify *verify);
/* The connection, which was shut down before, is not used any more when this returns. Landed data
 * is kept, and its hashes are requested again after the next attach. */
void pr_verify_detach(PrVerify *verify);
/* Ends the thread. READs may still land; their pages are not placed any more. */
void pr_verify_stop(PrVerify *verify);
void pr_verify_free(PrVerify *verify);
void pr_verify_stats(PrVerify *verify, PrVerifyStats *ret);

/* From the threads of the lanes. A READ with this token was posted. */
void pr_verify_posted(PrVerify *verify, uint64_t token, gboolean urgent);
/* The READ has landed over this rail; 0: the path in use. The claim is the verify thread's from now
 * on. */
void pr_verify_landed(PrVerify *verify, uint64_t token, guint rail);
/* The READ was lost, and its path is fenced. */
void pr_verify_drop(PrVerify *verify, uint64_t token);
/* FALSE: too much data waits for hashes; bulk READs have to pause. */
gboolean pr_verify_has_room(PrVerify *verify);
/* Appends the tokens of the READs that have landed. Their claims must not be ended. */
void pr_verify_add_landed(PrVerify *verify, GArray *tokens);

/* The source's answer; from any thread, without waiting. Ranges whose hashes were not requested are
 * ignored. */
void pr_verify_answer(PrVerify *verify, const PrHashes *hashes);
