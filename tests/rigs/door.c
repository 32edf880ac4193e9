/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "tests/rigs/door.h"

#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

typedef struct Pump {
	int from, to;
} Pump;

struct Door {
	int listener;
	guint16 port, to_port;
	GThread *thread;

	GMutex lock; /* protects what follows */
	GCond changed;
	int waiting;	  /* the first connection, -1: none yet */
	GArray *sockets;  /* int: of those that went through */
	GPtrArray *pumps; /* GThread* */
};

static gpointer pump_thread(gpointer opaque)
{
	Pump *pump = opaque;
	char data[16384];
	ssize_t n;

	while ((n = recv(pump->from, data, sizeof(data), 0)) > 0)
		if (send(pump->to, data, (gsize)n, MSG_NOSIGNAL) != n)
			break;
	shutdown(pump->from, SHUT_RD);
	shutdown(pump->to, SHUT_WR);
	g_free(pump);
	return NULL;
}

/* With the lock held. */
static void pump(Door *door, int from, int to)
{
	Pump *pump = g_new(Pump, 1);

	*pump = (Pump){from, to};
	g_ptr_array_add(door->pumps, g_thread_new("pump", pump_thread, pump));
}

static struct sockaddr_in address_of(guint16 port)
{
	return (struct sockaddr_in){.sin_family = AF_INET,
				    .sin_port = htons(port),
				    .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
}

static void let_through(Door *door, int from)
{
	struct sockaddr_in address = address_of(door->to_port);
	int to = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (connect(to, (struct sockaddr *)&address, sizeof(address)) < 0)
		g_error("the door leads nowhere");
	g_array_append_val(door->sockets, from);
	g_array_append_val(door->sockets, to);
	pump(door, from, to);
	pump(door, to, from);
}

static gpointer door_thread(gpointer opaque)
{
	Door *door = opaque;
	int from;

	while ((from = accept4(door->listener, NULL, NULL, SOCK_CLOEXEC)) >= 0) {
		g_mutex_lock(&door->lock);
		if (door->waiting < 0) {
			door->waiting = from;
			g_cond_broadcast(&door->changed);
		} else {
			let_through(door, from);
		}
		g_mutex_unlock(&door->lock);
	}
	return NULL;
}

Door *door_new(guint16 to_port)
{
	Door *door = g_new0(Door, 1);
	struct sockaddr_in address = address_of(0);
	socklen_t length = sizeof(address);

	door->to_port = to_port;
	door->waiting = -1;
	door->sockets = g_array_new(FALSE, FALSE, sizeof(int));
	door->pumps = g_ptr_array_new();
	g_mutex_init(&door->lock);
	g_cond_init(&door->changed);
	door->listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (bind(door->listener, (struct sockaddr *)&address, length) < 0 ||
	    listen(door->listener, 16) < 0 ||
	    getsockname(door->listener, (struct sockaddr *)&address, &length) < 0)
		g_error("no socket for a door");
	door->port = ntohs(address.sin_port);
	door->thread = g_thread_new("door", door_thread, door);
	return door;
}

guint16 door_port(Door *door)
{
	return door->port;
}

void door_wait_knocked(Door *door)
{
	g_mutex_lock(&door->lock);
	while (door->waiting < 0)
		g_cond_wait(&door->changed, &door->lock);
	g_mutex_unlock(&door->lock);
}

void door_turn_away(Door *door)
{
	char data[4096];

	shutdown(door->waiting, SHUT_WR);
	while (recv(door->waiting, data, sizeof(data), 0) > 0)
		continue;
}

void door_free(Door *door)
{
	shutdown(door->listener, SHUT_RDWR);
	g_thread_join(door->thread);
	for (guint i = 0; i < door->sockets->len; i++)
		shutdown(g_array_index(door->sockets, int, i), SHUT_RDWR);
	for (guint i = 0; i < door->pumps->len; i++)
		g_thread_join(door->pumps->pdata[i]);
	for (guint i = 0; i < door->sockets->len; i++)
		close(g_array_index(door->sockets, int, i));
	if (door->waiting >= 0)
		close(door->waiting);
	close(door->listener);
	g_array_unref(door->sockets);
	g_ptr_array_unref(door->pumps);
	g_mutex_clear(&door->lock);
	g_cond_clear(&door->changed);
	g_free(door);
}
