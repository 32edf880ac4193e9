/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A guest without a VMM, for tests: RAM blocks in memfds, threads that read, check and rewrite its
 * pages all the time, served to an engine by the agent library. Several live in one process: a
 * source, a destination, each with a socket of its own.
 *
 * What a page holds is a function of seed, block, page number and a version. The versions live in
 * private memory: they are the device state. So a page that arrives late, twice, from the wrong
 * place or not at all is seen by the next thread that reads it, and counted as corrupt.
 *
 * One page in sixteen is never touched (a hole in the memfd) until the guest has been migrated, one
 * in sixteen is written with zeros; threads write zeros now and then, too.
 */
#pragma once

#include <glib.h>
#include <stdint.h>

typedef struct TestGuest TestGuest;

typedef struct TestGuestConfig {
	const char *socket; /* of the agent; NULL: a fresh path in a directory of its own */
	uint64_t size; /* of all blocks together, bytes; rounded up to whole host pages per block */
	gboolean huge_pages; /* of 2 MiB, which the kernel's pool must have */
	guint n_blocks;	     /* named ram0, ram1, … */
	guint n_threads;
	guint32 seed;	    /* 0: 1 */
	gboolean paused;    /* a source that does not run: compare byte for byte */
	guint pace_us;	    /* each thread rests so long after every 16 pages; 0: flat out */
	guint refused_runs; /* the VMM refuses so many times to let the guest run */
	guint load_touches; /* loading the device state reads so many pages, as a VMM's does */
} TestGuestConfig;

/* Maps the blocks and serves the socket. The guest does not run yet. */
TestGuest *testguest_new(const TestGuestConfig *config, GError **error);
/* Ends the threads, also when they wait for pages. */
void testguest_free(TestGuest *guest);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(TestGuest, testguest_free)

/* Fills memory, and runs unless the configuration says paused. Without it, the guest is an incoming
 * one: empty, until an engine loads it. */
void testguest_start(TestGuest *guest);

const char *testguest_socket(TestGuest *guest);
/* "agent:SOCKET", for pr_guest_open(). */
const char *testguest_spec(TestGuest *guest);

/* Parks all threads between two pages. FALSE: some did not get there within timeout_ms (they wait
 * for pages); the guest runs on. */
gboolean testguest_pause(TestGuest *guest, guint timeout_ms);
void testguest_resume(TestGuest *guest);
gboolean testguest_running(TestGuest *guest);
/* How often the VMM has refused to let it run. */
guint testguest_refused_runs(TestGuest *guest);
/* Has an engine loaded the device state? */
gboolean testguest_loaded(TestGuest *guest);

/* Checks every page through the guest's own mapping, with the guest paused meanwhile. *ret_corrupt
 * counts the wrong ones. FALSE: it could not be paused. */
gboolean testguest_verify(TestGuest *guest, guint64 *ret_corrupt);
/* Compares the memfds of two paused guests byte for byte; the first difference is described in
 * *ret_difference. */
gboolean testguest_equal(TestGuest *a, TestGuest *b, char **ret_difference);

/* Pages read and found right, found wrong, and rewritten, since the start of this instance. */
guint64 testguest_verified(TestGuest *guest);
guint64 testguest_corrupt(TestGuest *guest);
guint64 testguest_written(TestGuest *guest);

guint testguest_n_blocks(TestGuest *guest);
uint64_t testguest_block_size(TestGuest *guest);
/* The guest's own mapping: reading it may fault, and wait. */
void *testguest_block_map(TestGuest *guest, guint block);
int testguest_block_memfd(TestGuest *guest, guint block);
