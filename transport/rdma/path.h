/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The parts of the rdma: backend among themselves. The why is in rdma.c; the files:
 * options.c (what a URI may say), device.c (a device, and what is wrong with it),
 * connect.c (rdma_cm's conversation), lane.c (a queue pair and its completions),
 * export.c and import.c (memory at the source and at the destination), events.c (the
 * thread that watches a path), listener.c.
 */
#pragma once

#include <infiniband/verbs.h>
#include <rdma/rdma_cma.h>

#include "transport/backend.h"

#define PR_VERBS_DEPTH_MAX  128 /* READs outstanding on a lane */
#define PR_VERBS_PROBES_MAX 4	/* probes outstanding on a lane, beside READs */
#define PR_VERBS_SLOTS	    (PR_VERBS_DEPTH_MAX + PR_VERBS_PROBES_MAX)

/* Read from a URI; constant. */
typedef struct PrVerbsOptions {
	const char *device;  /* the URI's, or NULL: whichever has the address */
	uint8_t ack_timeout; /* 4.096 us * 2^n */
	uint8_t retry
		[PR_LANES_MIN]; /* by pr_verbs_kind(); at most 6: soft-RoCE takes 7 for "for ever" */
	uint8_t rnr_retry;
	uint8_t rnr_timer;	   /* a code, not a time: see ibv_modify_qp(3) */
	uint8_t depth;		   /* READs outstanding on a lane; ORD and IRD */
	uint8_t tos[PR_LANES_MIN]; /* likewise */
	guint connect_timeout_ms;  /* of the first attempt to connect a lane */
	guint read_deadline_ms;	   /* for READs on the urgent lane, 0: none */
} PrVerbsOptions;

/* What the options of a lane are: all urgent ones have the same. */
static inline PrLaneId pr_verbs_kind(PrLaneId lane)
{
	return pr_lane_is_urgent(lane) ? PR_LANE_URGENT : PR_LANE_BULK;
}

/* Also checks that there are no others. */
gboolean pr_verbs_parse_options(const PrUri *uri, PrVerbsOptions *ret, GError **error);

void pr_verbs_describe(GString *out);

/*
 * A device as one path uses it: opened for this path alone, so that each path hears its own
 * asynchronous events.
 */
typedef struct PrVerbsDevice {
	struct ibv_context *context; /* NULL: not open */
	struct ibv_pd *pd;
	struct ibv_device_attr caps;
	uint8_t port;
} PrVerbsDevice;

/* Opens the device that rdma_cm has chosen for an id. */
gboolean pr_verbs_device_open(PrVerbsDevice *rail, struct rdma_cm_id *id, const PrUri *uri,
			      const PrVerbsOptions *options, GError **error);
void pr_verbs_device_close(PrVerbsDevice *rail);
const char *pr_verbs_device_name(const PrVerbsDevice *rail);
/* Sets a PR_PATH_ERROR_CONNECT that says what to do about it; returns FALSE. */
gboolean pr_verbs_error(const PrUri *uri, const char *what, int number, GError **error);
/* Whether `bytes` more may be pinned. The error names the number needed. */
gboolean pr_verbs_check_memlock(uint64_t bytes, GError **error);
struct rdma_event_channel *pr_verbs_open_channel(const PrUri *uri, GError **error);
gboolean pr_verbs_set_nonblocking(int fd);

/* An event of rdma_cm, acknowledged already. */
typedef struct PrVerbsEvent {
	enum rdma_cm_event_type type;
	int status;
	struct rdma_cm_id *id;
	uint8_t depth; /* of CONNECT_REQUEST, CONNECT_RESPONSE: READs that the peer can answer */
	uint8_t data[256]; /* private data of CONNECT_REQUEST, REJECTED */
	gsize n_data;
} PrVerbsEvent;

/* FALSE: there is none. */
gboolean pr_verbs_next_event(struct rdma_event_channel *channel, PrVerbsEvent *ret);

typedef struct PrVerbsSlot {
	uint64_t token;
	guint n_wrs;
	gboolean busy, failed, probe;
	struct ibv_mr *mr; /* of this READ alone, or NULL */
} PrVerbsSlot;

/* Owned by the thread that uses the lane; wake: anyone. */
typedef struct PrVerbsLane {
	PrLaneId id;
	struct rdma_cm_id *cm;
	struct ibv_comp_channel *channel;
	struct ibv_cq *cq;
	struct ibv_qp *qp; /* moved to the error state, and destroyed, under the path's qp_lock */
	union ibv_gid gid; /* ours, constant once connected, as are the next two */
	uint8_t gid_index;
	gboolean has_gid;    /* InfiniBand within a subnet has none */
	uint16_t epoch_tag;  /* in every wr_id */
	guint n_cq_events;   /* taken and not acknowledged */
	guint depth;	     /* READs that may be outstanding */
	guint room;	     /* work requests that the send queue still takes */
	guint spin_us;	     /* adaptive: see arm() */
	gboolean marker_due; /* the last work request of all has not completed */
	PrPollSet waker;
	PrVerbsSlot slots[PR_VERBS_SLOTS];
	/* For the event thread: when the READ in each slot was posted (monotonic time), 0: none; and whether somebody
	 * waits for completions, or how often one has looked for them. All atomic. */
	gint64 posted_us[PR_VERBS_SLOTS];
	gint asleep, n_polls;
	uint16_t free_slots[PR_VERBS_SLOTS]; /* a stack */
	guint n_free;
	guint n_reads, n_probes;	    /* outstanding */
	PrCompletion early[PR_VERBS_SLOTS]; /* reaped while looking for something else */
	guint n_early;
	GPtrArray *retired; /* struct ibv_mr* of completed READs, to be freed when there is time */
} PrVerbsLane;

/* A range of a block, within one of its chunks (import.c), that the destination may read, and how. */
typedef struct PrVerbsDestinationMr {
	struct PrVerbsDestinationMr *next; /* in the same chunk; atomic */
	uint32_t block;
	uint32_t rkey;
	uint64_t offset, length; /* bytes within the block */
	uint64_t remote;	 /* address of its first byte at the source */
	struct ibv_mr *mr;	 /* our side of it, NULL: not yet; atomic, set under import_lock */
} PrVerbsDestinationMr;

/* A mapping of ours; addr NULL: none. */
typedef struct PrVerbsMapping {
	void *addr;
	uint64_t size; /* bytes */
} PrVerbsMapping;

/* A range of a block that the source has registered. */
typedef struct PrVerbsSourceMr {
	uint32_t block;
	uint64_t offset, length; /* bytes within the block */
	struct ibv_mr *mr;
	PrVerbsMapping watch; /* around a mapping that shows whether pages were exchanged */
	uint64_t watch_at;    /* where in it that begins */
} PrVerbsSourceMr;

typedef struct PrVerbsPath {
	PrDataPath base;
	PrPathLife fate; /* thread-safe */
	/* constant once connected */
	PrUri *uri;
	PrVerbsOptions options;
	const PrRegion *regions;
	guint n_regions;
	PrPathAllocate allocate; /* NULL: nothing is to be done before memory is registered */
	void *allocate_opaque;
	struct rdma_event_channel *channel; /* read by the event thread */
	PrVerbsDevice rail;

	PrVerbsLane lanes[PR_LANES_MAX]; /* base.n_lanes of them */
	GMutex qp_lock;	 /* whoever moves a queue pair to the error state finds it alive */
	gboolean fenced; /* by drain() */
	GThread *events;
	PrPollSet events_waker; /* wake: anyone */
	gint removed;		/* the device is about to go and waits for us; atomic */

	/* destination */
	PrVerbsDestinationMr **
		*imports;   /* for each region and chunk: a list; atomic, added to by one thread */
	GMutex import_lock; /* PrVerbsDestinationMr.mr is set under it */
	gint probe_key;	    /* the remote key of some grant, 0: none; atomic */

	/* source; the thread that calls connect(), grants() and grants_within(): one at a time */
	GArray *exports;	  /* PrVerbsSourceMr, sorted */
	PrVerbsMapping *writable; /* per region; see export.c */
} PrVerbsPath;

/* rdma.c: anybody, any number of times. The reason is a printf format. */
void pr_verbs_fail(PrVerbsPath *path, const char *format, ...) G_GNUC_PRINTF(2, 3);

/* lane.c. On a lane that is all zero but for `waker`: */
gboolean pr_verbs_lane_open(PrVerbsPath *path, PrVerbsLane *lane, GError **error);
/* From INIT to ready, with what rdma_cm has agreed on. */
gboolean pr_verbs_lane_ready(PrVerbsPath *path, PrVerbsLane *lane, guint depth, GError **error);
gboolean pr_verbs_lane_post(PrVerbsPath *path, PrVerbsLane *lane, uint32_t block, uint64_t offset,
			    uint32_t length, uint64_t token);
/* Posts a READ of nothing: poll() returns its token when the source's end of the queue pair has answered. Needs no
 * grants. At most PR_VERBS_PROBES_MAX may be outstanding. FALSE: the path has failed. */
gboolean pr_verbs_lane_probe(PrVerbsPath *path, PrVerbsLane *lane, uint64_t token);
guint pr_verbs_lane_poll(PrVerbsPath *path, PrVerbsLane *lane, PrCompletion *ret, guint max);
gboolean pr_verbs_lane_arm(PrVerbsPath *path, PrVerbsLane *lane);
/* Any thread: when the READ or probe was posted that has been outstanding for longest, 0: none is. */
gint64 pr_verbs_lane_oldest(const PrVerbsLane *lane);
/* Any thread, with qp_lock held: everything outstanding completes with an error. */
void pr_verbs_lane_stop(PrVerbsLane *lane);
/* After stop. FALSE: not everything completed in time. */
gboolean pr_verbs_lane_drain(PrVerbsPath *path, PrVerbsLane *lane, gint64 deadline);
/* With qp_lock held: destroys the queue pair, so that nothing lands any more, if it has to be waited for. */
void pr_verbs_lane_fence(PrVerbsLane *lane);
/* Frees all; the lane may be opened again. */
void pr_verbs_lane_close(PrVerbsLane *lane);

/* connect.c */
/* Source. Opens the path's rail with the first lane. */
gboolean pr_verbs_connect_lane(PrVerbsPath *path, PrVerbsLane *lane, const PrPathSetup *setup,
			       gint64 deadline, GError **error);
/* Destination. Takes `id`, whatever comes of it. `depth`: what the source offers. TRUE with a lane that has
 * no id: the source gave this attempt up. */
gboolean pr_verbs_accept_lane(PrVerbsPath *path, PrVerbsLane *lane, const PrPathSetup *setup,
			      struct rdma_cm_id *id, guint depth, gint64 deadline, GError **error);
/* Rejects and frees an id that asks to be connected; the source shows the reason. */
void pr_verbs_reject(struct rdma_cm_id *id, const char *reason);

/* export.c */
/* Registers all that holds data and is not registered yet. */
gboolean pr_verbs_source_mr_new(PrVerbsPath *path, GCancellable *cancel, GError **error);
/* Of a range, after the guest has stopped: appends what may be granted (PrGrant), in order; has the rest registered
 * that needs it. What is not granted is zero. */
gboolean pr_verbs_source_mr_within(PrVerbsPath *path, uint32_t block, uint64_t offset,
				   uint64_t length, GArray *ret, GError **error);
/* How much data there is; for RLIMIT_MEMLOCK. */
uint64_t pr_verbs_source_mr_bytes(const PrRegion *regions, guint n);
void pr_verbs_source_mr_free(PrVerbsPath *path);

/* import.c */
void pr_verbs_destination_mr_set(PrVerbsPath *path, const PrGrant *grants, guint n);
/* Beside the lanes. */
void pr_verbs_destination_mr_add(PrVerbsPath *path, const PrGrant *grants, guint n);
/* The import that has the byte at `offset`, or NULL. */
PrVerbsDestinationMr *pr_verbs_destination_mr_find(PrVerbsPath *path, uint32_t block,
						   uint64_t offset);
/* The local key for a range of an import. `alone`: if the import is not registered, the range is, by
 * itself; its memory region is then the caller's, in *ret_own. FALSE: the path has failed. */
gboolean pr_verbs_destination_mr_key(PrVerbsPath *path, PrVerbsDestinationMr *import,
				     gboolean alone, uint64_t offset, uint32_t length,
				     uint32_t *ret_key, struct ibv_mr **ret_own);
void pr_verbs_destination_mr_free(PrVerbsPath *path);

/* events.c */
gboolean pr_verbs_events_start(PrVerbsPath *path, GError **error);
/* After the path has ended. */
void pr_verbs_events_join(PrVerbsPath *path);
/* Whether the address that a lane was connected from is still at the lane's GID index. */
gboolean pr_verbs_has_address(const PrVerbsPath *path, const PrVerbsLane *lane);

/* deferred-free.c */
/* Whether a path is not to tell its peer that it has ended, because it cannot now. */
gboolean pr_verbs_must_defer_free(PrVerbsPath *path);
/* Has `free_path` free a path that is fenced, now or later; blocks for no more than a moment. */
void pr_verbs_release(PrVerbsPath *path, void (*free_path)(PrVerbsPath *path));

/* listener.c */
PrDataListener *pr_verbs_listen(const PrUri *uri, GError **error);
uint16_t pr_verbs_listener_port(PrDataListener *listener);
void pr_verbs_listener_close(PrDataListener *listener);
void pr_verbs_expect(PrDataListener *listener, const PrBinding *binding);
void pr_verbs_forget(PrDataListener *listener, const PrBinding *binding);
/* Waits for a connect request with the setup's binding. The id is the caller's; NULL when time is up or
 * on cancel. */
struct rdma_cm_id *pr_verbs_listener_next(PrDataListener *listener, const PrPathSetup *setup,
					  gint64 deadline, PrLaneId *ret_lane, guint *ret_depth,
					  GError **error);
