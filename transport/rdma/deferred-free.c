/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Theory of operation: freeing a path whose device is slow or down
 *
 * A path that comes here is fenced: nothing lands any more. A thread of its own frees it. That
 * mostly takes a moment, and the owner waits for it for up to 0.5 s (FREE_MS), so that everything
 * is freed when destroy() returns. But the device can block the freeing, and the engine must not
 * wait for that with the next path. soft-RoCE destroys a queue pair only when the network driver
 * has released the queue pair's last packet. It waits up to 50 s for that; a driver that is down,
 * or whose peer accepts nothing, may never release it.
 *
 * Destroying an id that is connected, or about to be, sends the peer a message, even over a
 * device that is down. soft-RoCE's management queue pair then falls into the error state for
 * good, and no program can connect over that device until the device is made anew. So while the
 * device is down, the thread frees registered memory only. It checks every 250 ms (CHECK_MS)
 * whether the device is up again; then it frees the rest, and the peer is told. It also goes on
 * when the device is removed, because the removal waits for us.
 *
 * Not handled: the end of this process. The kernel then tells the peer as well, in whatever way
 * the process ends, and no call drops a connection silently. soft-roce/README.md says how to make
 * the device anew.
 */
#include "transport/rdma/path.h"

#define CHECK_MS  250
#define CHECKS_UP 4 /* successful checks in a row: a port that is up may have no route yet */
#define FREE_MS	  500

typedef struct DeferredFree {
	PrVerbsPath *path; /* owned by the thread */
	void (*free_path)(PrVerbsPath *path);
	gboolean until_up; /* constant: wait for the device first */

	GMutex lock;
	GCond changed;
	/* Under lock: the thread is done; the owner is done. The last one of them frees this. */
	gboolean freed, left;
} DeferredFree;

static gboolean is_connected(const PrVerbsPath *path)
{
	for (guint i = 0; i < path->base.n_lanes; i++)
		if (path->lanes[i].cm)
			return TRUE;
	return FALSE;
}

/*
 * An address that was removed and has come back may have a new GID index: the kernel does not use
 * the old index again while our queue pair refers to it.
 */
static gboolean port_has_address(const PrVerbsPath *path, const PrVerbsLane *lane, int n_gids)
{
	union ibv_gid gid;

	if (pr_verbs_has_address(path, lane))
		return TRUE;
	for (int i = 0; i < n_gids; i++)
		if (!ibv_query_gid(path->device.context, path->device.port, i, &gid) &&
		    !memcmp(&gid, &lane->gid, sizeof(gid)))
			return TRUE;
	return FALSE;
}

gboolean pr_verbs_must_defer_free(PrVerbsPath *path)
{
	struct ibv_port_attr port;

	if (!path->device.context || g_atomic_int_get(&path->removed) || !is_connected(path))
		return FALSE;
	if (ibv_query_port(path->device.context, path->device.port, &port) ||
	    port.state != IBV_PORT_ACTIVE)
		return TRUE;
	for (guint i = 0; i < path->base.n_lanes; i++)
		if (path->lanes[i].cm && !port_has_address(path, &path->lanes[i], port.gid_tbl_len))
			return TRUE;
	return FALSE;
}

static void check_removal(PrVerbsPath *path)
{
	PrVerbsEvent event;

	while (pr_verbs_next_event(path->channel, &event))
		if (event.type == RDMA_CM_EVENT_DEVICE_REMOVAL)
			g_atomic_int_set(&path->removed, TRUE);
}

static void wait_until_up(PrVerbsPath *path)
{
	struct pollfd fd = {.fd = path->channel->fd, .events = POLLIN};

	pr_verbs_source_mr_free(path);
	pr_verbs_destination_mr_free(path);
	for (guint up = 0; up < CHECKS_UP; up = pr_verbs_must_defer_free(path) ? 0 : up + 1) {
		check_removal(path);
		if (g_atomic_int_get(&path->removed))
			break;
		poll(&fd, 1, CHECK_MS);
	}
}

/* Called by the thread and by the owner when they are done with it; the second call frees it. */
static void drop_deferred(DeferredFree *deferred, gboolean thread)
{
	gboolean last;

	g_mutex_lock(&deferred->lock);
	last = thread ? deferred->left : deferred->freed;
	*(thread ? &deferred->freed : &deferred->left) = TRUE;
	g_cond_broadcast(&deferred->changed);
	g_mutex_unlock(&deferred->lock);
	if (!last)
		return;
	g_mutex_clear(&deferred->lock);
	g_cond_clear(&deferred->changed);
	g_free(deferred);
}

static gpointer release_thread(gpointer opaque)
{
	DeferredFree *deferred = opaque;

	if (deferred->until_up)
		wait_until_up(deferred->path);
	deferred->free_path(deferred->path);
	drop_deferred(deferred, TRUE);
	return NULL;
}

static gboolean wait_freed(DeferredFree *deferred)
{
	gint64 deadline = pr_backend_deadline(FREE_MS);
	gboolean freed;

	g_mutex_lock(&deferred->lock);
	while (!deferred->freed && g_cond_wait_until(&deferred->changed, &deferred->lock, deadline))
		;
	freed = deferred->freed;
	g_mutex_unlock(&deferred->lock);
	return freed;
}

void pr_verbs_release(PrVerbsPath *path, void (*free_path)(PrVerbsPath *path))
{
	g_autofree char *name = g_strdup(path->life.name);
	DeferredFree *deferred = g_new0(DeferredFree, 1);
	GThread *thread;
	gboolean freed;

	*deferred = (DeferredFree){path, free_path, .until_up = pr_verbs_must_defer_free(path)};
	g_mutex_init(&deferred->lock);
	g_cond_init(&deferred->changed);
	if (deferred->until_up)
		g_message("%s: device %s is down; the connection ends when it is up again; "
			  "keep this process running until then",
			  name, pr_verbs_device_name(&path->device));
	thread = g_thread_try_new("pr-rdma-release", release_thread, deferred, NULL);
	if (!thread) {
		/* Without a thread a path on a device that is down is never freed. */
		if (!deferred->until_up)
			release_thread(deferred);
		else
			drop_deferred(deferred, TRUE);
		drop_deferred(deferred, FALSE);
		return;
	}
	freed = !deferred->until_up && wait_freed(deferred);
	if (!freed && !deferred->until_up)
		g_info("%s: its device is slow to release it", name);
	drop_deferred(deferred, FALSE);
	if (freed)
		g_thread_join(thread);
	else
		g_thread_unref(thread);
}
