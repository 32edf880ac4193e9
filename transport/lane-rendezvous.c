/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "transport/lane-rendezvous.h"

#include <string.h>

#include "util/try-alloc.h"

#define NOBODY_WAITS "it waits for no such migration"

typedef struct Arrival {
	gpointer what;
	PrLaneHello hello;
	gint64 expires; /* monotonic, microseconds */
} Arrival;

struct PrPendingLanes {
	/* constant */
	PrDeskRefuse refuse;
	gpointer opaque;
	GThread *janitor; /* lets arrivals expire */

	GMutex lock; /* of all that follows */
	GCond changed;
	GQueue arrivals;  /* of Arrival, oldest first */
	GArray *expected; /* of PrBinding */
	gboolean closing;
};

/* Takes arrivals that were unlinked under the lock; without it. */
static void refuse_all(PrPendingLanes *desk, GQueue *refused)
{
	Arrival *arrival;

	while ((arrival = g_queue_pop_head(refused))) {
		desk->refuse(arrival->what, NOBODY_WAITS, desk->opaque);
		g_free(arrival);
	}
}

static gboolean is_expected(PrPendingLanes *desk, const PrLaneHello *hello)
{
	for (guint i = 0; i < desk->expected->len; i++)
		if (pr_backend_binding_matches(&g_array_index(desk->expected, PrBinding, i), hello))
			return TRUE;
	return FALSE;
}

/* Unlinks what has no hope. Under the lock. */
static void sort_out(PrPendingLanes *desk, GQueue *refused)
{
	GList *next;

	for (GList *link = desk->arrivals.head; link && desk->expected->len; link = next) {
		Arrival *arrival = link->data;

		next = link->next;
		if (is_expected(desk, &arrival->hello))
			continue;
		g_queue_delete_link(&desk->arrivals, link);
		g_queue_push_tail(refused, arrival);
	}
}

/* Returns when to look again, 0 for never. Under the lock. */
static gint64 expire(PrPendingLanes *desk, GQueue *refused)
{
	Arrival *oldest;

	while ((oldest = g_queue_peek_head(&desk->arrivals))) {
		if (oldest->expires > g_get_monotonic_time())
			return oldest->expires;
		g_queue_push_tail(refused, g_queue_pop_head(&desk->arrivals));
	}
	return 0;
}

static gpointer janitor_thread(gpointer opaque)
{
	PrPendingLanes *desk = opaque;

	g_mutex_lock(&desk->lock);
	while (!desk->closing) {
		GQueue refused = G_QUEUE_INIT;
		gint64 next = expire(desk, &refused);

		if (!g_queue_is_empty(&refused)) {
			g_mutex_unlock(&desk->lock);
			refuse_all(desk, &refused);
			g_mutex_lock(&desk->lock);
		} else if (next) {
			g_cond_wait_until(&desk->changed, &desk->lock, next);
		} else {
			/* Ended by an arrival, or by closing. */
			g_cond_wait(&desk->changed, &desk->lock);
		}
	}
	g_mutex_unlock(&desk->lock);
	return NULL;
}

PrPendingLanes *pr_pending_lanes_new(PrDeskRefuse refuse, gpointer opaque, GError **error)
{
	PrPendingLanes *desk = g_new0(PrPendingLanes, 1);

	desk->refuse = refuse;
	desk->opaque = opaque;
	g_mutex_init(&desk->lock);
	g_cond_init(&desk->changed);
	g_queue_init(&desk->arrivals);
	desk->expected = g_array_new(FALSE, FALSE, sizeof(PrBinding));
	desk->janitor = pr_thread_try("pr-lanes", janitor_thread, desk, error);
	if (desk->janitor)
		return desk;
	pr_pending_lanes_free(desk);
	return NULL;
}

void pr_pending_lanes_free(PrPendingLanes *desk)
{
	if (!desk)
		return;
	g_mutex_lock(&desk->lock);
	desk->closing = TRUE;
	g_cond_broadcast(&desk->changed);
	g_mutex_unlock(&desk->lock);
	if (desk->janitor)
		g_thread_join(desk->janitor);
	refuse_all(desk, &desk->arrivals);
	g_array_unref(desk->expected);
	g_mutex_clear(&desk->lock);
	g_cond_clear(&desk->changed);
	g_free(desk);
}

void pr_pending_lanes_offer(PrPendingLanes *desk, gpointer what, const PrLaneHello *hello)
{
	GQueue refused = G_QUEUE_INIT;
	Arrival *arrival = g_new0(Arrival, 1);

	arrival->what = what;
	arrival->hello = *hello;
	arrival->expires = pr_backend_deadline(PR_DESK_HOLD_MS);
	g_mutex_lock(&desk->lock);
	g_queue_push_tail(&desk->arrivals, arrival);
	sort_out(desk, &refused);
	if (desk->arrivals.length > PR_DESK_HELD)
		g_queue_push_tail(&refused, g_queue_pop_head(&desk->arrivals));
	g_cond_broadcast(&desk->changed);
	g_mutex_unlock(&desk->lock);
	refuse_all(desk, &refused);
}

gpointer pr_pending_lanes_withdraw(PrPendingLanes *desk, GEqualFunc matches, gconstpointer what)
{
	gpointer found = NULL;

	g_mutex_lock(&desk->lock);
	for (GList *link = desk->arrivals.head; link && !found; link = link->next) {
		Arrival *arrival = link->data;

		if (!matches(arrival->what, what))
			continue;
		found = arrival->what;
		g_free(arrival);
		g_queue_delete_link(&desk->arrivals, link);
		break;
	}
	g_mutex_unlock(&desk->lock);
	return found;
}

static gboolean find_expected(PrPendingLanes *desk, const PrBinding *binding, guint *ret)
{
	PrLaneHello hello;

	pr_backend_lane_hello(&hello, binding, PR_LANE_URGENT);
	for (guint i = 0; i < desk->expected->len; i++) {
		if (!pr_backend_binding_matches(&g_array_index(desk->expected, PrBinding, i),
						&hello))
			continue;
		*ret = i;
		return TRUE;
	}
	return FALSE;
}

void pr_pending_lanes_expect(PrPendingLanes *desk, const PrBinding *binding)
{
	GQueue refused = G_QUEUE_INIT;
	guint at;

	g_mutex_lock(&desk->lock);
	if (!find_expected(desk, binding, &at))
		g_array_append_val(desk->expected, *binding);
	sort_out(desk, &refused);
	g_mutex_unlock(&desk->lock);
	refuse_all(desk, &refused);
}

void pr_pending_lanes_forget(PrPendingLanes *desk, const PrBinding *binding)
{
	guint at;

	g_mutex_lock(&desk->lock);
	if (find_expected(desk, binding, &at))
		g_array_remove_index(desk->expected, at);
	g_mutex_unlock(&desk->lock);
}

void pr_pending_lanes_refuse(PrPendingLanes *desk, gpointer arrival, const char *reason)
{
	desk->refuse(arrival, reason, desk->opaque);
}

static void on_cancelled(GCancellable *cancel, gpointer opaque)
{
	PrPendingLanes *desk = opaque;

	g_mutex_lock(&desk->lock);
	g_cond_broadcast(&desk->changed);
	g_mutex_unlock(&desk->lock);
}

/* Under the lock. NULL: it has not come yet. */
static gpointer take_matching(PrPendingLanes *desk, const PrBinding *binding, PrLaneId *ret_lane)
{
	for (GList *link = desk->arrivals.head; link; link = link->next) {
		Arrival *arrival = link->data;
		gpointer what = arrival->what;

		if (!pr_backend_binding_matches(binding, &arrival->hello))
			continue;
		*ret_lane = arrival->hello.lane;
		g_free(arrival);
		g_queue_delete_link(&desk->arrivals, link);
		return what;
	}
	return NULL;
}

gpointer pr_pending_lanes_claim(PrPendingLanes *desk, const PrPathSetup *setup, gint64 deadline,
				PrLaneId *ret_lane, GError **error)
{
	gboolean cancelled = FALSE, in_time = TRUE;
	gulong on_cancel = 0;
	gpointer what;

	if (setup->cancel)
		on_cancel =
			g_cancellable_connect(setup->cancel, G_CALLBACK(on_cancelled), desk, NULL);
	g_mutex_lock(&desk->lock);
	while (!(what = take_matching(desk, &setup->binding, ret_lane)) && in_time &&
	       !(cancelled = g_cancellable_is_cancelled(setup->cancel)))
		in_time = g_cond_wait_until(&desk->changed, &desk->lock, deadline);
	g_mutex_unlock(&desk->lock);
	g_cancellable_disconnect(setup->cancel, on_cancel);
	if (what)
		return what;
	if (cancelled)
		g_cancellable_set_error_if_cancelled(setup->cancel, error);
	else
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_TIMEOUT,
			    "no answer in time; is the peer alive, and is a firewall in between?");
	g_prefix_error(error, "path %s: waiting for the source's data lanes: ", setup->uri->text);
	return NULL;
}
