/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The transport that injects faults. plan.c decides which fault is due when. */
#include "transport/faulty/faulty.h"

#include <string.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "transport/backend.h"
#include "transport/backends.h"
#include "transport/faulty/plan.h"
#include "transport/registry.h"

#define POLL_BATCH 16

typedef struct HeldCompletion {
	PrCompletion completion;
	gint64 due; /* monotonic, microseconds */
} HeldCompletion;

typedef struct PostedRead {
	uint64_t token;
	uint8_t *at; /* where it lands */
	uint32_t length;
} PostedRead;

/* Owned by the thread that uses the lane; any thread wakes. */
typedef struct FaultyLane {
	PrPollSet poll_set; /* watches the inner lane's fd and the timer */
	int timer_fd;	    /* for the first held completion */
	GArray *held;	    /* of HeldCompletion, by due time */
	GArray *stalled;    /* of uint64_t, tokens of READs that were never posted */
	GArray *posted;	    /* of PostedRead, handed to the inner path and not completed */
} FaultyLane;

typedef struct FaultyPath {
	PrDataPath base;
	PrFaultyHook hook; /* through which plan.c cuts or stalls this path */
	PrPathLife life;   /* thread-safe */
	PrFaults *faults;
	PrDataPath *inner;	 /* constant once opened */
	int stalled;		 /* atomic, once set stays */
	const PrRegion *regions; /* constant, as is n_regions */
	guint n_regions;
	/* Constant. Not 0: this path has incremental grants, and registers so slowly. */
	guint us_per_mib;
	GMutex granted_lock;		/* of granted */
	GArray *granted;		/* of PrGrant: what may be read where us_per_mib is not 0 */
	FaultyLane lanes[PR_LANES_MAX]; /* base.n_lanes of them */
} FaultyPath;

typedef struct FaultyListener {
	PrDataListener base;
	PrDataListener *inner;
} FaultyListener;

/* The URI for the inner backend: without "faulty+" and our options. */
static PrUri *inner_uri(const PrUri *uri)
{
	PrUri *inner = pr_uri_copy(uri);

	g_free(inner->scheme);
	inner->scheme = g_strdup(uri->scheme + strlen(PR_FAULTY_PREFIX));
	pr_faults_strip_options(inner);
	return inner;
}

static const PrTransportOps *inner_ops(const PrUri *uri, GError **error)
{
	return pr_transport_find(uri->scheme + strlen(PR_FAULTY_PREFIX), error);
}

static PrDataListener *faulty_listen(const PrUri *uri, GError **error)
{
	const PrTransportOps *ops = inner_ops(uri, error);
	g_autoptr(PrUri) inner = NULL;
	FaultyListener *listener;
	PrDataListener *opened;

	if (!ops || !pr_faults_check_options(uri, error))
		return NULL;
	inner = inner_uri(uri);
	opened = ops->listen(inner, error);
	if (!opened)
		return NULL;
	listener = g_new0(FaultyListener, 1);
	listener->base.ops = &pr_transport_faulty;
	listener->inner = opened;
	return &listener->base;
}

static uint16_t faulty_listener_port(PrDataListener *base)
{
	PrDataListener *inner = ((FaultyListener *)base)->inner;

	return inner->ops->listener_port(inner);
}

static void faulty_offer(PrDataListener *base, GSocketConnection *connection,
			 const PrLaneHello *hello)
{
	PrDataListener *inner = ((FaultyListener *)base)->inner;

	inner->ops->offer(inner, connection, hello);
}

static void faulty_expect(PrDataListener *base, const PrBinding *binding)
{
	PrDataListener *inner = ((FaultyListener *)base)->inner;

	inner->ops->expect(inner, binding);
}

static void faulty_forget(PrDataListener *base, const PrBinding *binding)
{
	PrDataListener *inner = ((FaultyListener *)base)->inner;

	inner->ops->forget(inner, binding);
}

static void faulty_listener_close(PrDataListener *base)
{
	pr_data_listener_close(((FaultyListener *)base)->inner);
	g_free(base);
}

static void wake_lanes(FaultyPath *path)
{
	for (guint i = 0; i < path->base.n_lanes; i++)
		pr_poll_set_wake(&path->lanes[i].poll_set);
}

static void stop_path(PrDataPath *base)
{
	FaultyPath *path = (FaultyPath *)base;

	path->inner->ops->shutdown(path->inner);
	wake_lanes(path);
}

static void on_inner_failed(const GError *reason, void *opaque)
{
	FaultyPath *path = opaque;

	if (!pr_path_life_end(&path->life, PR_PATH_LIFE_FAILED))
		return;
	wake_lanes(path);
	path->life.on_failed(reason, path->life.opaque);
}

static FaultyPath *path_of(PrFaultyHook *hook)
{
	return (FaultyPath *)((char *)hook - G_STRUCT_OFFSET(FaultyPath, hook));
}

static void cut_now(PrFaultyHook *hook)
{
	pr_path_life_fail(&path_of(hook)->life, "cut by request");
}

static void stall_now(PrFaultyHook *hook)
{
	g_atomic_int_set(&path_of(hook)->stalled, 1);
}

static void path_free(FaultyPath *path)
{
	if (path->hook.cut)
		pr_faults_detach(path->faults, &path->hook);
	pr_data_path_destroy(path->inner);
	for (guint i = 0; i < path->base.n_lanes; i++) {
		FaultyLane *lane = &path->lanes[i];

		pr_poll_set_clear(&lane->poll_set);
		if (lane->timer_fd >= 0)
			close(lane->timer_fd);
		g_array_unref(lane->held);
		g_array_unref(lane->stalled);
		g_array_unref(lane->posted);
	}
	pr_faults_free(path->faults);
	g_array_unref(path->granted);
	g_mutex_clear(&path->granted_lock);
	pr_path_life_clear(&path->life);
	g_free(path);
}
G_DEFINE_AUTOPTR_CLEANUP_FUNC(FaultyPath, path_free)

static FaultyPath *path_new(const PrPathSetup *setup, GError **error)
{
	g_autoptr(FaultyPath) path = g_new0(FaultyPath, 1);
	gboolean ok = TRUE;

	path->base.ops = &pr_transport_faulty;
	path->base.n_lanes = pr_backend_n_lanes(setup);
	path->faults = pr_faults_for_uri(setup->uri);
	pr_path_life_init(&path->life, setup, &path->base, stop_path);
	path->regions = setup->regions;
	path->n_regions = setup->n_regions;
	path->us_per_mib = (guint)pr_faults_incremental_grants_us(path->faults);
	path->granted = g_array_new(FALSE, FALSE, sizeof(PrGrant));
	g_mutex_init(&path->granted_lock);
	for (guint i = 0; i < path->base.n_lanes; i++) {
		FaultyLane *lane = &path->lanes[i];

		lane->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
		lane->held = g_array_new(FALSE, FALSE, sizeof(HeldCompletion));
		lane->stalled = g_array_new(FALSE, FALSE, sizeof(uint64_t));
		lane->posted = g_array_new(FALSE, FALSE, sizeof(PostedRead));
		ok = ok && pr_poll_set_init(&lane->poll_set, error) &&
		     pr_poll_set_add(&lane->poll_set, lane->timer_fd, error);
	}
	return ok ? g_steal_pointer(&path) : NULL;
}

static PrDataPath *path_opened(FaultyPath *path)
{
	path->base.incremental_grants = path->inner->incremental_grants || path->us_per_mib;
	path->hook.cut = cut_now;
	path->hook.stall = stall_now;
	pr_faults_attach(path->faults, &path->hook);
	return &path->base;
}

/* The setup for the inner backend; *ret_uri has to outlive it. */
static PrPathSetup inner_setup(FaultyPath *path, const PrPathSetup *setup, PrUri **ret_uri)
{
	PrPathSetup inner = *setup;

	*ret_uri = inner_uri(setup->uri);
	inner.uri = *ret_uri;
	inner.on_failed = on_inner_failed;
	inner.opaque = path;
	return inner;
}

static PrDataPath *faulty_accept(PrDataListener *base, const PrPathSetup *setup, GError **error)
{
	PrDataListener *listener = ((FaultyListener *)base)->inner;
	g_autoptr(FaultyPath) path = NULL;
	g_autoptr(PrUri) uri = NULL;
	PrPathSetup inner;

	if (!pr_faults_check_options(setup->uri, error))
		return NULL;
	path = path_new(setup, error);
	if (!path)
		return NULL;
	inner = inner_setup(path, setup, &uri);
	path->inner = listener->ops->accept(listener, &inner, error);
	if (!path->inner)
		return NULL;
	for (guint i = 0; i < path->base.n_lanes; i++)
		if (!pr_poll_set_add(&path->lanes[i].poll_set,
				     path->inner->ops->wait_fd(path->inner, i), error))
			return NULL;
	return path_opened(g_steal_pointer(&path));
}

static PrDataPath *faulty_connect(const PrPathSetup *setup, GError **error)
{
	const PrTransportOps *ops = inner_ops(setup->uri, error);
	g_autoptr(FaultyPath) path = NULL;
	g_autoptr(PrUri) uri = NULL;
	PrPathSetup inner;

	if (!ops || !pr_faults_check_options(setup->uri, error))
		return NULL;
	path = path_new(setup, error);
	if (!path)
		return NULL;
	inner = inner_setup(path, setup, &uri);
	path->inner = ops->connect(&inner, error);
	return path->inner ? path_opened(g_steal_pointer(&path)) : NULL;
}

/* Appends grants of the data in a range, as a transport does that cannot read holes. */
static void grant_data(const PrRegion *region, uint32_t block, uint64_t from, uint64_t to,
		       GArray *ret)
{
	off_t base = (off_t)region->memfd_offset;

	while (from < to) {
		off_t data = lseek(region->memfd, base + (off_t)from, SEEK_DATA);
		off_t hole = data < 0 ? -1 : lseek(region->memfd, data, SEEK_HOLE);

		if (hole < 0 || data - base >= (off_t)to)
			return;
		from = (uint64_t)(data - base);
		PrGrant grant = {block, from, MIN((uint64_t)(hole - base), to) - from, 0, 0};
		g_array_append_val(ret, grant);
		from += grant.length;
	}
}

static void faulty_grants_within(PrDataPath *base, uint32_t block, uint64_t offset, uint64_t length,
				 GArray *ret)
{
	FaultyPath *path = (FaultyPath *)base;

	if (!path->us_per_mib) {
		path->inner->ops->grants_within(path->inner, block, offset, length, ret);
		return;
	}
	g_usleep(path->us_per_mib * MAX(1, length >> 20));
	grant_data(&path->regions[block], block, offset, offset + length, ret);
}

static GArray *faulty_grants(PrDataPath *base)
{
	FaultyPath *path = (FaultyPath *)base;
	GArray *grants;

	if (!path->us_per_mib)
		return path->inner->ops->grants(path->inner);
	grants = g_array_new(FALSE, FALSE, sizeof(PrGrant));
	for (guint i = 0; i < path->n_regions; i++)
		faulty_grants_within(base, i, 0, path->regions[i].size, grants);
	return grants;
}

static void faulty_add_grants(PrDataPath *base, const PrGrant *grants, guint n)
{
	FaultyPath *path = (FaultyPath *)base;

	if (!path->us_per_mib) {
		path->inner->ops->add_grants(path->inner, grants, n);
		return;
	}
	g_mutex_lock(&path->granted_lock);
	g_array_append_vals(path->granted, grants, n);
	g_mutex_unlock(&path->granted_lock);
}

static void faulty_set_grants(PrDataPath *base, const PrGrant *grants, guint n)
{
	FaultyPath *path = (FaultyPath *)base;

	if (path->us_per_mib)
		faulty_add_grants(base, grants, n);
	else
		path->inner->ops->set_grants(path->inner, grants, n);
}

/* Whether a READ stays within the grants. */
static gboolean is_granted(FaultyPath *path, uint32_t block, uint64_t at, uint64_t end)
{
	gboolean found = TRUE;

	if (!path->us_per_mib)
		return TRUE;
	g_mutex_lock(&path->granted_lock);
	while (found && at < end) {
		found = FALSE;
		for (guint i = 0; i < path->granted->len && !found; i++) {
			const PrGrant *grant = &g_array_index(path->granted, PrGrant, i);

			found = grant->block == block && at >= grant->offset &&
				at - grant->offset < grant->length;
			if (found)
				at = grant->offset + grant->length;
		}
	}
	g_mutex_unlock(&path->granted_lock);
	return found;
}

static guint faulty_max_reads(PrDataPath *base, PrLaneId id)
{
	PrDataPath *inner = ((FaultyPath *)base)->inner;

	return inner->ops->max_reads(inner, id);
}

static gboolean faulty_post_read(PrDataPath *base, PrLaneId id, uint32_t block, uint64_t offset,
				 uint32_t length, uint64_t token)
{
	FaultyPath *path = (FaultyPath *)base;

	if (!pr_path_life_is_up(&path->life))
		return FALSE;
	if (!is_granted(path, block, offset, offset + length)) {
		g_critical("a READ at %" G_GUINT64_FORMAT " of RAM block %u was not granted",
			   offset, block);
		pr_path_life_fail(&path->life, "a READ of memory that was not granted");
		return FALSE;
	}
	switch (pr_faults_on_read(path->faults)) {
	case PR_FAULT_CUT:
		pr_path_life_fail(&path->life, "cut by fault injection, at a READ");
		return FALSE;
	case PR_FAULT_STALL:
		g_atomic_int_set(&path->stalled, 1);
		break;
	case PR_FAULT_CORRUPT:
	case PR_FAULT_NONE:
		break;
	}
	if (!g_atomic_int_get(&path->stalled)) {
		PostedRead posted = {token, (uint8_t *)path->regions[block].addr + offset, length};

		g_array_append_val(path->lanes[id].posted, posted);
		return path->inner->ops->post_read(path->inner, id, block, offset, length, token);
	}
	g_array_append_val(path->lanes[id].stalled, token);
	return TRUE;
}

/* Probes are not counted: their number depends on timing. */
static gboolean faulty_post_probe(PrDataPath *base, PrLaneId id, uint64_t token)
{
	FaultyPath *path = (FaultyPath *)base;

	if (!pr_path_life_is_up(&path->life))
		return FALSE;
	if (!g_atomic_int_get(&path->stalled))
		return path->inner->ops->post_probe(path->inner, id, token);
	g_array_append_val(path->lanes[id].stalled, token);
	return TRUE;
}

/* Removes a READ that has landed from `posted`. `corrupt`: flips a bit in its middle. */
static void remove_posted(FaultyLane *lane, uint64_t token, gboolean corrupt)
{
	for (guint i = 0; i < lane->posted->len; i++) {
		const PostedRead *posted = &g_array_index(lane->posted, PostedRead, i);

		if (posted->token != token)
			continue;
		if (corrupt)
			posted->at[posted->length / 2] ^= 0x10;
		g_array_remove_index_fast(lane->posted, i);
		return;
	}
}

/* Holds a completion of the inner path until it is due. */
static void hold(FaultyPath *path, FaultyLane *lane, const PrCompletion *completion)
{
	HeldCompletion held = {
		.completion = *completion,
		.due = g_get_monotonic_time() + (gint64)pr_faults_delay_ms(path->faults) * 1000,
	};

	PrFault fault = completion->ok ? pr_faults_on_completion(path->faults) : PR_FAULT_NONE;
	if (fault == PR_FAULT_CUT) {
		held.completion.ok = FALSE;
		pr_path_life_fail(&path->life, "READ failed by fault injection");
	}
	remove_posted(lane, completion->token, fault == PR_FAULT_CORRUPT);
	g_array_append_val(lane->held, held);
}

static guint release_held(FaultyLane *lane, gboolean up, PrCompletion *ret, guint max)
{
	gint64 now = g_get_monotonic_time();
	guint n = 0;

	for (; n < max && n < lane->held->len; n++) {
		HeldCompletion *held = &g_array_index(lane->held, HeldCompletion, n);

		if (up && held->due > now)
			break;
		ret[n] = held->completion;
		ret[n].ok = ret[n].ok && up;
	}
	if (n)
		g_array_remove_range(lane->held, 0, n);
	return n;
}

static guint release_stalled(FaultyLane *lane, PrCompletion *ret, guint max)
{
	guint n = MIN(max, lane->stalled->len);

	for (guint i = 0; i < n; i++)
		ret[i] = (PrCompletion){
			.token = g_array_index(lane->stalled, uint64_t, i),
			.ok = FALSE,
		};
	if (n)
		g_array_remove_range(lane->stalled, 0, n);
	return n;
}

static guint faulty_poll(PrDataPath *base, PrLaneId id, PrCompletion *ret, guint max)
{
	FaultyPath *path = (FaultyPath *)base;
	FaultyLane *lane = &path->lanes[id];
	PrCompletion batch[POLL_BATCH];
	guint n = path->inner->ops->poll(path->inner, id, batch, MIN(max, POLL_BATCH));
	gboolean up;

	for (guint i = 0; i < n; i++)
		hold(path, lane, &batch[i]);
	up = pr_path_life_is_up(&path->life);
	n = release_held(lane, up, ret, max);
	if (!up)
		n += release_stalled(lane, ret + n, max - n);
	return n;
}

static int faulty_wait_fd(PrDataPath *base, PrLaneId id)
{
	return ((FaultyPath *)base)->lanes[id].poll_set.epoll_fd;
}

/* Sets the timer for the first held completion; without one clears it. FALSE: the first one is
 * due. */
static gboolean arm_timer(FaultyLane *lane)
{
	struct itimerspec when = {{0}};
	gint64 due = 0;

	if (lane->held->len)
		due = g_array_index(lane->held, HeldCompletion, 0).due;
	if (due && due <= g_get_monotonic_time())
		return FALSE;
	when.it_value.tv_sec = due / G_USEC_PER_SEC;
	when.it_value.tv_nsec = due % G_USEC_PER_SEC * 1000;
	timerfd_settime(lane->timer_fd, TFD_TIMER_ABSTIME, &when, NULL);
	return TRUE;
}

static gboolean faulty_arm(PrDataPath *base, PrLaneId id)
{
	FaultyPath *path = (FaultyPath *)base;

	return pr_path_life_is_up(&path->life) && arm_timer(&path->lanes[id]) &&
	       path->inner->ops->arm(path->inner, id);
}

static const char *faulty_device(PrDataPath *base)
{
	PrDataPath *inner = ((FaultyPath *)base)->inner;

	return inner->ops->device(inner);
}

static void faulty_shutdown(PrDataPath *base)
{
	pr_path_life_shut(&((FaultyPath *)base)->life);
}

static gboolean faulty_drain(PrDataPath *base, guint timeout_ms)
{
	FaultyPath *path = (FaultyPath *)base;

	faulty_shutdown(base);
	for (guint i = 0; i < path->base.n_lanes; i++) {
		g_array_set_size(path->lanes[i].held, 0);
		g_array_set_size(path->lanes[i].stalled, 0);
	}
	return path->inner->ops->drain(path->inner, timeout_ms);
}

static void faulty_destroy(PrDataPath *base)
{
	faulty_shutdown(base);
	path_free((FaultyPath *)base);
}

static gboolean faulty_admit_message(const PrUri *uri, gboolean outgoing, uint16_t type)
{
	g_autoptr(PrFaults) faults = NULL;

	/* Heartbeats are not counted: their number depends on timing. */
	if (type == PR_MSG_HEARTBEAT)
		return TRUE;
	faults = pr_faults_for_uri(uri);
	return pr_faults_on_message(faults) == PR_FAULT_NONE;
}

static void faulty_describe(GString *out)
{
	pr_backend_describe(out, PR_FAULTY_PREFIX "SCHEME:HOST:PORT",
			    "the same with faults injected, for tests");
	pr_faults_describe(out);
}

const PrTransportOps pr_transport_faulty = {
	.scheme = PR_FAULTY_PREFIX,
	.describe = faulty_describe,
	.listen = faulty_listen,
	.listener_port = faulty_listener_port,
	.offer = faulty_offer,
	.listener_close = faulty_listener_close,
	.expect = faulty_expect,
	.forget = faulty_forget,
	.accept = faulty_accept,
	.connect = faulty_connect,
	.grants = faulty_grants,
	.grants_within = faulty_grants_within,
	.set_grants = faulty_set_grants,
	.add_grants = faulty_add_grants,
	.max_reads = faulty_max_reads,
	.post_read = faulty_post_read,
	.post_probe = faulty_post_probe,
	.poll = faulty_poll,
	.wait_fd = faulty_wait_fd,
	.arm = faulty_arm,
	.device = faulty_device,
	.shutdown = faulty_shutdown,
	.drain = faulty_drain,
	.destroy = faulty_destroy,
	.admit_message = faulty_admit_message,
};
