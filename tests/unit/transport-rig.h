/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Both sides of one data path in one process, or the source in a process of its own, over
 * loopback. The rig stands in for the engine: it has the control port's listener and both sides'
 * memory.
 *
 * Nothing but RDMA devices carry rdma:, so its address must be given: that of such a device of
 * this host.
 */
#pragma once

#include <gio/gio.h>

#include "transport/transport.h"

#define RIG_REGIONS	 2
#define RIG_LANES	 3 /* one more than there always are */
#define RIG_REGION_BYTES (8u * 1024 * 1024)
#define RIG_TIMEOUT_MS	 10000 /* for what must succeed */

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
/* The address to test a scheme at; NULL: it cannot be tested here. */
const char *rig_host(const char *scheme);
gboolean rig_is_rdma(const char *scheme);

/* `options` follow the address in the URI: "" or "?KEY=VALUE". */
Rig *rig_new(const char *scheme, const char *options);
void rig_free(Rig *rig);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Rig, rig_free)

PrPathSetup rig_setup(Rig *rig, RigSide *side);
/* Connects the source of a rig, by itself; a GThreadFunc. */
gpointer rig_source_thread(gpointer rig);
/* Gives the source its memory, where rig_connect() is not used. */
void rig_fill_source(Rig *rig);
/* Waits until a lane has come to the listener, with nobody in accept(). */
void rig_await_backlog(Rig *rig);
/* Connects both sides; the grants are handed over. */
void rig_connect(Rig *rig);
/* As above, with the source in another process. */
void rig_connect_child(Rig *rig);
void rig_kill_child(Rig *rig);
/* What a test program's main() calls first: runs the source of rig_connect_child() where it is
 * one. */
void rig_main_source(int argc, char **argv);

/* The byte that belongs at an offset of a block. */
uint8_t rig_byte(guint block, uint64_t offset);
void rig_assert_read(Rig *rig, guint block, uint64_t offset, uint32_t length);

/* Waits for completions; fails the test when none comes in time. */
guint rig_await(Rig *rig, PrLaneId lane, PrCompletion *ret, guint max);
/* One READ, there and back. */
gboolean rig_read(Rig *rig, PrLaneId lane, guint block, uint64_t offset, uint32_t length);
/* Posts n READs of `length` bytes, one after the other in block 0; tokens from 0. */
void rig_post(Rig *rig, PrLaneId lane, guint n, uint32_t length);
/* Waits for n completions with tokens 0..n-1, each once; returns how many were ok. */
guint rig_await_all(Rig *rig, PrLaneId lane, guint n);
/* Waits until the side's on_failed was called. */
void rig_await_failure(RigSide *side);
