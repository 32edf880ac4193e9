/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "transport/lane-rendezvous.h"

#include <string.h>

#include "util/try-alloc.h"

#define NOT_EXPECTED "no lane of this migration is expected here"

typedef struct PendingLane {
	gpointer lane; /* the backend's */
	PrLaneHello hello;
	gint64 expires; /* us, monotonic */
} PendingLane;

struct PrPendingLanes {
	/* Constant. */
	PrLaneRefuse refuse;
	gpointer opaque;
	GThread *expiry_thread;

	GMutex lock; /* of the rest */
	GCond changed;
	GQueue lanes;	  /* of PendingLane, oldest first */
	GArray *expected; /* of PrBinding */
	gboolean closing;
};

/* Refuses lanes that were unlinked under the lock. Called without it. */
static void refuse_all(PrPendingLanes *pending, GQueue *refused)
{
	PendingLane *held;

	while ((held = g_queue_pop_head(refused))) {
		pending->refuse(held->lane, NOT_EXPECTED, pending->opaque);
		g_free(held);
	}
}

static gboolean is_expected(PrPendingLanes *pending, const PrLaneHello *hello)
{
	for (guint i = 0; i < pending->expected->len; i++)
		if (pr_backend_binding_matches(&g_array_index(pending->expected, PrBinding, i),
					       hello))
			return TRUE;
	return FALSE;
}

/* Unlinks the lanes that are not expected, where any are. Under the lock. */
static void unlink_unexpected(PrPendingLanes *pending, GQueue *refused)
{
	GList *next;

	for (GList *link = pending->lanes.head; link && pending->expected->len; link = next) {
		PendingLane *held = link->data;

		next = link->next;
		if (is_expected(pending, &held->hello))
			continue;
		g_queue_delete_link(&pending->lanes, link);
		g_queue_push_tail(refused, held);
	}
}

/* Unlinks the lanes that have expired. Returns when the next one does, 0: there is none. Under
 * the lock. */
static gint64 unlink_expired(PrPendingLanes *pending, GQueue *refused)
{
	PendingLane *oldest;

	while ((oldest = g_queue_peek_head(&pending->lanes))) {
		if (oldest->expires > g_get_monotonic_time())
			return oldest->expires;
		g_queue_push_tail(refused, g_queue_pop_head(&pending->lanes));
	}
	return 0;
}

static gpointer expire_lanes(gpointer opaque)
{
	PrPendingLanes *pending = opaque;

	g_mutex_lock(&pending->lock);
	while (!pending->closing) {
		GQueue refused = G_QUEUE_INIT;
		gint64 next = unlink_expired(pending, &refused);

		if (!g_queue_is_empty(&refused)) {
			g_mutex_unlock(&pending->lock);
			refuse_all(pending, &refused);
			g_mutex_lock(&pending->lock);
		} else if (next) {
			g_cond_wait_until(&pending->changed, &pending->lock, next);
		} else {
			/* Ended by a lane that comes in, or by pr_pending_lanes_free(). */
			g_cond_wait(&pending->changed, &pending->lock);
		}
	}
	g_mutex_unlock(&pending->lock);
	return NULL;
}

PrPendingLanes *pr_pending_lanes_new(PrLaneRefuse refuse, gpointer opaque, GError **error)
{
	PrPendingLanes *pending = g_new0(PrPendingLanes, 1);

	pending->refuse = refuse;
	pending->opaque = opaque;
	g_mutex_init(&pending->lock);
	g_cond_init(&pending->changed);
	g_queue_init(&pending->lanes);
	pending->expected = g_array_new(FALSE, FALSE, sizeof(PrBinding));
	pending->expiry_thread = pr_thread_try("pr-lanes", expire_lanes, pending, error);
	if (pending->expiry_thread)
		return pending;
	pr_pending_lanes_free(pending);
	return NULL;
}

void pr_pending_lanes_free(PrPendingLanes *pending)
{
	if (!pending)
		return;
	g_mutex_lock(&pending->lock);
	pending->closing = TRUE;
	g_cond_broadcast(&pending->changed);
	g_mutex_unlock(&pending->lock);
	if (pending->expiry_thread)
		g_thread_join(pending->expiry_thread);
	refuse_all(pending, &pending->lanes);
	g_array_unref(pending->expected);
	g_mutex_clear(&pending->lock);
	g_cond_clear(&pending->changed);
	g_free(pending);
}

void pr_pending_lanes_offer(PrPendingLanes *pending, gpointer lane, const PrLaneHello *hello)
{
	GQueue refused = G_QUEUE_INIT;
	PendingLane *held = g_new0(PendingLane, 1);

	held->lane = lane;
	held->hello = *hello;
	held->expires = pr_backend_deadline(PR_PENDING_LANES_MS);
	g_mutex_lock(&pending->lock);
	g_queue_push_tail(&pending->lanes, held);
	unlink_unexpected(pending, &refused);
	if (pending->lanes.length > PR_PENDING_LANES_MAX)
		g_queue_push_tail(&refused, g_queue_pop_head(&pending->lanes));
	g_cond_broadcast(&pending->changed);
	g_mutex_unlock(&pending->lock);
	refuse_all(pending, &refused);
}

gpointer pr_pending_lanes_withdraw(PrPendingLanes *pending, GEqualFunc matches, gconstpointer with)
{
	gpointer found = NULL;

	g_mutex_lock(&pending->lock);
	for (GList *link = pending->lanes.head; link && !found; link = link->next) {
		PendingLane *held = link->data;

		if (!matches(held->lane, with))
			continue;
		found = held->lane;
		g_free(held);
		g_queue_delete_link(&pending->lanes, link);
		break;
	}
	g_mutex_unlock(&pending->lock);
	return found;
}

static gboolean find_expected(PrPendingLanes *pending, const PrBinding *binding, guint *ret)
{
	PrLaneHello hello;

	pr_backend_lane_hello(&hello, binding, PR_LANE_URGENT);
	for (guint i = 0; i < pending->expected->len; i++) {
		if (!pr_backend_binding_matches(&g_array_index(pending->expected, PrBinding, i),
						&hello))
			continue;
		*ret = i;
		return TRUE;
	}
	return FALSE;
}

void pr_pending_lanes_expect(PrPendingLanes *pending, const PrBinding *binding)
{
	GQueue refused = G_QUEUE_INIT;
	guint at;

	g_mutex_lock(&pending->lock);
	if (!find_expected(pending, binding, &at))
		g_array_append_val(pending->expected, *binding);
	unlink_unexpected(pending, &refused);
	g_mutex_unlock(&pending->lock);
	refuse_all(pending, &refused);
}

void pr_pending_lanes_forget(PrPendingLanes *pending, const PrBinding *binding)
{
	guint at;

	g_mutex_lock(&pending->lock);
	if (find_expected(pending, binding, &at))
		g_array_remove_index(pending->expected, at);
	g_mutex_unlock(&pending->lock);
}

void pr_pending_lanes_refuse(PrPendingLanes *pending, gpointer arrival, const char *reason)
{
	pending->refuse(arrival, reason, pending->opaque);
}

static void on_cancelled(GCancellable *cancel, gpointer opaque)
{
	PrPendingLanes *pending = opaque;

	g_mutex_lock(&pending->lock);
	g_cond_broadcast(&pending->changed);
	g_mutex_unlock(&pending->lock);
}

/* Under the lock. NULL: none has come yet. */
static gpointer take_matching(PrPendingLanes *pending, const PrBinding *binding, PrLaneId *ret_lane)
{
	for (GList *link = pending->lanes.head; link; link = link->next) {
		PendingLane *held = link->data;
		gpointer lane = held->lane;

		if (!pr_backend_binding_matches(binding, &held->hello))
			continue;
		*ret_lane = held->hello.lane;
		g_free(held);
		g_queue_delete_link(&pending->lanes, link);
		return lane;
	}
	return NULL;
}

gpointer pr_pending_lanes_claim(PrPendingLanes *pending, const PrPathSetup *setup, gint64 deadline,
				PrLaneId *ret_lane, GError **error)
{
	gboolean cancelled = FALSE, in_time = TRUE;
	gulong on_cancel = 0;
	gpointer lane;

	if (setup->cancel)
		on_cancel = g_cancellable_connect(setup->cancel, G_CALLBACK(on_cancelled), pending,
						  NULL);
	g_mutex_lock(&pending->lock);
	while (!(lane = take_matching(pending, &setup->binding, ret_lane)) && in_time &&
	       !(cancelled = g_cancellable_is_cancelled(setup->cancel)))
		in_time = g_cond_wait_until(&pending->changed, &pending->lock, deadline);
	g_mutex_unlock(&pending->lock);
	g_cancellable_disconnect(setup->cancel, on_cancel);
	if (lane)
		return lane;
	if (cancelled)
		g_cancellable_set_error_if_cancelled(setup->cancel, error);
	else
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_TIMEOUT,
			    "no answer in time; is the peer alive, and is a firewall in between?");
	g_autofree char *path = pr_uri_address(setup->uri);
	g_prefix_error(error, "path %s: waiting for the source's data lanes: ", path);
	return NULL;
}
