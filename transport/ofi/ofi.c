/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Theory of operation: ofi:, over libfabric: reliable connections (FI_EP_MSG), one-sided READs
 *
 * The destination listens on a passive endpoint with a port of its own, which HELLO_ACK tells the
 * source. The source connects one endpoint for each lane. A connect request carries the lane's
 * binding as private data, which the destination checks before it accepts. The source registers
 * its regions for remote reading. From then on it only runs a thread for each lane, in which
 * libfabric answers. The destination reads straight into its regions.
 *
 * Lanes share nothing, not even the fabric. Reading an event queue of provider `net` makes
 * progress on all domains of its fabric, under their locks; a shared fabric would make the urgent
 * lane wait for the bulk one. The endpoint for a connect request may be opened in another fabric
 * than the passive endpoint.
 *
 * Sleeping. All providers of libfabric 1.17 claim FI_PROGRESS_AUTO, but make progress only in our
 * calls, on both sides. What a thread has to do before it sleeps differs (libfabric 2 has no
 * `net`):
 *  - `net`: fi_trywait() does nothing. The eventfd behind a queue's wait fd stays signalled once
 *    it was signalled, and a thread that polls that fd spins. So the event queue is bound to a
 *    wait set, where fi_wait(set, 0) resets the eventfd. The set's fd also covers the domain's
 *    sockets. Only the lane's own thread makes progress, so the completion queue needs no wait
 *    object.
 *  - the others: fi_trywait() on both queues, whose wait fds are in the lane's epoll set.
 *
 * End of a connection. When the peer closes or dies, the event queue has FI_SHUTDOWN, and each
 * outstanding READ completes with FI_ECANCELED. Only a thread that makes progress sees either, so
 * a thread that is about to sleep reads the event queue. A peer that goes silent shows as nothing
 * at all: heartbeats and shutdown() end such a path. fi_shutdown() completes all outstanding
 * READs at once, and nothing lands afterwards.
 *  - If a READ's data are arriving at that moment, the READ completes twice: it is both the head
 *    of the provider's queue and its current message. So slots remember whether they are busy,
 *    and the completion queue has room for the second completion.
 *  - A READ that is posted after the end fails in the provider's send, and completes with an
 *    error.
 *
 * Fewer packets. The providers send each READ, and each answer, by a system call of its own.
 * Where the urgent lane has several, its socket is corked meanwhile, so that they share packets.
 * libfabric does not tell the socket; lane.c finds it by its addresses. The first READ after a
 * poll() leaves at once.
 *
 * Storing. Where the provider copies (it needs no registered memory), a READ lands in a buffer of
 * its slot, and pr_region_store() stores it from there. The slot that was freed last is used
 * first, so that the buffers stay in the cache.
 *
 * Times: a provider that has no resources for a READ for 1 s (POST_TIMEOUT_MS) fails the path.
 */
#include "transport/ofi/ofi.h"

#include <errno.h>
#include <rdma/fi_errno.h>
#include <sched.h>
#include <string.h>

#include "transport/backends.h"
#include "transport/lane-rendezvous.h"
#include "util/try-alloc.h"

#define POST_TIMEOUT_MS 1000 /* a provider that has no resources for so long is dead */
#define POLL_BATCH	16

typedef struct OfiLane {
	PrOfiLane ofi;
	/* destination, owned by the lane's thread: completions that post_read() found while it
	 * waited */
	PrCompletion early[PR_OFI_READS_MAX];
	guint n_early;
	/* source */
	struct OfiPath *path;
	GThread *progress;
} OfiLane;

typedef struct OfiPath {
	PrDataPath base;
	PrPathLife life;	 /* thread-safe */
	const PrRegion *regions; /* constant, as is n_regions */
	guint n_regions;
	PrGrant *grants; /* destination; set before the first READ */
	guint n_grants;
	gboolean *storable; /* constant; for each region whether to use pr_region_store() */
	OfiLane lanes[PR_LANES_MAX]; /* base.n_lanes of them */
	GMutex ep_lock;		     /* keeps endpoints open while stop_lanes() shuts them down */
} OfiPath;

static gboolean is_urgent(const OfiLane *lane)
{
	return pr_lane_is_urgent((PrLaneId)(lane - lane->path->lanes));
}

static void stop_lanes(PrDataPath *base)
{
	OfiPath *path = (OfiPath *)base;

	g_mutex_lock(&path->ep_lock);
	for (guint i = 0; i < path->base.n_lanes; i++) {
		PrOfiLane *lane = &path->lanes[i].ofi;

		if (!lane->ep)
			continue;
		fi_shutdown(lane->ep, 0);
		pr_poll_set_wake(&lane->poll_set);
	}
	g_mutex_unlock(&path->ep_lock);
}

/* Fails the path if the connection has ended. */
static void check_events(OfiPath *path, PrOfiLane *lane)
{
	PrOfiEvent event = {0};

	if (!pr_ofi_events_read(&lane->events, &event))
		return;
	if (event.error)
		pr_path_life_fail(&path->life, "%s", fi_strerror(event.error));
	else if (event.type == FI_SHUTDOWN)
		pr_path_life_fail_closed(&path->life);
}

static OfiPath *path_new(const PrPathSetup *setup)
{
	OfiPath *path = g_new0(OfiPath, 1);

	path->base.ops = &pr_transport_ofi;
	path->base.n_lanes = pr_backend_n_lanes(setup);
	g_mutex_init(&path->ep_lock);
	path->regions = setup->regions;
	path->n_regions = setup->n_regions;
	path->storable = pr_regions_storable(setup->regions, setup->n_regions);
	pr_path_life_init(&path->life, setup, &path->base, stop_lanes);
	for (guint i = 0; i < path->base.n_lanes; i++) {
		path->lanes[i].path = path;
		path->lanes[i].ofi.poll_set = PR_POLL_SET_INIT;
	}
	return path;
}

static void path_free(OfiPath *path)
{
	for (guint i = 0; i < path->base.n_lanes; i++)
		pr_ofi_lane_close(&path->lanes[i].ofi);
	pr_path_life_clear(&path->life);
	g_mutex_clear(&path->ep_lock);
	g_free(path->grants);
	g_free(path->storable);
	g_free(path);
}
G_DEFINE_AUTOPTR_CLEANUP_FUNC(OfiPath, path_free)

static gboolean has_lane(const PrDataPath *base, PrLaneId lane)
{
	return ((const OfiPath *)base)->lanes[lane].ofi.info != NULL;
}

static gboolean accept_lane(PrDataPath *base, PrDataListener *listener, PrLaneId id, gpointer info,
			    const PrPathSetup *setup, gint64 deadline, GError **error)
{
	PrOfiLane *lane = &((OfiPath *)base)->lanes[id].ofi;

	if (pr_ofi_lane_open(lane, info, setup, FI_READ, error))
		return pr_ofi_lane_accept(lane, setup, deadline, error);
	/* Without an endpoint the request's socket would stay open, and its source would wait. */
	if (!lane->has_request)
		pr_pending_lanes_refuse(((PrBackendListener *)listener)->pending,
					g_steal_pointer(&lane->info), "the lane cannot be opened");
	return FALSE;
}

static PrDataPath *ofi_accept(PrDataListener *listener, const PrPathSetup *setup, GError **error)
{
	static const PrLaneAcceptor acceptor = {has_lane, accept_lane};
	g_autoptr(OfiPath) path = path_new(setup);

	if (!pr_backend_accept_lanes(&path->base, listener, setup, &acceptor, error))
		return NULL;
	return &g_steal_pointer(&path)->base;
}

/* Polls for a while first: faults often follow each other, and waking up takes longer than a
 * READ. */
static void sleep_for_request(OfiLane *lane)
{
	gint64 awake_until = g_get_monotonic_time() + (is_urgent(lane) ? PR_BACKEND_SPIN_US : 0);
	struct pollfd fd = {.fd = lane->ofi.poll_set.epoll_fd, .events = POLLIN};

	while (g_get_monotonic_time() < awake_until) {
		if (poll(&fd, 1, 0))
			return;
		sched_yield();
	}
	/* Ended by a request, or by stop_lanes(). */
	poll(&fd, 1, -1);
}

/* The source's part: lets libfabric answer until the path ends. */
static gpointer progress_thread(gpointer opaque)
{
	OfiLane *lane = opaque;
	OfiPath *path = lane->path;
	gboolean urgent = is_urgent(lane);
	struct fi_cq_entry entry;

	while (pr_path_life_is_up(&path->life)) {
		if (urgent && pr_ofi_lane_has_requests(&lane->ofi))
			pr_ofi_lane_cork(&lane->ofi);
		/* Answers the requests that have come in. Nothing completes here: the source
		 * posts nothing. */
		fi_cq_read(lane->ofi.cq, &entry, 1);
		pr_ofi_lane_push(&lane->ofi);
		if (pr_ofi_lane_may_sleep(&lane->ofi))
			sleep_for_request(lane);
		else
			check_events(path, &lane->ofi);
	}
	return NULL;
}

static void ofi_destroy(PrDataPath *base);

static PrDataPath *ofi_connect(const PrPathSetup *setup, GError **error)
{
	gint64 deadline = pr_backend_deadline(setup->timeout_ms);
	uint16_t port = setup->data_port ? setup->data_port : setup->uri->port;
	g_autoptr(OfiPath) path = NULL;
	guint64 data_port;

	if (!pr_ofi_check_options(setup->uri, &data_port, error))
		return NULL;
	path = path_new(setup);
	for (guint i = 0; i < path->base.n_lanes; i++) {
		PrOfiLane *lane = &path->lanes[i].ofi;
		struct fi_info *info = pr_ofi_getinfo(setup->uri, port, FALSE, error);

		if (!info || !pr_ofi_lane_open(lane, info, setup, FI_REMOTE_READ, error) ||
		    !pr_ofi_lane_connect(lane, setup, i, deadline, error))
			return NULL;
	}
	for (guint i = 0; i < path->base.n_lanes; i++) {
		OfiLane *lane = &path->lanes[i];

		lane->progress = pr_thread_try("pr-ofi-progress", progress_thread, lane, error);
		if (!lane->progress) {
			ofi_destroy(&g_steal_pointer(&path)->base);
			return NULL;
		}
	}
	return &g_steal_pointer(&path)->base;
}

/* Where the provider chooses the keys, each lane has keys of its own: the n-th grant of a range
 * is for lane n. */
static GArray *ofi_grants(PrDataPath *base)
{
	OfiPath *path = (OfiPath *)base;
	int mode = path->lanes[0].ofi.info->domain_attr->mr_mode;
	guint n_keys = mode & FI_MR_PROV_KEY ? path->base.n_lanes : 1;
	GArray *grants = g_array_new(FALSE, FALSE, sizeof(PrGrant));

	for (guint i = 0; i < path->n_regions; i++) {
		for (guint lane = 0; path->regions[i].size && lane < n_keys; lane++) {
			PrGrant grant = {
				.block = i,
				.length = path->regions[i].size,
				.key = fi_mr_key(path->lanes[lane].ofi.mrs[i]),
			};

			if (mode & FI_MR_VIRT_ADDR)
				grant.addr = (uintptr_t)path->regions[i].addr;
			g_array_append_val(grants, grant);
		}
	}
	return grants;
}

static void ofi_set_grants(PrDataPath *base, const PrGrant *grants, guint n)
{
	OfiPath *path = (OfiPath *)base;

	g_free(path->grants);
	path->grants = g_memdup2(grants, n * sizeof(*grants));
	path->n_grants = n;
}

static const PrGrant *find_grant(OfiPath *path, PrLaneId lane, uint32_t block, uint64_t offset,
				 uint32_t length)
{
	const PrGrant *found = NULL;
	guint nth = 0;

	for (guint i = 0; i < path->n_grants; i++) {
		const PrGrant *grant = &path->grants[i];

		if (grant->block != block || offset < grant->offset || length > grant->length ||
		    offset - grant->offset > grant->length - length)
			continue;
		found = grant;
		if (nth++ == lane)
			break;
	}
	return found;
}

static guint ofi_max_reads(PrDataPath *path, PrLaneId lane)
{
	return PR_OFI_READS_MAX;
}

/* Stores the bytes of a READ that has landed in its buffer. FALSE: the path has failed. */
static gboolean store(OfiPath *path, const PrOfiSlot *slot)
{
	if (!slot->region ||
	    pr_region_store(slot->region, slot->offset, slot->buffer, slot->length))
		return TRUE;
	pr_path_life_fail(&path->life, "cannot store pages in guest RAM: %s", g_strerror(errno));
	return FALSE;
}

/* Frees the slot of a completed READ. FALSE: a second completion of the same READ. */
static gboolean complete(OfiPath *path, PrOfiLane *lane, void *context, gboolean ok,
			 PrCompletion *ret)
{
	PrOfiSlot *slot = context;

	if (!slot || !slot->busy)
		return FALSE;
	ok = ok && store(path, slot);
	slot->busy = FALSE;
	lane->free_slots[lane->n_free++] = slot - lane->slots;
	*ret = (PrCompletion){.token = slot->token, .ok = ok};
	return TRUE;
}

static guint read_failure(OfiPath *path, PrOfiLane *lane, PrCompletion *ret)
{
	struct fi_cq_err_entry entry = {0};

	if (fi_cq_readerr(lane->cq, &entry, 0) != 1)
		return 0;
	if (entry.err == FI_ECANCELED)
		pr_path_life_fail_closed(&path->life);
	else
		pr_path_life_fail(&path->life, "%s", fi_strerror(entry.err));
	return complete(path, lane, entry.op_context, FALSE, ret);
}

/* Moves completions out of the queue; 0 when it is empty. */
static guint reap(OfiPath *path, PrOfiLane *lane, PrCompletion *ret, guint max)
{
	struct fi_cq_entry entries[POLL_BATCH];
	guint n = 0;

	while (n < max) {
		guint wanted = MIN(max - n, POLL_BATCH);
		ssize_t got = fi_cq_read(lane->cq, entries, wanted);

		if (got == -FI_EAVAIL) {
			n += read_failure(path, lane, ret + n);
			continue;
		}
		if (got < 0) {
			if (got != -FI_EAGAIN)
				pr_path_life_fail(&path->life, "%s", fi_strerror((int)-got));
			break;
		}
		for (ssize_t i = 0; i < got; i++)
			n += complete(path, lane, entries[i].op_context,
				      pr_path_life_is_up(&path->life), ret + n);
		if (got < (ssize_t)wanted)
			break;
	}
	return n;
}

/* After -FI_EAGAIN: waits for room for a READ. FALSE: the path has failed. */
static gboolean wait_for_room(OfiPath *path, OfiLane *lane, gint64 deadline)
{
	pr_ofi_lane_push(&lane->ofi);
	guint n = reap(path, &lane->ofi, lane->early + lane->n_early,
		       PR_OFI_READS_MAX - lane->n_early);

	lane->n_early += n;
	if (!n && pr_ofi_lane_may_sleep(&lane->ofi) &&
	    !pr_backend_wait(lane->ofi.poll_set.epoll_fd, POLLIN, deadline, NULL, NULL))
		pr_path_life_fail(&path->life, "libfabric takes no more READs");
	return pr_path_life_is_up(&path->life);
}

/* The place that a READ is for. */
typedef struct Target {
	void *at; /* NULL: the slot's buffer, to be stored at `offset` of `region` */
	const PrRegion *region;
	uint64_t offset;
	struct fid_mr *mr; /* NULL where the provider needs none */
} Target;

/* Prepares the slot for its READ. Returns where the READ is to land; NULL: there is no memory. */
static void *prepare_slot(PrOfiSlot *slot, const Target *target, uint32_t length)
{
	slot->region = target->at ? NULL : target->region;
	slot->offset = target->offset;
	slot->length = length;
	if (target->at)
		return target->at;
	if (slot->capacity < length) {
		g_free(slot->buffer);
		slot->buffer = g_try_malloc(length);
		slot->capacity = slot->buffer ? length : 0;
	}
	return slot->buffer;
}

static gboolean read_into(OfiPath *path, OfiLane *lane, const PrGrant *grant, uint64_t offset,
			  uint32_t length, Target target, PrOfiSlot *slot)
{
	gint64 deadline = pr_backend_deadline(POST_TIMEOUT_MS);
	void *desc = target.mr ? fi_mr_desc(target.mr) : NULL;
	uint64_t remote = grant->addr + (offset - grant->offset);
	void *at = prepare_slot(slot, &target, length);
	ssize_t err;

	if (!at) {
		pr_path_life_fail(&path->life, "no memory for a READ");
		return FALSE;
	}
	do {
		err = fi_read(lane->ofi.ep, at, length, desc, 0, remote, grant->key,
			      &slot->context);
	} while (err == -FI_EAGAIN && wait_for_room(path, lane, deadline));
	if (err && err != -FI_EAGAIN)
		pr_path_life_fail(&path->life, "%s", fi_strerror((int)-err));
	return !err;
}

static gboolean post(OfiPath *path, OfiLane *lane, const PrGrant *grant, uint64_t offset,
		     uint32_t length, Target target, uint64_t token)
{
	PrOfiSlot *slot;

	g_assert(lane->ofi.n_free);
	if (!pr_path_life_is_up(&path->life))
		return FALSE;
	if (!grant) {
		pr_path_life_fail(&path->life, "the source does not let us read all of its RAM");
		return FALSE;
	}
	slot = &lane->ofi.slots[lane->ofi.free_slots[--lane->ofi.n_free]];
	slot->token = token;
	slot->busy = TRUE;
	if (++lane->ofi.n_posted == 2 && is_urgent(lane))
		pr_ofi_lane_cork(&lane->ofi);
	if (read_into(path, lane, grant, offset, length, target, slot))
		return TRUE;
	slot->busy = FALSE;
	lane->ofi.free_slots[lane->ofi.n_free++] = slot - lane->ofi.slots;
	return FALSE;
}

static gboolean ofi_post_read(PrDataPath *base, PrLaneId id, uint32_t block, uint64_t offset,
			      uint32_t length, uint64_t token)
{
	OfiPath *path = (OfiPath *)base;
	OfiLane *lane = &path->lanes[id];
	const PrRegion *region = &path->regions[block];
	Target target = {.region = region, .offset = offset};

	g_assert(length <= PR_READ_MAX && block < path->n_regions &&
		 offset + length <= region->size);
	if (lane->ofi.mrs || !path->storable[block])
		target.at = (uint8_t *)region->addr + offset;
	if (lane->ofi.mrs)
		target.mr = lane->ofi.mrs[block];
	return post(path, lane, find_grant(path, id, block, offset, length), offset, length, target,
		    token);
}

/* A probe reads one byte of the first grant: providers differ in how they handle a READ of no
 * bytes. */
static gboolean ofi_post_probe(PrDataPath *base, PrLaneId id, uint64_t token)
{
	OfiPath *path = (OfiPath *)base;
	OfiLane *lane = &path->lanes[id];
	Target target = {.at = &lane->ofi.scratch, .mr = lane->ofi.scratch_mr};
	const PrGrant *first = path->n_grants ? path->grants : NULL;

	if (first)
		first = find_grant(path, id, first->block, first->offset, 1);
	return post(path, lane, first, first ? first->offset : 0, 1, target, token);
}

static guint ofi_poll(PrDataPath *base, PrLaneId id, PrCompletion *ret, guint max)
{
	OfiPath *path = (OfiPath *)base;
	OfiLane *lane = &path->lanes[id];
	guint n = pr_backend_take_early(lane->early, &lane->n_early, ret, max);

	pr_ofi_lane_push(&lane->ofi);
	return n + reap(path, &lane->ofi, ret + n, max - n);
}

static int ofi_wait_fd(PrDataPath *base, PrLaneId id)
{
	return ((OfiPath *)base)->lanes[id].ofi.poll_set.epoll_fd;
}

static gboolean ofi_arm(PrDataPath *base, PrLaneId id)
{
	OfiPath *path = (OfiPath *)base;
	OfiLane *lane = &path->lanes[id];

	pr_ofi_lane_push(&lane->ofi);
	if (lane->n_early || !pr_path_life_is_up(&path->life))
		return FALSE;
	if (pr_ofi_lane_may_sleep(&lane->ofi))
		return TRUE;
	check_events(path, &lane->ofi);
	return FALSE;
}

static const char *ofi_device(PrDataPath *base)
{
	return ((OfiPath *)base)->lanes[0].ofi.info->fabric_attr->prov_name;
}

static void ofi_shutdown(PrDataPath *base)
{
	pr_path_life_shut(&((OfiPath *)base)->life);
}

/* Waits until each posted READ has completed. */
static gboolean drain_lane(OfiPath *path, PrOfiLane *lane, gint64 deadline)
{
	PrCompletion dropped[POLL_BATCH];

	while (lane->n_free < PR_OFI_READS_MAX) {
		if (reap(path, lane, dropped, POLL_BATCH) || !pr_ofi_lane_may_sleep(lane))
			continue;
		if (!pr_backend_wait(lane->completion_fd, POLLIN, deadline, NULL, NULL))
			return FALSE;
	}
	return TRUE;
}

/* After shutdown(), by which the threads end. */
static void join_progress(OfiPath *path)
{
	for (guint i = 0; i < path->base.n_lanes; i++)
		g_clear_pointer(&path->lanes[i].progress, g_thread_join);
}

static gboolean ofi_drain(PrDataPath *base, guint timeout_ms)
{
	gint64 deadline = pr_backend_deadline(timeout_ms);
	OfiPath *path = (OfiPath *)base;
	gboolean drained = TRUE;

	ofi_shutdown(base);
	join_progress(path);
	for (guint i = 0; i < path->base.n_lanes; i++) {
		drained &= drain_lane(path, &path->lanes[i].ofi, deadline);
		g_mutex_lock(&path->ep_lock);
		pr_ofi_lane_close_ep(&path->lanes[i].ofi);
		g_mutex_unlock(&path->ep_lock);
	}
	return drained;
}

static void ofi_destroy(PrDataPath *base)
{
	OfiPath *path = (OfiPath *)base;

	ofi_shutdown(base);
	join_progress(path);
	path_free(path);
}

static void ofi_describe(GString *out)
{
	pr_backend_describe(out, "ofi:HOST:PORT", "one-sided READs by libfabric, over any network");
	pr_backend_describe_option(out, "provider=NAME", "libfabric's provider; net, else tcp");
	pr_backend_describe_option(out, "data-port=PORT",
				   "where the destination listens for data; any free port");
}

const PrTransportOps pr_transport_ofi = {
	.scheme = "ofi",
	.describe = ofi_describe,
	.warm_up = pr_ofi_warm_up,
	.listen = pr_ofi_listen,
	.listener_port = pr_ofi_listener_port,
	.offer = pr_backend_refuse_offer,
	.listener_close = pr_ofi_listener_close,
	.expect = pr_backend_expect,
	.forget = pr_backend_forget,
	.accept = ofi_accept,
	.connect = ofi_connect,
	.grants = ofi_grants,
	.set_grants = ofi_set_grants,
	.max_reads = ofi_max_reads,
	.post_read = ofi_post_read,
	.post_probe = ofi_post_probe,
	.poll = ofi_poll,
	.wait_fd = ofi_wait_fd,
	.arm = ofi_arm,
	.device = ofi_device,
	.shutdown = ofi_shutdown,
	.drain = ofi_drain,
	.destroy = ofi_destroy,
	.admit_message = pr_backend_admit_message,
};
