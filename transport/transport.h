/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Data paths: how pages get from the source's RAM to the destination's. The destination pulls: it
 * posts READs of ranges of a RAM block straight into its own mapping of that block. Backends are
 * ops tables: rdma (libibverbs), ofi (libfabric), tcp (plain sockets), faulty (fault injection
 * around another one).
 *
 * A data path has a bulk lane and one or more urgent lanes. The destination decides how many
 * (wire.h). A lane is used by one thread at a time: each fault thread of the destination has an
 * urgent lane, and the pull thread has the bulk lane. Any thread may call shutdown().
 *
 * Failure: on_failed is called once for a path, from any thread. After that post_read() fails,
 * and every READ that was posted completes with an error. Its reason is always of the domain
 * PR_PATH_ERROR, whatever its cause: the engine pauses on it.
 */
#pragma once

#include <gio/gio.h>
#include <stdint.h>

#include "transport/path-error.h"
#include "transport/uri.h"
#include "transport/net/tls.h"
#include "transport/wire/wire.h"

/* The lanes from PR_LANES_MIN on are urgent lanes, too. */
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

/* Binds the lanes of one connection to its migration (uuid) and epoch. */
typedef struct PrBinding {
	uint8_t uuid[PR_UUID_BYTES];
	uint64_t epoch;
	uint8_t secret[PR_SECRET_BYTES];
} PrBinding;

/* A RAM block as this side has it mapped. */
typedef struct PrRegion {
	void *addr;
	uint64_t size; /* bytes */
	int memfd;     /* what is mapped there; -1: not known. Reading must not fill its holes */
	uint64_t memfd_offset;
} PrRegion;

/* An address range and key that the source allows to be READ over this connection. */
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
/* Destination: a backend is about to write this part of a region itself, so its memory has to be
 * allocated first. FALSE: that failed. */
typedef gboolean (*PrPathAllocate)(uint32_t block, uint64_t offset, uint64_t length, void *opaque);

typedef struct PrTransportOps PrTransportOps;
typedef struct PrDataPath {
	const PrTransportOps *ops;
	/* Constant. Pages that are not granted cannot be read yet, and grants may come while
	 * READs are posted. */
	gboolean incremental_grants;
	guint n_lanes; /* constant */
} PrDataPath;
typedef struct PrDataListener {
	const PrTransportOps *ops;
} PrDataListener;

/* The arguments of connect() and accept(). The regions must outlive the path. */
typedef struct PrPathSetup {
	const PrUri *uri;
	uint16_t data_port; /* connect(): from HELLO_ACK; 0: the URI's own port */
	const PrTls *tls;   /* connect(): for connections to the control port; NULL: plain */
	PrBinding binding;
	const PrRegion *regions;
	guint n_regions;
	guint n_lanes; /* the same on both sides; 0: PR_LANES_MIN */
	guint timeout_ms;
	GCancellable *cancel;
	PrPathFailed on_failed;
	PrPathAllocate allocate; /* NULL: memory need not be allocated first */
	void *allocate_opaque;
	void *opaque;
} PrPathSetup;

struct PrTransportOps {
	const char *scheme; /* as in URIs */
	/* For --help: a line that says what it is, and a line for each option of its URIs. */
	void (*describe)(GString *out);
	/* Sets up what takes long at the first use, once for the process; NULL: nothing does.
	 * Thread-safe. */
	void (*warm_up)(void);

	/* Destination: opens what has to listen beside the control port. */
	PrDataListener *(*listen)(const PrUri *uri, GError **error);
	/* The port of that listener. 0: data connections come in on the control port, and offer()
	 * is called. */
	uint16_t (*listener_port)(PrDataListener *listener);
	/* A connection that came in on the control port with a LANE message. Takes the
	 * connection. One that is not expected is refused and closed. Called from the listener's
	 * thread. */
	void (*offer)(PrDataListener *listener, GSocketConnection *connection,
		      const PrLaneHello *hello);
	void (*listener_close)(PrDataListener *listener);

	/* Destination: lanes with this binding are about to be connected. Called before the
	 * source is told to connect them, because while one accept() waits, lanes that are not
	 * expected are refused. Ends with accept(), or else with forget(). */
	void (*expect)(PrDataListener *listener, const PrBinding *binding);
	void (*forget)(PrDataListener *listener, const PrBinding *binding);
	/* Destination: waits until all lanes with this binding have come in. Other lanes are
	 * refused. Several threads may wait at the same time, for different bindings. */
	PrDataPath *(*accept)(PrDataListener *listener, const PrPathSetup *setup, GError **error);
	/* Source: connects all lanes and serves READs until shutdown. */
	PrDataPath *(*connect)(const PrPathSetup *setup, GError **error);

	/* Source: the grants (PrGrant) for all pages that hold data at the time of the call.
	 * Pages that the guest has touched since connect() may have to be registered first. So
	 * the call may take a while, and may fail the path. Only the grants of a call after the
	 * guest has stopped are complete. */
	GArray *(*grants)(PrDataPath *path);
	/* Destination, before the first READ: the grants that came from the source. */
	void (*set_grants)(PrDataPath *path, const PrGrant *grants, guint n);
	/* Where the path has incremental_grants, else NULL. Source, after the guest has stopped:
	 * appends the grants within a range (on page boundaries) to `ret`, in order. All other
	 * pages of the range are zero. Any thread, but one at a time. */
	void (*grants_within)(PrDataPath *path, uint32_t block, uint64_t offset, uint64_t length,
			      GArray *ret);
	/* Likewise. Destination, after set_grants() and while READs are posted: further grants. */
	void (*add_grants)(PrDataPath *path, const PrGrant *grants, guint n);

	/* Destination. READs `length` bytes (at most PR_READ_MAX, within one block) at `offset`
	 * of block `block` into the same place of our region. At most max_reads() may be
	 * outstanding on a lane; they complete in any order. The request may be sent only by the
	 * next poll() or arm(). FALSE: the path has failed and the READ was not posted. */
	guint (*max_reads)(PrDataPath *path, PrLaneId lane);
	gboolean (*post_read)(PrDataPath *path, PrLaneId lane, uint32_t block, uint64_t offset,
			      uint32_t length, uint64_t token);
	/* Destination, after set_grants(): a READ of no bytes. It completes as any READ does,
	 * when the source's end of the path has answered. Nothing lands in our regions. */
	gboolean (*post_probe)(PrDataPath *path, PrLaneId lane, uint64_t token);
	/* Returns how many completions were stored, 0 if there are none yet. */
	guint (*poll)(PrDataPath *path, PrLaneId lane, PrCompletion *ret, guint max);
	/* To sleep: call arm(). TRUE: poll(2) wait_fd() for POLLIN. FALSE: there may be
	 * completions, call poll(). */
	int (*wait_fd)(PrDataPath *path, PrLaneId lane);
	gboolean (*arm)(PrDataPath *path, PrLaneId lane);

	/* The device that carries the path, by the name that the operator knows ("mlx5_0"); NULL:
	 * it has none. Lives as long as the path. */
	const char *(*device)(PrDataPath *path);

	/* Ends the path: nothing lands in our regions after drain() has returned TRUE. shutdown()
	 * is idempotent, and any thread may call it. It makes wait_fd() readable, and does not
	 * call on_failed. drain() is called when no other thread uses the lanes any more. It
	 * fences the path within the time: outstanding READs are dropped, and their completions
	 * are discarded. */
	void (*shutdown)(PrDataPath *path);
	gboolean (*drain)(PrDataPath *path, guint timeout_ms);
	void (*destroy)(PrDataPath *path);

	/* Called for each message of the control channel of a path to `uri`. FALSE: the channel
	 * is cut there (only the fault injection does that). `outgoing`: this side sends it. */
	gboolean (*admit_message)(const PrUri *uri, gboolean outgoing, uint16_t type);
};

void pr_data_path_destroy(PrDataPath *path);
void pr_data_listener_close(PrDataListener *listener);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrDataPath, pr_data_path_destroy)
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrDataListener, pr_data_listener_close)
