/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Data paths: how pages get from the source's RAM to the destination's. The destination pulls: it
 * posts READs of ranges of a RAM block straight into its own mapping of that block. Backends are
 * ops tables: rdma (libibverbs), ofi (libfabric), tcp (plain sockets), faulty (fault injection around
 * another one).
 *
 * A data path has a bulk lane and one or more urgent ones; how many is a property of the path, which the
 * destination decides (wire.h). A lane is used by one thread at a time: the destination's fault threads
 * own an urgent one each, its pull thread the bulk one. shutdown() may be called by anyone.
 *
 * Failure: one `on_failed` call per path, from any thread, with the reason in words; after that,
 * post_read() fails and every READ that was posted completes with an error. A failure of the path is
 * always a GError of the domain PR_PATH_ERROR, whatever its cause: the engine pauses on it.
 */
#pragma once

#include <gio/gio.h>
#include <stdint.h>

#include "transport/path-error.h"
#include "transport/uri.h"
#include "transport/net/tls.h"
#include "transport/wire/wire.h"

/* The lanes from PR_LANES_MIN on are urgent, too. */
typedef enum PrLaneId { PR_LANE_URGENT, PR_LANE_BULK, PR_LANES_MIN } PrLaneId;
#define PR_URGENT_LANES_MAX 8
#define PR_LANES_MAX	    (PR_URGENT_LANES_MAX + 1)

static inline gboolean pr_lane_is_urgent(PrLaneId lane)
{
	return lane != PR_LANE_BULK;
}

/* The n-th urgent lane, from 0. */
static inline PrLaneId pr_lane_urgent(guint n)
{
	return n == 0 ? PR_LANE_URGENT : (PrLaneId)(n + 1);
}

/* Binds a connection to one incarnation of one migration. */
typedef struct PrBinding {
	uint8_t uuid[PR_UUID_BYTES];
	uint64_t epoch;
	uint8_t secret[PR_SECRET_BYTES];
} PrBinding;

/* A RAM block as this side has it mapped. */
typedef struct PrRegion {
	void *addr;
	uint64_t size; /* bytes */
	int memfd;     /* what is mapped there, -1: not known; its holes are not to be filled */
	uint64_t memfd_offset;
} PrRegion;

/* What a READ may touch, as the source grants it for this connection. */
typedef struct PrGrant {
	uint32_t block;
	uint64_t offset, length; /* bytes within the block */
	uint64_t addr, key;
} PrGrant;

typedef struct PrCompletion {
	uint64_t token; /* as given to post_read() */
	gboolean ok;	/* the bytes are in place */
} PrCompletion;

#define PR_READ_MAX (1024 * 1024) /* longest READ, bytes */

typedef void (*PrPathFailed)(const GError *reason, void *opaque);
/* Destination: this part of a region is about to get its memory otherwise than by a READ. FALSE: it can't have it. */
typedef gboolean (*PrPathAllocate)(uint32_t block, uint64_t offset, uint64_t length, void *opaque);

typedef struct PrTransportOps PrTransportOps;
typedef struct PrDataPath {
	const PrTransportOps *ops;
	gboolean
		incremental_grants; /* constant: what is not granted cannot be read, and grants may come beside READs */
	guint n_lanes; /* constant */
} PrDataPath;
typedef struct PrDataListener {
	const PrTransportOps *ops;
} PrDataListener;

/* What connect() and accept() need to know. regions must outlive the path. */
typedef struct PrPathSetup {
	const PrUri *uri;
	uint16_t data_port; /* connect(): from HELLO_ACK; 0: the URI's own port */
	const PrTls *tls;   /* connect(): of connections to the control port; NULL: plain */
	PrBinding binding;
	const PrRegion *regions;
	guint n_regions;
	guint n_lanes; /* the same on both sides; 0: PR_LANES_MIN */
	guint timeout_ms;
	GCancellable *cancel;
	PrPathFailed on_failed;
	PrPathAllocate allocate; /* NULL: nothing is to be done */
	void *allocate_opaque;
	void *opaque;
} PrPathSetup;

struct PrTransportOps {
	const char *scheme; /* as in URIs */
	/* For --help: what it is, in one line, and a line for each option of its URIs. */
	void (*describe)(GString *out);
	/* Does what takes long at the first use, once for the process; NULL: nothing does. Thread-safe. */
	void (*warm_up)(void);

	/* Destination: opens what has to listen beside the control port, and says on which port (0:
	 * data connections come in on the control port and are handed over by offer()). */
	PrDataListener *(*listen)(const PrUri *uri, GError **error);
	uint16_t (*listener_port)(PrDataListener *listener);
	/* A connection that came in on the control port with a LANE message. Takes the connection; one
	 * that nobody waits for is refused and closed. Called from the listener's thread. */
	void (*offer)(PrDataListener *listener, GSocketConnection *connection,
		      const PrLaneHello *hello);
	void (*listener_close)(PrDataListener *listener);

	/* Destination: lanes with this binding are about to be connected. Said before the source is told
	 * to connect them, because while one accept() waits, what no accept() expects is refused. Ends
	 * with accept(), or else with forget(). */
	void (*expect)(PrDataListener *listener, const PrBinding *binding);
	void (*forget)(PrDataListener *listener, const PrBinding *binding);
	/* Destination: waits until all lanes with this binding are there. Others are refused. Several
	 * threads may wait at the same time, for different bindings. */
	PrDataPath *(*accept)(PrDataListener *listener, const PrPathSetup *setup, GError **error);
	/* Source: connects all lanes and serves READs until shutdown. */
	PrDataPath *(*connect)(const PrPathSetup *setup, GError **error);

	/* Source: what to grant (PrGrant): all that holds data at the time of the call. What the guest has
	 * touched since connect() may have to be registered first, so this may take a while and may fail
	 * the path; what counts is the answer after the guest has stopped. Destination: what was
	 * granted, before the first READ. */
	GArray *(*grants)(PrDataPath *path);
	void (*set_grants)(PrDataPath *path, const PrGrant *grants, guint n);
	/* Where the path is incremental_grants, else NULL. Source, after the guest has stopped: the same for a range (on page
	 * boundaries), appended to `ret`, in order; all else in it is zero. By any thread, by one at a time. Destination,
	 * after set_grants() and beside READs: more of them. */
	void (*grants_within)(PrDataPath *path, uint32_t block, uint64_t offset, uint64_t length,
			      GArray *ret);
	void (*add_grants)(PrDataPath *path, const PrGrant *grants, guint n);

	/* Destination. READs `length` bytes (at most PR_READ_MAX, within one block) at `offset` of
	 * block `block` into the same place of our region. At most max_reads() may be outstanding
	 * on a lane; they complete in any order. It may leave with the next poll() or arm(). FALSE: the path has failed and the READ was not
	 * posted. */
	guint (*max_reads)(PrDataPath *path, PrLaneId lane);
	gboolean (*post_read)(PrDataPath *path, PrLaneId lane, uint32_t block, uint64_t offset,
			      uint32_t length, uint64_t token);
	/* Destination, after set_grants(): a READ of nothing. It completes as any READ does, when the
	 * source's end of the path has answered; nothing lands in our regions. */
	gboolean (*post_probe)(PrDataPath *path, PrLaneId lane, uint64_t token);
	/* Returns how many completions were stored, 0 if there are none yet. */
	guint (*poll)(PrDataPath *path, PrLaneId lane, PrCompletion *ret, guint max);
	/* To sleep: arm(), and if it returns TRUE poll(2) for POLLIN on wait_fd(); if FALSE, poll again. */
	int (*wait_fd)(PrDataPath *path, PrLaneId lane);
	gboolean (*arm)(PrDataPath *path, PrLaneId lane);

	/* What carries the path, in the operator's words ("mlx5_0"); NULL: nothing worth a name. Lives as
	 * long as the path. */
	const char *(*device)(PrDataPath *path);

	/* Ends the path: nothing lands in our regions after drain() has returned TRUE. shutdown() is
	 * idempotent and callable from any thread; it makes wait_fd readable and does not call
	 * on_failed. drain() is called when no other thread uses the lanes any more: it fences the
	 * path (outstanding READs are dropped; their completions are discarded), within the time. */
	void (*shutdown)(PrDataPath *path);
	gboolean (*drain)(PrDataPath *path, guint timeout_ms);
	void (*destroy)(PrDataPath *path);

	/* Sees each message of the control channel that goes with a path to `uri`; FALSE cuts the
	 * channel there instead (only the fault injection does). `outgoing` is from our side. */
	gboolean (*admit_message)(const PrUri *uri, gboolean outgoing, uint16_t type);
};

void pr_data_path_destroy(PrDataPath *path);
void pr_data_listener_close(PrDataListener *listener);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrDataPath, pr_data_path_destroy)
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrDataListener, pr_data_listener_close)
