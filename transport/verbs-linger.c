/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What is left of a path whose rail is down.
 *
 * Destroying a connected id tells the peer, and that message goes out even where it cannot: soft-RoCE's
 * management queue pair then falls into the error state for good, and nobody connects over that device
 * any more until it is made anew. Nor is a queue pair always destroyed at once: soft-RoCE waits, for up to 50 s,
 * until the network driver has let go of its last packet, which a driver that is down may not do. The
 * engine must not wait for that with the next path.
 *
 * So the remains, fenced and with no memory registered any more, are left to a thread until the rail is up
 * again (then the peer is told), or its device is removed, which waits for us.
 */
#include "transport/verbs.h"

#define LOOK_MS	 250
#define LOOKS_UP 4 /* a port that says it is up may still have no route */

typedef struct Remains {
	PrVerbsPath *path;
	void (*free_path)(PrVerbsPath *path);
} Remains;

static gboolean is_connected(const PrVerbsPath *path)
{
	for (guint i = 0; i < PR_N_LANES; i++)
		if (path->lanes[i].cm)
			return TRUE;
	return FALSE;
}

static gboolean port_is_up(const PrVerbsPath *path)
{
	struct ibv_port_attr port;

	return !ibv_query_port(path->rail.context, path->rail.port, &port) &&
	       port.state == IBV_PORT_ACTIVE;
}

gboolean pr_verbs_must_linger(PrVerbsPath *path)
{
	if (!path->rail.context || g_atomic_int_get(&path->removed) || !is_connected(path))
		return FALSE;
	for (guint i = 0; i < PR_N_LANES; i++)
		if (path->lanes[i].cm && !pr_verbs_has_address(path, &path->lanes[i]))
			return TRUE;
	return !port_is_up(path);
}

static void look_for_removal(PrVerbsPath *path)
{
	PrVerbsEvent event;

	while (pr_verbs_next_event(path->channel, &event))
		if (event.type == RDMA_CM_EVENT_DEVICE_REMOVAL)
			g_atomic_int_set(&path->removed, TRUE);
}

static gpointer linger_thread(gpointer opaque)
{
	g_autofree Remains *remains = opaque;
	PrVerbsPath *path = remains->path;
	struct pollfd fd = {.fd = path->channel->fd, .events = POLLIN};

	pr_verbs_export_free(path);
	pr_verbs_import_free(path);
	for (guint up = 0; up < LOOKS_UP; up = pr_verbs_must_linger(path) ? 0 : up + 1) {
		look_for_removal(path);
		if (g_atomic_int_get(&path->removed))
			break;
		poll(&fd, 1, LOOK_MS);
	}
	remains->free_path(path);
	return NULL;
}

void pr_verbs_linger(PrVerbsPath *path, void (*free_path)(PrVerbsPath *path))
{
	Remains *remains = g_new(Remains, 1);

	*remains = (Remains){path, free_path};
	g_info("%s: rail %s is down; its connection ends when it is up again", path->fate.name,
	       pr_verbs_rail_name(&path->rail));
	g_thread_unref(g_thread_new("pr-rdma-linger", linger_thread, remains));
}
