/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A whole engine in one thread, for the targets that talk to it as its peer. All of the engine's own code runs
 * as it is, but where it waits for a message, the rig has one message read; where it waits for a
 * connection or for a human, the rig provides the next one of the input. What is fake: the guest, the transport
 * (so that nothing is read over it), and the fault and pull threads, which have no say in what a peer can send.
 *
 * An input: what the guest fails at, then connections: what the transport fails at, then a script (script.h).
 */
#pragma once

#include "tests/fuzz/reach.h"
#include "tests/fuzz/script.h"

#define FUZZ_URI      "fuzz:host:4444"
#define FUZZ_N_BLOCKS 3

/* What the guest does badly: bits of the input's first byte. */
#define FUZZ_FAIL_PREPARE 0x01
#define FUZZ_FAIL_STOP	  0x02
#define FUZZ_FAIL_SAVE	  0x04
#define FUZZ_FAIL_LOAD	  0x08
#define FUZZ_FAIL_LOADED  0x10
#define FUZZ_FAIL_FAULTS  0x20
#define FUZZ_IS_PAUSED	  0x40
/* What the transport does badly: bits of a connection's first byte. */
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
	/* The owner waits for something to change: makes it so. */
	void (*wait)(struct FuzzEngine *engine);
	GPtrArray *peers; /* Peer: the other ends of the connections */
	gboolean lanes_fail;
	guint n_expected; /* accept()s announced and not ended */
	guint n_paths;

	/* of the guest */
	gboolean stopped, loading, loaded, faulting;
	guint n_runs, n_resumes;
	gboolean handed_over; /* source: RUN may have been sent */
} FuzzEngine;

/* There is one at a time. */
FuzzEngine *fuzz_engine_new(const uint8_t *data, gsize size, PrGuestRole role);
/* Ends it as the program does, and checks what is left. */
void fuzz_engine_free(FuzzEngine *engine);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(FuzzEngine, fuzz_engine_free)

gboolean fuzz_engine_has_next(const FuzzEngine *engine);
/* A socket with the next connection of the input at its other end; NULL: there is none left. */
GSocket *fuzz_engine_next(FuzzEngine *engine);
/* Lets the next connection in, at the listener. FALSE: there is none left. */
gboolean fuzz_engine_knock(FuzzEngine *engine);
extern const PrTransportOps fuzz_transport;
