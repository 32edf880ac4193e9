/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The end of a path that is fenced: nothing lands any more, and what is left of it is freed by a thread.
 *
 * That mostly takes a moment, for which its owner waits, so that everything is gone when the path is.
 * But a device can hold us up: soft-RoCE destroys a queue pair only when the network driver has let go of
 * its last packet (it waits for that for up to 50 s), which a driver that is down, or whose peer takes nothing,
 * may not do. The engine must not wait for that with the next path.
 *
 * Destroying an id that is connected, or about to be, tells the peer, and that message goes out even where it cannot:
 * soft-RoCE's management queue pair then falls into the error state for good, and nobody connects over that
 * device any more until it is made anew. So while the rail is down nothing is freed but registered memory: the
 * thread waits until the rail is up again (then the peer is told), or its device is removed, which waits
 * for us. That is the best that can be done: the kernel tells the peer as well when a process ends, in whatever
 * way, and nothing lets go of a connection without (soft-roce/README.md says how to make the device anew).
 */
#include "transport/rdma/path.h"

#define LOOK_MS	 250
#define LOOKS_UP 4 /* a port that says it is up may still have no route */
#define FREE_MS	 500

typedef struct Remains {
	PrVerbsPath *path; /* the thread's */
	void (*free_path)(PrVerbsPath *path);
	gboolean linger;

	GMutex lock;
	GCond changed;
	gboolean freed, left; /* by the thread, by the owner: the last one frees this; under lock */
} Remains;

static gboolean is_connected(const PrVerbsPath *path)
{
	for (guint i = 0; i < path->base.n_lanes; i++)
		if (path->lanes[i].cm)
			return TRUE;
	return FALSE;
}

/*
 * An address that was removed and has come back may have another GID index than before: the kernel does not
 * use the old index again for as long as our queue pair refers to it.
 */
static gboolean address_is_there(const PrVerbsPath *path, const PrVerbsLane *lane, int n_gids)
{
	union ibv_gid gid;

	if (pr_verbs_has_address(path, lane))
		return TRUE;
	for (int i = 0; i < n_gids; i++)
		if (!ibv_query_gid(path->rail.context, path->rail.port, i, &gid) &&
		    !memcmp(&gid, &lane->gid, sizeof(gid)))
			return TRUE;
	return FALSE;
}

gboolean pr_verbs_must_defer_free(PrVerbsPath *path)
{
	struct ibv_port_attr port;

	if (!path->rail.context || g_atomic_int_get(&path->removed) || !is_connected(path))
		return FALSE;
	if (ibv_query_port(path->rail.context, path->rail.port, &port) ||
	    port.state != IBV_PORT_ACTIVE)
		return TRUE;
	for (guint i = 0; i < path->base.n_lanes; i++)
		if (path->lanes[i].cm && !address_is_there(path, &path->lanes[i], port.gid_tbl_len))
			return TRUE;
	return FALSE;
}

static void look_for_removal(PrVerbsPath *path)
{
	PrVerbsEvent event;

	while (pr_verbs_next_event(path->channel, &event))
		if (event.type == RDMA_CM_EVENT_DEVICE_REMOVAL)
			g_atomic_int_set(&path->removed, TRUE);
}

static void wait_for_rail(PrVerbsPath *path)
{
	struct pollfd fd = {.fd = path->channel->fd, .events = POLLIN};

	pr_verbs_source_mr_free(path);
	pr_verbs_destination_mr_free(path);
	for (guint up = 0; up < LOOKS_UP; up = pr_verbs_must_defer_free(path) ? 0 : up + 1) {
		look_for_removal(path);
		if (g_atomic_int_get(&path->removed))
			break;
		poll(&fd, 1, LOOK_MS);
	}
}

/* Says that the thread (or else the owner) has done with it. */
static void let_go(Remains *remains, gboolean thread)
{
	gboolean last;

	g_mutex_lock(&remains->lock);
	last = thread ? remains->left : remains->freed;
	*(thread ? &remains->freed : &remains->left) = TRUE;
	g_cond_broadcast(&remains->changed);
	g_mutex_unlock(&remains->lock);
	if (!last)
		return;
	g_mutex_clear(&remains->lock);
	g_cond_clear(&remains->changed);
	g_free(remains);
}

static gpointer release_thread(gpointer opaque)
{
	Remains *remains = opaque;

	if (remains->linger)
		wait_for_rail(remains->path);
	remains->free_path(remains->path);
	let_go(remains, TRUE);
	return NULL;
}

static gboolean wait_freed(Remains *remains)
{
	gint64 deadline = pr_backend_deadline(FREE_MS);
	gboolean freed;

	g_mutex_lock(&remains->lock);
	while (!remains->freed && g_cond_wait_until(&remains->changed, &remains->lock, deadline))
		;
	freed = remains->freed;
	g_mutex_unlock(&remains->lock);
	return freed;
}

void pr_verbs_release(PrVerbsPath *path, void (*free_path)(PrVerbsPath *path))
{
	g_autofree char *name = g_strdup(path->fate.name);
	Remains *remains = g_new0(Remains, 1);
	GThread *thread;
	gboolean freed;

	*remains = (Remains){path, free_path, .linger = pr_verbs_must_defer_free(path)};
	g_mutex_init(&remains->lock);
	g_cond_init(&remains->changed);
	if (remains->linger)
		g_message("%s: rail %s is down; its connection ends when it is up again, for which "
			  "this process has to live",
			  name, pr_verbs_device_name(&path->rail));
	thread = g_thread_try_new("pr-rdma-release", release_thread, remains, NULL);
	if (!thread) {
		/* What lingers stays for good then. */
		if (!remains->linger)
			release_thread(remains);
		else
			let_go(remains, TRUE);
		let_go(remains, FALSE);
		return;
	}
	freed = !remains->linger && wait_freed(remains);
	if (!freed && !remains->linger)
		g_info("%s: its device takes its time to let go of it", name);
	let_go(remains, FALSE);
	if (freed)
		g_thread_join(thread);
	else
		g_thread_unref(thread);
}
