/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Theory of operation: the thread that watches a path
 *
 * The thread reads what rdma_cm reports about the path's connections, and what the device reports
 * about its port. A queue pair that only answers, as the source's do, never notices by itself
 * that its path has died; nor does an idle one. This thread learns what this host can know. The
 * heartbeats of the control channel show the rest.
 *
 * At the destination the thread also enforces the deadline of urgent READs (read-deadline-ms, see
 * options.c). The clock alone is not enough: when a process or host was stopped, all deadlines
 * have passed as it continues. So a READ is late only if two things are true: its deadline has
 * passed, and the thread found it outstanding LOOKS times in a row, a LOOKS-th of the deadline
 * apart, while the lane's thread was there to take its completion.
 *
 * The thread ends when the path has ended; it sleeps without a limit where no deadline has to be
 * enforced.
 */
#include <errno.h>
#include <string.h>

#include "transport/rdma/path.h"
#include "util/try-alloc.h"

static void handle_cm_event(PrVerbsPath *path, const PrVerbsEvent *event)
{
	switch (event->type) {
	case RDMA_CM_EVENT_ESTABLISHED:
		break;
	case RDMA_CM_EVENT_DISCONNECTED:
	case RDMA_CM_EVENT_TIMEWAIT_EXIT:
		pr_path_life_fail_closed(&path->life);
		break;
	case RDMA_CM_EVENT_DEVICE_REMOVAL:
		g_atomic_int_set(&path->removed, TRUE);
		pr_verbs_fail(path, "the device was removed");
		break;
	case RDMA_CM_EVENT_ADDR_CHANGE:
		pr_verbs_fail(path, "its network address has moved to another port");
		break;
	default:
		pr_verbs_fail(path, "%s (%d)", rdma_event_str(event->type), event->status);
	}
}

gboolean pr_verbs_has_address(const PrVerbsPath *path, const PrVerbsLane *lane)
{
	union ibv_gid now;

	return !lane->has_gid ||
	       (!ibv_query_gid(path->device.context, path->device.port, lane->gid_index, &now) &&
		!memcmp(&now, &lane->gid, sizeof(now)));
}

/* Some address of the port has changed: fails the path if it is a lane's. */
static void check_addresses(PrVerbsPath *path)
{
	for (guint i = 0; i < path->base.n_lanes; i++)
		if (!pr_verbs_has_address(path, &path->lanes[i]))
			pr_verbs_fail(path, "its address has gone (GID %u)",
				      path->lanes[i].gid_index);
}

static void handle_port_event(PrVerbsPath *path, const struct ibv_async_event *event)
{
	if (event->element.port_num != path->device.port)
		return;
	if (event->event_type == IBV_EVENT_GID_CHANGE)
		check_addresses(path);
	else if (event->event_type == IBV_EVENT_PORT_ERR)
		pr_verbs_fail(path, "port %u is DOWN; bring its link up or use another path",
			      path->device.port);
}

static void handle_device_event(PrVerbsPath *path, const struct ibv_async_event *event)
{
	switch (event->event_type) {
	case IBV_EVENT_PORT_ERR:
	case IBV_EVENT_GID_CHANGE:
		handle_port_event(path, event);
		break;
	case IBV_EVENT_DEVICE_FATAL:
	case IBV_EVENT_CQ_ERR:
	case IBV_EVENT_QP_FATAL:
	case IBV_EVENT_QP_REQ_ERR:
	case IBV_EVENT_QP_ACCESS_ERR:
		pr_verbs_fail(path, "%s", ibv_event_type_str(event->event_type));
		break;
	default:
		g_debug("%s: device %s: %s", path->life.name, pr_verbs_device_name(&path->device),
			ibv_event_type_str(event->event_type));
	}
}

/* Acknowledges the event at once: destroying a queue pair waits for that. */
static gboolean next_device_event(PrVerbsPath *path, struct ibv_async_event *ret)
{
	if (ibv_get_async_event(path->device.context, ret))
		return FALSE;
	ibv_ack_async_event(ret);
	return TRUE;
}

#define LOOKS 5

/* An urgent lane at the last look. */
typedef struct Watch {
	gint64 oldest; /* when its oldest outstanding READ was posted */
	gint n_polls;
	guint n_seen; /* looks in a row that found it while its completion could be taken */
} Watch;

typedef struct Watches {
	gint64 next_us; /* when to look again (monotonic) */
	Watch of[PR_LANES_MAX];
} Watches;

static void check_deadline(PrVerbsPath *path, const PrVerbsLane *lane, Watch *watch)
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
			      "an urgent READ has not come back for %" G_GINT64_FORMAT
			      " ms (read-deadline-ms is %u)",
			      age / 1000, path->options.read_deadline_ms);
}

/* Looks at the urgent READs if it is time. Returns how many ms to sleep, -1: for ever. */
static int watch_reads(PrVerbsPath *path, Watches *watches)
{
	gint64 now = g_get_monotonic_time();

	if (path->source_mrs || !path->options.read_deadline_ms)
		return -1;
	if (now >= watches->next_us) {
		for (guint i = 0; i < path->base.n_lanes; i++)
			if (pr_lane_is_urgent(i))
				check_deadline(path, &path->lanes[i], &watches->of[i]);
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

	while (pr_path_life_is_up(&path->life)) {
		int quiet_ms;

		while (pr_verbs_next_event(path->channel, &event))
			handle_cm_event(path, &event);
		while (next_device_event(path, &device_event))
			handle_device_event(path, &device_event);
		quiet_ms = watch_reads(path, &watches);
		if (pr_path_life_is_up(&path->life))
			poll(&fd, 1, quiet_ms);
	}
	return NULL;
}

gboolean pr_verbs_events_start(PrVerbsPath *path, GError **error)
{
	if (!pr_poll_set_add(&path->events_waker, path->channel->fd, error) ||
	    !pr_poll_set_add(&path->events_waker, path->device.context->async_fd, error))
		return FALSE;
	path->events = pr_thread_try("pr-rdma-events", event_thread, path, error);
	return path->events != NULL;
}

void pr_verbs_events_join(PrVerbsPath *path)
{
	g_clear_pointer(&path->events, g_thread_join);
}
