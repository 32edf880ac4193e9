/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Theory of operation: rdma:, over libibverbs and librdmacm: reliable connections, one-sided
 * READs
 *
 * The destination listens. The source connects a queue pair for each lane, each with an rdma_cm
 * id and a traffic class of its own. A device answers only so many READs at a time, the others
 * wait in the queue; urgent READs must not wait behind bulk ones. The private data of a connect
 * request bind it to (uuid, epoch, lane), by a token made of the secret. From then on the
 * source's processor has no part in READs. The source registers its memory for remote READ
 * (source-mr.c), and the destination reads straight into its mapping of the guest's memfd
 * (destination-mr.c).
 *
 * Each path has a device context, a protection domain and an event channel of its own. Paths
 * share nothing, not even the two sides in one process. So registrations end with the path, and
 * with them all that the peer may access.
 *
 * Failure. The first completion with an error shows it, or the device (port down, address gone),
 * or rdma_cm (peer gone), or the engine (heartbeats). All end in pr_path_life_fail() or
 * shutdown(), of which the first one counts. It moves the queue pairs to the error state, so that
 * all outstanding READs complete, and wakes all threads (pr_verbs_stop()).
 *
 * Completions. Each READ is signalled, because a thread waits for each, but only at its last
 * piece: a queue pair completes in order, so the last piece stands for all. A piece that fails
 * always has a completion. A READ that landed before the failure is reported as landed.
 *
 * Fence (drain), within the caller's time:
 *  1. No thread posts any more.
 *  2. The queue pairs are in the error state.
 *  3. A marker is posted on each, and everything up to the marker completes.
 *  4. The queue pairs are destroyed, then the ids.
 * Only our own queue pairs write to our memory, so this fence is complete whatever the peer does.
 * After step 3 nothing can land, so step 4 may come later (deferred-free.c). If step 3 takes too
 * long, drain() destroys the queue pairs at once. A queue pair is never used again.
 *
 * Times: a path that is destroyed without drain() is drained for 1 s at most (DRAIN_MS).
 * options.c has the timers of READs and of connecting.
 *
 * Not handled: iWARP, where a dead path shows only after TCP's timeouts; shared receive queues
 * and on-demand paging, which nothing here needs.
 */
#include "transport/rdma/path.h"

#include <string.h>

#include "transport/backends.h"

#define DRAIN_MS 1000 /* of a path that is destroyed without drain() */

static void path_free(PrVerbsPath *path)
{
	for (guint i = 0; i < path->base.n_lanes; i++)
		pr_verbs_lane_close(&path->lanes[i]);
	pr_verbs_source_mr_free(path);
	pr_verbs_destination_mr_free(path);
	pr_verbs_device_close(&path->device);
	if (path->channel)
		rdma_destroy_event_channel(path->channel);
	pr_poll_set_clear(&path->events_waker);
	pr_path_life_clear(&path->life);
	g_mutex_clear(&path->qp_lock);
	g_mutex_clear(&path->mr_lock);
	pr_uri_free(path->uri);
	g_free(path);
}

static void path_release(PrVerbsPath *path)
{
	if (path->device.context)
		pr_verbs_release(path, path_free);
	else
		path_free(path);
}
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrVerbsPath, path_release)

static PrVerbsPath *path_new(const PrPathSetup *setup)
{
	PrVerbsPath *path = g_new0(PrVerbsPath, 1);

	path->base.ops = pr_transport_rdma;
	path->base.incremental_grants = TRUE;
	path->base.n_lanes = pr_backend_n_lanes(setup);
	path->uri = pr_uri_copy(setup->uri);
	path->regions = setup->regions;
	path->n_regions = setup->n_regions;
	path->allocate = setup->allocate;
	path->allocate_opaque = setup->allocate_opaque;
	path->events_waker = PR_POLL_SET_INIT;
	g_mutex_init(&path->qp_lock);
	g_mutex_init(&path->mr_lock);
	pr_path_life_init(&path->life, setup, &path->base, pr_verbs_stop);
	for (guint i = 0; i < path->base.n_lanes; i++) {
		path->lanes[i].id = i;
		path->lanes[i].poll_set = PR_POLL_SET_INIT;
		path->lanes[i].epoch_tag = (uint16_t)setup->binding.epoch;
	}
	return path;
}

static gboolean prepare(PrVerbsPath *path, GError **error)
{
	if (!pr_verbs_parse_options(path->uri, &path->options, error))
		return FALSE;
	path->channel = pr_verbs_open_channel(path->uri, error);
	return path->channel && pr_poll_set_init(&path->events_waker, error);
}

static gboolean check_memlock(PrVerbsPath *path, uint64_t bytes, GError **error)
{
	if (pr_verbs_check_memlock(bytes, error))
		return TRUE;
	g_prefix_error(error, "path %s: ", path->uri->text);
	return FALSE;
}

/* The destination may have to pin all of its memory before the path ends. */
static uint64_t region_bytes(const PrPathSetup *setup)
{
	uint64_t bytes = 0;

	for (guint i = 0; i < setup->n_regions; i++)
		bytes += setup->regions[i].size;
	return bytes;
}

static gboolean has_lane(const PrDataPath *base, PrLaneId lane)
{
	return ((const PrVerbsPath *)base)->lanes[lane].cm != NULL;
}

static gboolean accept_lane(PrDataPath *base, PrDataListener *listener, PrLaneId lane,
			    gpointer arrival, const PrPathSetup *setup, gint64 deadline,
			    GError **error)
{
	PrVerbsPath *path = (PrVerbsPath *)base;
	g_autofree PrVerbsRequest *request = arrival;

	return pr_verbs_accept_lane(path, &path->lanes[lane], setup, request, deadline, error);
}

static PrDataPath *verbs_accept(PrDataListener *listener, const PrPathSetup *setup, GError **error)
{
	static const PrLaneAcceptor acceptor = {has_lane, accept_lane};
	g_autoptr(PrVerbsPath) path = path_new(setup);

	if (!prepare(path, error) || !check_memlock(path, region_bytes(setup), error) ||
	    !pr_backend_accept_lanes(&path->base, listener, setup, &acceptor, error) ||
	    !pr_verbs_events_start(path, error))
		return NULL;
	return &g_steal_pointer(&path)->base;
}

/* Registering comes last and may take longer than the setup's timeout: the destination waits for
 * connections, not for grants. */
static PrDataPath *verbs_connect(const PrPathSetup *setup, GError **error)
{
	gint64 deadline = pr_backend_deadline(setup->timeout_ms);
	g_autoptr(PrVerbsPath) path = path_new(setup);

	path->source_mrs = g_array_new(FALSE, FALSE, sizeof(PrVerbsSourceMr));
	path->writable = g_new0(PrVerbsMapping, setup->n_regions);
	if (!prepare(path, error) ||
	    !check_memlock(path, pr_verbs_source_mr_bytes(setup->regions, setup->n_regions), error))
		return NULL;
	for (guint i = 0; i < path->base.n_lanes; i++)
		if (!pr_verbs_connect_lane(path, &path->lanes[i], setup, deadline, error))
			return NULL;
	if (!pr_verbs_source_mr_new(path, setup->cancel, error) ||
	    !pr_verbs_events_start(path, error))
		return NULL;
	return &g_steal_pointer(&path)->base;
}

static void verbs_grants_within(PrDataPath *base, uint32_t block, uint64_t offset, uint64_t length,
				GArray *ret)
{
	PrVerbsPath *path = (PrVerbsPath *)base;
	g_autoptr(GError) error = NULL;

	if (path->source_mrs &&
	    !pr_verbs_source_mr_within(path, block, offset, length, ret, &error))
		pr_path_life_fail(&path->life, "%s", error->message);
}

static GArray *verbs_grants(PrDataPath *base)
{
	PrVerbsPath *path = (PrVerbsPath *)base;
	GArray *grants = g_array_new(FALSE, FALSE, sizeof(PrGrant));

	for (guint i = 0; i < path->n_regions; i++)
		verbs_grants_within(base, i, 0, path->regions[i].size, grants);
	return grants;
}

static void verbs_set_grants(PrDataPath *base, const PrGrant *grants, guint n)
{
	pr_verbs_destination_mr_set((PrVerbsPath *)base, grants, n);
}

static void verbs_add_grants(PrDataPath *base, const PrGrant *grants, guint n)
{
	pr_verbs_destination_mr_add((PrVerbsPath *)base, grants, n);
}

static guint verbs_max_reads(PrDataPath *base, PrLaneId lane)
{
	return ((PrVerbsPath *)base)->lanes[lane].depth;
}

static gboolean verbs_post_read(PrDataPath *base, PrLaneId id, uint32_t block, uint64_t offset,
				uint32_t length, uint64_t token)
{
	PrVerbsPath *path = (PrVerbsPath *)base;
	PrVerbsLane *lane = &path->lanes[id];

	g_assert(length <= PR_READ_MAX && block < path->n_regions &&
		 offset + length <= path->regions[block].size);
	return pr_path_life_is_up(&path->life) &&
	       pr_verbs_lane_post(path, lane, block, offset, length, token);
}

static gboolean verbs_post_probe(PrDataPath *base, PrLaneId id, uint64_t token)
{
	PrVerbsPath *path = (PrVerbsPath *)base;

	return pr_path_life_is_up(&path->life) &&
	       pr_verbs_lane_probe(path, &path->lanes[id], token);
}

static guint verbs_poll(PrDataPath *base, PrLaneId id, PrCompletion *ret, guint max)
{
	PrVerbsPath *path = (PrVerbsPath *)base;

	return pr_verbs_lane_poll(path, &path->lanes[id], ret, max);
}

static int verbs_wait_fd(PrDataPath *base, PrLaneId id)
{
	return ((PrVerbsPath *)base)->lanes[id].poll_set.epoll_fd;
}

static gboolean verbs_arm(PrDataPath *base, PrLaneId id)
{
	PrVerbsPath *path = (PrVerbsPath *)base;

	return pr_verbs_lane_arm(path, &path->lanes[id]);
}

static const char *verbs_device(PrDataPath *base)
{
	return pr_verbs_device_name(&((PrVerbsPath *)base)->device);
}

static void verbs_shutdown(PrDataPath *base)
{
	pr_path_life_shut(&((PrVerbsPath *)base)->life);
}

static gboolean verbs_drain(PrDataPath *base, guint timeout_ms)
{
	gint64 deadline = pr_backend_deadline(timeout_ms);
	PrVerbsPath *path = (PrVerbsPath *)base;
	gboolean drained = TRUE;

	verbs_shutdown(base);
	pr_verbs_events_join(path);
	for (guint i = 0; i < path->base.n_lanes; i++)
		drained &= pr_verbs_lane_drain(path, &path->lanes[i], deadline);
	path->fenced = TRUE;
	/* The fence is complete. path_release() destroys the queue pairs, which may take long. */
	if (drained)
		return TRUE;
	g_mutex_lock(&path->qp_lock);
	for (guint i = 0; i < path->base.n_lanes; i++)
		pr_verbs_lane_fence(&path->lanes[i]);
	g_mutex_unlock(&path->qp_lock);
	return FALSE;
}

static void verbs_destroy(PrDataPath *base)
{
	PrVerbsPath *path = (PrVerbsPath *)base;

	if (!path->fenced)
		verbs_drain(base, DRAIN_MS);
	path_release(path);
}

static const PrTransportOps verbs_ops = {
	.scheme = "rdma",
	.describe = pr_verbs_describe,
	.listen = pr_verbs_listen,
	.listener_port = pr_verbs_listener_port,
	.offer = pr_backend_refuse_offer,
	.listener_close = pr_verbs_listener_close,
	.expect = pr_backend_expect,
	.forget = pr_backend_forget,
	.accept = verbs_accept,
	.connect = verbs_connect,
	.grants = verbs_grants,
	.grants_within = verbs_grants_within,
	.set_grants = verbs_set_grants,
	.add_grants = verbs_add_grants,
	.max_reads = verbs_max_reads,
	.post_read = verbs_post_read,
	.post_probe = verbs_post_probe,
	.poll = verbs_poll,
	.wait_fd = verbs_wait_fd,
	.arm = verbs_arm,
	.device = verbs_device,
	.shutdown = verbs_shutdown,
	.drain = verbs_drain,
	.destroy = verbs_destroy,
	.admit_message = pr_backend_admit_message,
};

const PrTransportOps *const pr_transport_rdma = &verbs_ops;
