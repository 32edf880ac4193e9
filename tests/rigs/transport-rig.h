/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Both sides of one data path in one process, or the source in a process of its own, over
 * loopback. The rig stands in for the engine: it has the listener of the control port and the
 * memory of both sides.
 *
 * Only an RDMA device carries rdma:, so the tests are given the address of a device of this host.
 */
#pragma once

#include <gio/gio.h>

#include "transport/transport.h"

#define RIG_REGIONS	 2
#define RIG_LANES	 3 /* one more than PR_LANES_MIN */
#define RIG_REGION_BYTES (8u * 1024 * 1024)
#define RIG_TIMEOUT_MS	 10000 /* for steps that must succeed */

typedef struct RigSide {
	PrRegion regions[RIG_REGIONS];
	PrDataPath *path;
	gint n_failures; /* on_failed calls; atomic */
	char *reason;	 /* of the first one; read after n_failures has become 1 */
} RigSide;

typedef struct Rig {
	const PrTransportOps *ops;
	PrUri *uri;
	PrDataListener *listener;
	PrBinding binding;
	RigSide source, destination;
	GPid child; /* a source in another process; 0: none */
	/* stands in for the control port */
	GSocketListener *control;
	GCancellable *stop;
	GThread *control_thread;
	gint n_offered; /* lanes that came in on the control port; atomic */
} Rig;

#define RIG_RDMA_VARIABLE "POSTROAD_TEST_RDMA"
/* The address at which to test a scheme; NULL: it cannot be tested here. */
const char *rig_host(const char *scheme);
gboolean rig_is_rdma(const char *scheme);

/* `options` follow the address in the URI: "" or "?KEY=VALUE". */
Rig *rig_new(const char *scheme, const char *options);
void rig_free(Rig *rig);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Rig, rig_free)

PrPathSetup rig_setup(Rig *rig, RigSide *side);
/* Connects the rig's source; a GThreadFunc. */
gpointer rig_source_thread(gpointer rig);
/* Fills the source's memory; rig_connect() calls it as well. */
void rig_fill_source(Rig *rig);
/* Waits until a lane waits at the listener, while no accept() runs. */
void rig_await_backlog(Rig *rig);
/* Connects to the port of the data lanes, sends `bytes` and keeps the connection open. */
GSocketConnection *rig_connect_and_send(Rig *rig, const char *bytes);
/* Whether g_thread_try_new() fails from now on, as it does when the system has no threads left. */
void rig_refuse_threads(gboolean refuse);
/* Connects both sides and gives the source's grants to the destination. */
void rig_connect(Rig *rig);
/* As above, with the source in another process. */
void rig_connect_child(Rig *rig);
void rig_kill_child(Rig *rig);
/*
 * main() of a test program calls this first. In the process that rig_connect_child() starts, it
 * runs the source and does not return.
 */
void rig_main_source(int argc, char **argv);

/* The byte that belongs at an offset of a block. */
uint8_t rig_byte(guint block, uint64_t offset);
void rig_assert_read(Rig *rig, guint block, uint64_t offset, uint32_t length);

/* Waits for completions; fails the test when none comes in time. */
guint rig_await(Rig *rig, PrLaneId lane, PrCompletion *ret, guint max);
/* Posts one READ and waits for it. */
gboolean rig_read(Rig *rig, PrLaneId lane, guint block, uint64_t offset, uint32_t length);
/* Posts n READs of `length` bytes, one after the other in block 0; tokens from 0. */
void rig_post(Rig *rig, PrLaneId lane, guint n, uint32_t length);
/* Waits for n completions with tokens 0..n-1, each once; returns how many were ok. */
guint rig_await_all(Rig *rig, PrLaneId lane, guint n);
/* Waits until the side's on_failed was called. */
void rig_await_failure(RigSide *side);
