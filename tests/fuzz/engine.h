/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A whole engine in one thread, for the targets that are its peer. The engine's own code runs
 * unchanged. Where it would wait for a message, the test rig reads one. Where it would wait for a
 * connection or for a command of the operator, the rig takes the next one from the input. The guest
 * and the transport are fake, so no page is read. So are the fault and pull threads, which a peer's
 * messages do not reach.
 *
 * An input: a byte with the guest's failures, then connections. A connection is a byte with the
 * transport's failures and a script (script.h).
 */
#pragma once

#include "tests/fuzz/reach.h"
#include "tests/fuzz/script.h"

#define FUZZ_URI      "fuzz:host:4444"
#define FUZZ_N_BLOCKS 3

/* The guest's failures: bits of the input's first byte. */
#define FUZZ_FAIL_PREPARE 0x01
#define FUZZ_FAIL_STOP	  0x02
#define FUZZ_FAIL_SAVE	  0x04
#define FUZZ_FAIL_LOAD	  0x08
#define FUZZ_FAIL_LOADED  0x10
#define FUZZ_FAIL_FAULTS  0x20
#define FUZZ_IS_PAUSED	  0x40
/* The transport's failures: bits of a connection's first byte. */
#define FUZZ_FAIL_LANES 0x01

typedef struct FuzzEngine {
	FuzzInput input;
	uint8_t flaws;
	PrGuestRole role;
	PrParams params;
	PrGuest guest;
	PrMigration *m;
	PrDataListener data;
	PrListener *listener; /* destination */
	/* Called where the engine would wait; makes the awaited change. */
	void (*wait)(struct FuzzEngine *engine);
	GPtrArray *peers; /* Peer: the other ends of the connections */
	gboolean lanes_fail;
	guint n_expected; /* accept() calls that have started and not ended */
	guint n_paths;

	/* the state of the fake guest */
	gboolean stopped, loading, loaded, faulting;
	guint n_runs, n_resumes;
	gboolean handed_over; /* source: RUN may have been sent */
} FuzzEngine;

/* Only one engine can exist at a time. */
FuzzEngine *fuzz_engine_new(const uint8_t *data, gsize size, PrGuestRole role);
/* Ends the engine as the program does, and checks that it leaves nothing behind. */
void fuzz_engine_free(FuzzEngine *engine);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(FuzzEngine, fuzz_engine_free)

gboolean fuzz_engine_has_next(const FuzzEngine *engine);
/* Returns a socket whose peer is the next connection of the input; NULL: the input has no more. */
GSocket *fuzz_engine_next(FuzzEngine *engine);
/* Lets the listener accept the next connection. FALSE: the input has no more. */
gboolean fuzz_engine_accept(FuzzEngine *engine);
extern const PrTransportOps fuzz_transport;
