/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The thread that watches a path: what rdma_cm says about its connections and the device about its port.
 * A queue pair that only answers, as the source's do, or that is idle never notices by itself that its path
 * has died; this thread hears of what this host can know, the control channel's heartbeats of the
 * rest.
 *
 * It also watches, at the destination, over the deadline of urgent READs. Not by the clock alone: a process that
 * was stopped, or a host that was, finds all deadlines past when it goes on. A READ is late when it was seen
 * outstanding LOOKS times in a row, a deadline's part apart, while somebody was there to take its completion.
 */
#include <errno.h>
#include <string.h>

#include "util/try-alloc.h"
#include "transport/rdma/path.h"

static void judge_connection(PrVerbsPath *path, const PrVerbsEvent *event)
{
	const char *rail = pr_verbs_device_name(&path->rail);

	switch (event->type) {
	case RDMA_CM_EVENT_ESTABLISHED:
		break;
	case RDMA_CM_EVENT_DISCONNECTED:
	case RDMA_CM_EVENT_TIMEWAIT_EXIT:
		pr_verbs_fail(path, "the peer closed the connection, or has died");
		break;
	case RDMA_CM_EVENT_DEVICE_REMOVAL:
		g_atomic_int_set(&path->removed, TRUE);
		pr_verbs_fail(path, "rail %s: the device was removed", rail);
		break;
	case RDMA_CM_EVENT_ADDR_CHANGE:
		pr_verbs_fail(path, "rail %s: its network address has moved to another port", rail);
		break;
	default:
		pr_verbs_fail(path, "rail %s: %s (%d)", rail, rdma_event_str(event->type),
			      event->status);
	}
}

gboolean pr_verbs_has_address(const PrVerbsPath *path, const PrVerbsLane *lane)
{
	union ibv_gid now;

	return !lane->has_gid ||
	       (!ibv_query_gid(path->rail.context, path->rail.port, lane->gid_index, &now) &&
		!memcmp(&now, &lane->gid, sizeof(now)));
}

/* Some address of the port has changed: ours? */
static void check_addresses(PrVerbsPath *path)
{
	for (guint i = 0; i < path->base.n_lanes; i++)
		if (!pr_verbs_has_address(path, &path->lanes[i]))
			pr_verbs_fail(path, "rail %s: its address has gone (GID %u)",
				      pr_verbs_device_name(&path->rail), path->lanes[i].gid_index);
}

static void judge_port(PrVerbsPath *path, const struct ibv_async_event *event)
{
	if (event->element.port_num != path->rail.port)
		return;
	if (event->event_type == IBV_EVENT_GID_CHANGE)
		check_addresses(path);
	else if (event->event_type == IBV_EVENT_PORT_ERR)
		pr_verbs_fail(path,
			      "rail %s: port %u is DOWN; bring its link up or use another path",
			      pr_verbs_device_name(&path->rail), path->rail.port);
}

static void judge_device(PrVerbsPath *path, const struct ibv_async_event *event)
{
	switch (event->event_type) {
	case IBV_EVENT_PORT_ERR:
	case IBV_EVENT_GID_CHANGE:
		judge_port(path, event);
		break;
	case IBV_EVENT_DEVICE_FATAL:
	case IBV_EVENT_CQ_ERR:
	case IBV_EVENT_QP_FATAL:
	case IBV_EVENT_QP_REQ_ERR:
	case IBV_EVENT_QP_ACCESS_ERR:
		pr_verbs_fail(path, "rail %s: %s", pr_verbs_device_name(&path->rail),
			      ibv_event_type_str(event->event_type));
		break;
	default:
		g_debug("%s: rail %s: %s", path->fate.name, pr_verbs_device_name(&path->rail),
			ibv_event_type_str(event->event_type));
	}
}

/* Acknowledged first: whoever destroys a queue pair waits for that. */
static gboolean next_device_event(PrVerbsPath *path, struct ibv_async_event *ret)
{
	if (ibv_get_async_event(path->rail.context, ret))
		return FALSE;
	ibv_ack_async_event(ret);
	return TRUE;
}

#define LOOKS 5

/* An urgent lane as it was seen last. */
typedef struct Watch {
	gint64 oldest; /* the READ, by when it was posted */
	gint n_polls;
	guint n_seen;
} Watch;

typedef struct Watches {
	gint64 next_us; /* when to look again */
	Watch of[PR_LANES_MAX];
} Watches;

static void look_at_reads(PrVerbsPath *path, const PrVerbsLane *lane, Watch *watch)
{
	gint64 oldest = pr_verbs_lane_oldest(lane), age = g_get_monotonic_time() - oldest;
	gint n_polls = g_atomic_int_get(&lane->n_polls);

	if (oldest != watch->oldest)
		watch->n_seen = 0;
	else if (oldest && (g_atomic_int_get(&lane->asleep) || n_polls != watch->n_polls))
		watch->n_seen++;
	watch->oldest = oldest;
	watch->n_polls = n_polls;
	if (watch->n_seen >= LOOKS && age >= (gint64)path->options.read_deadline_ms * 1000)
		pr_verbs_fail(path,
			      "rail %s: an urgent READ has not come back for %" G_GINT64_FORMAT
			      " ms (read-deadline-ms is %u)",
			      pr_verbs_device_name(&path->rail), age / 1000,
			      path->options.read_deadline_ms);
}

/* Looks when it is time to. Returns for how many ms there is nothing to do, -1: for ever. */
static int watch_reads(PrVerbsPath *path, Watches *watches)
{
	gint64 now = g_get_monotonic_time();

	if (path->exports || !path->options.read_deadline_ms)
		return -1;
	if (now >= watches->next_us) {
		for (guint i = 0; i < path->base.n_lanes; i++)
			if (pr_lane_is_urgent(i))
				look_at_reads(path, &path->lanes[i], &watches->of[i]);
		watches->next_us = now + (gint64)path->options.read_deadline_ms * 1000 / LOOKS;
	}
	return (int)((watches->next_us - now) / 1000 + 1);
}

static gpointer event_thread(gpointer opaque)
{
	PrVerbsPath *path = opaque;
	struct pollfd fd = {.fd = path->events_waker.epoll_fd, .events = POLLIN};
	struct ibv_async_event device_event;
	PrVerbsEvent event;
	Watches watches = {0};

	while (pr_fate_is_up(&path->fate)) {
		int quiet_ms;

		while (pr_verbs_next_event(path->channel, &event))
			judge_connection(path, &event);
		while (next_device_event(path, &device_event))
			judge_device(path, &device_event);
		quiet_ms = watch_reads(path, &watches);
		if (pr_fate_is_up(&path->fate))
			poll(&fd, 1, quiet_ms);
	}
	return NULL;
}

gboolean pr_verbs_events_start(PrVerbsPath *path, GError **error)
{
	if (!pr_poll_set_add(&path->events_waker, path->channel->fd, error) ||
	    !pr_poll_set_add(&path->events_waker, path->rail.context->async_fd, error))
		return FALSE;
	path->events = pr_thread_try("pr-rdma-events", event_thread, path, error);
	return path->events != NULL;
}

void pr_verbs_events_join(PrVerbsPath *path)
{
	g_clear_pointer(&path->events, g_thread_join);
}
