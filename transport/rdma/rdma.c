/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * rdma: libibverbs and librdmacm, reliable connections, one-sided READs.
 *
 * The destination listens, the source connects a queue pair per lane, each with an rdma_cm id and a traffic
 * class of its own: READs beyond what a device answers at a time wait in the queue, and urgent ones are
 * not to wait behind bulk. The connect request's private data bind it to (uuid, epoch, lane), with a token made of the secret.
 * From then on the source's processor has no share in it: its memory is registered for remote READ
 * (export.c), the destination reads straight into its mapping of the guest's memfd
 * (import.c).
 *
 * A path has its own device context, protection domain and event channel; nothing is shared between paths,
 * or between two sides in one process. Registrations therefore end with the path, and so does all that
 * the peer may touch.
 *
 * Failure is noticed by the first completion with an error, by the device (port down, address gone), by
 * rdma_cm (peer gone), or by somebody above us (heartbeats); all end in pr_verbs_fail() or shutdown(),
 * of which the first one counts. It moves the queue pairs to the error state, so that all outstanding READs
 * complete, and wakes all threads.
 *
 * A READ is signalled at its end only, and each READ is: whoever waits for it wants to know now. A queue pair
 * completes in order, so the last piece of a READ stands for all of it. Any piece that fails has a completion.
 * READs that landed before the failure are reported as what they are, in place.
 *
 * Fence (drain): nobody posts any more → queue pairs in the error state → a marker is posted, and everything
 * up to it has completed, within the time → queue pairs destroyed, then the ids. Only our own queue pair
 * writes to our memory, so that is a complete fence whatever the peer does. A queue pair is never used again.
 * Once everything has completed, the fence is complete without the last step, which may have to wait
 * (deferred-free.c). If not everything has, the queue pairs are destroyed at once.
 *
 * Not handled: iWARP, whose path failures only show after TCP's timeouts; shared receive queues and on-demand
 * paging, which nothing here needs.
 */
#include "transport/rdma/path.h"

#include <string.h>

#include "transport/backends.h"

#define DRAIN_MS 1000 /* of a path that is destroyed without drain() */

static void stop_lanes(PrVerbsPath *path)
{
	g_mutex_lock(&path->qp_lock);
	for (guint i = 0; i < path->base.n_lanes; i++)
		pr_verbs_lane_stop(&path->lanes[i]);
	g_mutex_unlock(&path->qp_lock);
	pr_poll_set_wake(&path->events_waker);
}

void pr_verbs_fail(PrVerbsPath *path, const char *format, ...)
{
	g_autofree char *reason = NULL;
	va_list args;

	if (!pr_fate_end(&path->fate, PR_FATE_FAILED))
		return;
	va_start(args, format);
	reason = g_strdup_vprintf(format, args);
	va_end(args);
	stop_lanes(path);
	pr_fate_notify(&path->fate, reason);
}

static void path_free(PrVerbsPath *path)
{
	for (guint i = 0; i < path->base.n_lanes; i++)
		pr_verbs_lane_close(&path->lanes[i]);
	pr_verbs_source_mr_free(path);
	pr_verbs_destination_mr_free(path);
	pr_verbs_device_close(&path->rail);
	if (path->channel)
		rdma_destroy_event_channel(path->channel);
	pr_poll_set_clear(&path->events_waker);
	pr_fate_clear(&path->fate);
	g_mutex_clear(&path->qp_lock);
	g_mutex_clear(&path->import_lock);
	pr_uri_free(path->uri);
	g_free(path);
}

static void path_release(PrVerbsPath *path)
{
	if (path->rail.context)
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
	g_mutex_init(&path->import_lock);
	pr_fate_init(&path->fate, setup);
	for (guint i = 0; i < path->base.n_lanes; i++) {
		path->lanes[i].id = i;
		path->lanes[i].waker = PR_POLL_SET_INIT;
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

/* All of it may have to be pinned before the end. */
static uint64_t region_bytes(const PrPathSetup *setup)
{
	uint64_t bytes = 0;

	for (guint i = 0; i < setup->n_regions; i++)
		bytes += setup->regions[i].size;
	return bytes;
}

static gboolean accept_one(PrVerbsPath *path, PrDataListener *listener, const PrPathSetup *setup,
			   gint64 deadline, GError **error)
{
	PrLaneId lane;
	guint depth;
	struct rdma_cm_id *id =
		pr_verbs_listener_next(listener, setup, deadline, &lane, &depth, error);

	if (!id)
		return FALSE;
	if (lane >= path->base.n_lanes || path->lanes[lane].cm) {
		pr_verbs_reject(id, "this lane is connected already, or one too many");
		return TRUE;
	}
	return pr_verbs_accept_lane(path, &path->lanes[lane], setup, id, depth, deadline, error);
}

static gboolean has_all_lanes(const PrVerbsPath *path)
{
	for (guint i = 0; i < path->base.n_lanes; i++)
		if (!path->lanes[i].cm)
			return FALSE;
	return TRUE;
}

static gboolean accept_lanes(PrVerbsPath *path, PrDataListener *listener, const PrPathSetup *setup,
			     GError **error)
{
	gint64 deadline = pr_backend_deadline(setup->timeout_ms);
	gboolean ok = TRUE;

	pr_verbs_expect(listener, &setup->binding);
	while (ok && !has_all_lanes(path))
		ok = accept_one(path, listener, setup, deadline, error);
	pr_verbs_forget(listener, &setup->binding);
	return ok;
}

static PrDataPath *verbs_accept(PrDataListener *listener, const PrPathSetup *setup, GError **error)
{
	g_autoptr(PrVerbsPath) path = path_new(setup);

	if (!prepare(path, error) || !check_memlock(path, region_bytes(setup), error) ||
	    !accept_lanes(path, listener, setup, error) || !pr_verbs_events_start(path, error))
		return NULL;
	return &g_steal_pointer(&path)->base;
}

/* Registering comes last and has all the time it needs: the destination waits for connections, not for
 * grants. */
static PrDataPath *verbs_connect(const PrPathSetup *setup, GError **error)
{
	gint64 deadline = pr_backend_deadline(setup->timeout_ms);
	g_autoptr(PrVerbsPath) path = path_new(setup);

	path->exports = g_array_new(FALSE, FALSE, sizeof(PrVerbsSourceMr));
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

/* Data connections of rdma: never come in on the control port. */
static void verbs_offer(PrDataListener *listener, GSocketConnection *connection,
			const PrLaneHello *hello)
{
	g_object_unref(connection);
}

static void verbs_grants_within(PrDataPath *base, uint32_t block, uint64_t offset, uint64_t length,
				GArray *ret)
{
	PrVerbsPath *path = (PrVerbsPath *)base;
	g_autoptr(GError) error = NULL;

	if (path->exports && !pr_verbs_source_mr_within(path, block, offset, length, ret, &error))
		pr_verbs_fail(path, "%s", error->message);
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
	return pr_fate_is_up(&path->fate) &&
	       pr_verbs_lane_post(path, lane, block, offset, length, token);
}

static gboolean verbs_post_probe(PrDataPath *base, PrLaneId id, uint64_t token)
{
	PrVerbsPath *path = (PrVerbsPath *)base;

	return pr_fate_is_up(&path->fate) && pr_verbs_lane_probe(path, &path->lanes[id], token);
}

static guint verbs_poll(PrDataPath *base, PrLaneId id, PrCompletion *ret, guint max)
{
	PrVerbsPath *path = (PrVerbsPath *)base;

	return pr_verbs_lane_poll(path, &path->lanes[id], ret, max);
}

static int verbs_wait_fd(PrDataPath *base, PrLaneId id)
{
	return ((PrVerbsPath *)base)->lanes[id].waker.epoll_fd;
}

static gboolean verbs_arm(PrDataPath *base, PrLaneId id)
{
	PrVerbsPath *path = (PrVerbsPath *)base;

	return pr_verbs_lane_arm(path, &path->lanes[id]);
}

static const char *verbs_device(PrDataPath *base)
{
	return pr_verbs_device_name(&((PrVerbsPath *)base)->rail);
}

static void verbs_shutdown(PrDataPath *base)
{
	PrVerbsPath *path = (PrVerbsPath *)base;

	if (pr_fate_end(&path->fate, PR_FATE_SHUT))
		stop_lanes(path);
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
	/* Then that is the fence, and what is left takes the time that it takes. */
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

static gboolean verbs_admit_message(const PrUri *uri, gboolean outgoing, uint16_t type)
{
	return TRUE;
}

static const PrTransportOps verbs_ops = {
	.scheme = "rdma",
	.describe = pr_verbs_describe,
	.listen = pr_verbs_listen,
	.listener_port = pr_verbs_listener_port,
	.offer = verbs_offer,
	.listener_close = pr_verbs_listener_close,
	.expect = pr_verbs_expect,
	.forget = pr_verbs_forget,
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
	.admit_message = verbs_admit_message,
};

const PrTransportOps *const pr_transport_rdma = &verbs_ops;
