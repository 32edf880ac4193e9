/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The types of a path of the rdma: backend, and what the files of the backend offer each other.
 * rdma.c has the theory of operation. The files:
 *   options.c              the options of a URI
 *   device.c               a device, and the causes of its errors
 *   connect.c              the conversation of rdma_cm that connects a lane
 *   lane.c                 a queue pair and its completions
 *   source-mr.c            registered memory at the source
 *   destination-mr.c       registered memory at the destination
 *   events.c               the thread that watches a path
 *   path.c                 the failing of a path
 *   deferred-free.c        the freeing of a path whose device is down or slow
 *   listener.c             the destination's listener
 */
#pragma once

#include <infiniband/verbs.h>
#include <rdma/rdma_cma.h>

#include "transport/backend.h"

#define PR_VERBS_DEPTH_MAX  128 /* READs outstanding on a lane */
#define PR_VERBS_PROBES_MAX 4	/* probes outstanding on a lane, in addition to READs */
#define PR_VERBS_SLOTS	    (PR_VERBS_DEPTH_MAX + PR_VERBS_PROBES_MAX)

/* Read from a URI; constant. */
typedef struct PrVerbsOptions {
	const char *device;  /* its name in the URI; NULL: the device that has the address */
	uint8_t ack_timeout; /* 4.096 us * 2^n */
	/* Indexed by pr_verbs_kind(), as is tos. At most 6: soft-RoCE takes 7 for "for ever". */
	uint8_t retry[PR_LANES_MIN];
	uint8_t rnr_retry;
	uint8_t rnr_timer; /* a code, not a time: see ibv_modify_qp(3) */
	uint8_t depth;	   /* READs outstanding on a lane; ORD and IRD */
	uint8_t tos[PR_LANES_MIN];
	guint connect_timeout_ms; /* of the first attempt to connect a lane */
	guint read_deadline_ms;	  /* for READs on the urgent lanes; 0: none */
} PrVerbsOptions;

/* The index of a lane's options: all urgent lanes have the same. */
static inline PrLaneId pr_verbs_kind(PrLaneId lane)
{
	return pr_lane_is_urgent(lane) ? PR_LANE_URGENT : PR_LANE_BULK;
}

/* Also refuses unknown options. */
gboolean pr_verbs_parse_options(const PrUri *uri, PrVerbsOptions *ret, GError **error);

void pr_verbs_describe(GString *out);

/*
 * A device as one path uses it. Each path opens the device for itself, so that it receives its own
 * asynchronous events.
 */
typedef struct PrVerbsDevice {
	struct ibv_context *context; /* NULL: not open */
	struct ibv_pd *pd;
	struct ibv_device_attr caps;
	uint8_t port;
} PrVerbsDevice;

/* Opens the device that rdma_cm has chosen for the id. */
gboolean pr_verbs_device_open(PrVerbsDevice *device, struct rdma_cm_id *id, const PrUri *uri,
			      const PrVerbsOptions *options, GError **error);
void pr_verbs_device_close(PrVerbsDevice *device);
const char *pr_verbs_device_name(const PrVerbsDevice *device);
/* Sets a PR_PATH_ERROR_CONNECT that names the remedy; returns FALSE. */
gboolean pr_verbs_error(const PrUri *uri, const char *what, int number, GError **error);
/* Whether `bytes` more may be pinned. The error names the number needed. */
gboolean pr_verbs_check_memlock(uint64_t bytes, GError **error);
struct rdma_event_channel *pr_verbs_open_channel(const PrUri *uri, GError **error);
gboolean pr_verbs_set_nonblocking(int fd);

/* An event of rdma_cm that is acknowledged already. */
typedef struct PrVerbsEvent {
	enum rdma_cm_event_type type;
	int status;
	struct rdma_cm_id *id;
	uint8_t depth; /* of CONNECT_REQUEST, _RESPONSE: READs that the peer answers at a time */
	uint8_t data[256]; /* private data of CONNECT_REQUEST, REJECTED */
	gsize n_data;
} PrVerbsEvent;

/* FALSE: there is no event. */
gboolean pr_verbs_next_event(struct rdma_event_channel *channel, PrVerbsEvent *ret);

/* A READ or a probe that is outstanding. */
typedef struct PrVerbsSlot {
	uint64_t token;
	guint n_wrs; /* work requests posted for it */
	gboolean busy, failed, probe;
	struct ibv_mr *mr; /* registered for this READ alone, or NULL */
} PrVerbsSlot;

/* Owned by the thread that uses the lane; any thread wakes. */
typedef struct PrVerbsLane {
	PrLaneId id;
	struct rdma_cm_id *cm;
	struct ibv_comp_channel *channel;
	struct ibv_cq *cq;
	struct ibv_qp *qp; /* moved to the error state, and destroyed, under the path's qp_lock */
	union ibv_gid gid; /* of this side; constant once connected, as are the next two */
	uint8_t gid_index;
	gboolean has_gid;    /* InfiniBand within a subnet has none */
	uint16_t epoch_tag;  /* in every wr_id */
	guint n_cq_events;   /* read and not acknowledged yet */
	guint depth;	     /* READs that may be outstanding */
	guint room;	     /* work requests that the send queue has room for */
	guint spin_us;	     /* adaptive: see spin() */
	gboolean marker_due; /* the marker of drain() has not completed */
	PrPollSet poll_set;
	PrVerbsSlot slots[PR_VERBS_SLOTS];
	/* Read by the event thread, all atomic: */
	gint64 posted_us[PR_VERBS_SLOTS]; /* when the slot's READ was posted (monotonic), 0: none */
	gint asleep;			  /* the lane's thread waits for completions */
	gint n_polls;			  /* how often it has looked for completions */
	uint16_t free_slots[PR_VERBS_SLOTS]; /* a stack */
	guint n_free;
	guint n_reads, n_probes;	    /* outstanding */
	PrCompletion early[PR_VERBS_SLOTS]; /* reaped in passing, for the next poll() */
	guint n_early;
	GPtrArray *retired; /* struct ibv_mr* of completed READs, freed before the lane sleeps */
} PrVerbsLane;

/* A range of a block, within one chunk (destination-mr.c), that the source has granted. */
typedef struct PrVerbsDestinationMr {
	struct PrVerbsDestinationMr *next; /* in the same chunk; atomic */
	uint32_t block;
	uint32_t rkey;
	uint64_t offset, length; /* bytes within the block */
	uint64_t remote;	 /* address of the first byte at the source */
	struct ibv_mr *mr; /* of our memory; NULL: not registered; atomic, set under mr_lock */
} PrVerbsDestinationMr;

/* A mapping of this process; addr NULL: none. */
typedef struct PrVerbsMapping {
	void *addr;
	uint64_t size; /* bytes */
} PrVerbsMapping;

/* A piece: a range of a block that the source has registered as one memory region. */
typedef struct PrVerbsSourceMr {
	uint32_t block;
	uint64_t offset, length; /* bytes within the block */
	struct ibv_mr *mr;
	PrVerbsMapping presence; /* room around the presence mapping: see source-mr.c */
	uint64_t presence_at;	 /* offset of the presence mapping in that room */
} PrVerbsSourceMr;

typedef struct PrVerbsPath {
	PrDataPath base;
	PrPathLife life; /* thread-safe */
	/* constant once connected */
	PrUri *uri;
	PrVerbsOptions options;
	const PrRegion *regions;
	guint n_regions;
	PrPathAllocate allocate; /* called before memory is registered; NULL: not needed */
	void *allocate_opaque;
	struct rdma_event_channel *channel; /* read by the event thread */
	PrVerbsDevice device;

	PrVerbsLane lanes[PR_LANES_MAX]; /* base.n_lanes of them */
	GMutex qp_lock;	 /* keeps queue pairs alive while they are moved to the error state */
	gboolean fenced; /* set by drain() */
	GThread *events;
	PrPollSet events_waker; /* any thread wakes */
	gint removed;		/* the device is being removed and waits for this path; atomic */

	/* destination */
	/* For each region and chunk a list; atomic; one thread at a time adds. */
	PrVerbsDestinationMr ***destination_mrs;
	GMutex mr_lock; /* PrVerbsDestinationMr.mr is set under it */
	gint probe_key; /* the remote key of some grant, 0: none; atomic */

	/* source; owned by the thread that is in connect(), grants() or grants_within() */
	GArray *source_mrs;	  /* PrVerbsSourceMr, sorted; NULL at the destination */
	PrVerbsMapping *writable; /* per region; see source-mr.c */
} PrVerbsPath;

/* path.c */
/* Fails the path, from any thread, any number of times. The reason is "device NAME: " and this
 * text. */
void pr_verbs_fail(PrVerbsPath *path, const char *format, ...) G_GNUC_PRINTF(2, 3);
/* PrPathStop: moves the queue pairs to the error state, so that all READs complete; wakes all
 * threads. */
void pr_verbs_stop(PrDataPath *path);

/* lane.c */
/* Opens a lane that is all zero but for `poll_set`, `id` and `epoch_tag`. */
gboolean pr_verbs_lane_open(PrVerbsPath *path, PrVerbsLane *lane, GError **error);
/* Moves the queue pair from INIT to ready, as rdma_cm has agreed with the peer. */
gboolean pr_verbs_lane_ready(PrVerbsPath *path, PrVerbsLane *lane, guint depth, GError **error);
gboolean pr_verbs_lane_post(PrVerbsPath *path, PrVerbsLane *lane, uint32_t block, uint64_t offset,
			    uint32_t length, uint64_t token);
/* Posts a READ of no bytes: poll() returns its token when the source's end of the queue pair has
 * answered. It needs no grants. At most PR_VERBS_PROBES_MAX may be outstanding. FALSE: the path
 * has failed. */
gboolean pr_verbs_lane_probe(PrVerbsPath *path, PrVerbsLane *lane, uint64_t token);
guint pr_verbs_lane_poll(PrVerbsPath *path, PrVerbsLane *lane, PrCompletion *ret, guint max);
gboolean pr_verbs_lane_arm(PrVerbsPath *path, PrVerbsLane *lane);
/* Any thread: when the oldest outstanding READ or probe was posted, 0: none is outstanding. */
gint64 pr_verbs_lane_oldest(const PrVerbsLane *lane);
/* After pr_verbs_stop(): waits for all completions. FALSE: not all came in time. */
gboolean pr_verbs_lane_drain(PrVerbsPath *path, PrVerbsLane *lane, gint64 deadline);
/* With qp_lock held: destroys the queue pair, after which nothing lands. That may take long. */
void pr_verbs_lane_fence(PrVerbsLane *lane);
/* Frees the parts of the lane, which may then be opened again. */
void pr_verbs_lane_close(PrVerbsLane *lane);

/* connect.c */
/* Source. The first lane also opens the path's device. */
gboolean pr_verbs_connect_lane(PrVerbsPath *path, PrVerbsLane *lane, const PrPathSetup *setup,
			       gint64 deadline, GError **error);
/* A request for a lane. */
typedef struct PrVerbsRequest {
	struct rdma_cm_id *id;
	guint depth; /* READs that the source can answer at a time */
} PrVerbsRequest;
/* Destination. Takes the request's id. TRUE with a lane that has no id: the source gave this
 * attempt up. */
gboolean pr_verbs_accept_lane(PrVerbsPath *path, PrVerbsLane *lane, const PrPathSetup *setup,
			      const PrVerbsRequest *request, gint64 deadline, GError **error);
/* Rejects a request and frees its id; the source shows the reason. */
void pr_verbs_reject(struct rdma_cm_id *id, const char *reason);

/* source-mr.c */
/* Registers all ranges that hold data and are not registered yet. */
gboolean pr_verbs_source_mr_new(PrVerbsPath *path, GCancellable *cancel, GError **error);
/* After the guest has stopped: appends the grants (PrGrant) of a range, in order, and registers
 * data that are not registered yet. Pages without a grant are zero. */
gboolean pr_verbs_source_mr_within(PrVerbsPath *path, uint32_t block, uint64_t offset,
				   uint64_t length, GArray *ret, GError **error);
/* How many bytes hold data; for RLIMIT_MEMLOCK. */
uint64_t pr_verbs_source_mr_bytes(const PrRegion *regions, guint n);
void pr_verbs_source_mr_free(PrVerbsPath *path);

/* destination-mr.c */
void pr_verbs_destination_mr_set(PrVerbsPath *path, const PrGrant *grants, guint n);
/* While the lanes may be reading. */
void pr_verbs_destination_mr_add(PrVerbsPath *path, const PrGrant *grants, guint n);
/* The range that has the byte at `offset`, or NULL. */
PrVerbsDestinationMr *pr_verbs_destination_mr_find(PrVerbsPath *path, uint32_t block,
						   uint64_t offset);
/* The local key for `length` bytes at `offset`, within the range. `alone`: if the range is not
 * registered yet, registers these bytes alone, as a memory region *ret_own that the caller owns.
 * FALSE: the path has failed. */
gboolean pr_verbs_destination_mr_key(PrVerbsPath *path, PrVerbsDestinationMr *range, gboolean alone,
				     uint64_t offset, uint32_t length, uint32_t *ret_key,
				     struct ibv_mr **ret_own);
void pr_verbs_destination_mr_free(PrVerbsPath *path);

/* events.c */
gboolean pr_verbs_events_start(PrVerbsPath *path, GError **error);
/* Only after the path has ended. */
void pr_verbs_events_join(PrVerbsPath *path);
/* Whether the lane's own address is still at the lane's GID index. */
gboolean pr_verbs_has_address(const PrVerbsPath *path, const PrVerbsLane *lane);

/* deferred-free.c */
/* Whether the path must not tell its peer now that it has ended: its device is down. */
gboolean pr_verbs_must_defer_free(PrVerbsPath *path);
/* Has a thread free a fenced path by `free_path`, now or later. Blocks for 0.5 s at most. */
void pr_verbs_release(PrVerbsPath *path, void (*free_path)(PrVerbsPath *path));

/* listener.c */
PrDataListener *pr_verbs_listen(const PrUri *uri, GError **error);
uint16_t pr_verbs_listener_port(PrDataListener *listener);
void pr_verbs_listener_close(PrDataListener *listener);
