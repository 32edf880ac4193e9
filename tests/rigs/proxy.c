/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "tests/rigs/proxy.h"

#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

typedef struct Pump {
	int from, to;
} Pump;

struct Proxy {
	int listener;
	guint16 port, to_port;
	GThread *thread;

	GMutex lock; /* protects what follows */
	GCond changed;
	int waiting;	  /* the first connection; -1 before it has come */
	GArray *sockets;  /* int: the sockets of forwarded connections */
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
static void pump(Proxy *proxy, int from, int to)
{
	Pump *pump = g_new(Pump, 1);

	*pump = (Pump){from, to};
	g_ptr_array_add(proxy->pumps, g_thread_new("pump", pump_thread, pump));
}

static struct sockaddr_in address_of(guint16 port)
{
	return (struct sockaddr_in){.sin_family = AF_INET,
				    .sin_port = htons(port),
				    .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
}

static void forward(Proxy *proxy, int from)
{
	struct sockaddr_in address = address_of(proxy->to_port);
	int to = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (connect(to, (struct sockaddr *)&address, sizeof(address)) < 0)
		g_error("the proxy cannot connect to the destination");
	g_array_append_val(proxy->sockets, from);
	g_array_append_val(proxy->sockets, to);
	pump(proxy, from, to);
	pump(proxy, to, from);
}

static gpointer proxy_thread(gpointer opaque)
{
	Proxy *proxy = opaque;
	int from;

	while ((from = accept4(proxy->listener, NULL, NULL, SOCK_CLOEXEC)) >= 0) {
		g_mutex_lock(&proxy->lock);
		if (proxy->waiting < 0) {
			proxy->waiting = from;
			g_cond_broadcast(&proxy->changed);
		} else {
			forward(proxy, from);
		}
		g_mutex_unlock(&proxy->lock);
	}
	return NULL;
}

Proxy *proxy_new(guint16 to_port)
{
	Proxy *proxy = g_new0(Proxy, 1);
	struct sockaddr_in address = address_of(0);
	socklen_t length = sizeof(address);

	proxy->to_port = to_port;
	proxy->waiting = -1;
	proxy->sockets = g_array_new(FALSE, FALSE, sizeof(int));
	proxy->pumps = g_ptr_array_new();
	g_mutex_init(&proxy->lock);
	g_cond_init(&proxy->changed);
	proxy->listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (bind(proxy->listener, (struct sockaddr *)&address, length) < 0 ||
	    listen(proxy->listener, 16) < 0 ||
	    getsockname(proxy->listener, (struct sockaddr *)&address, &length) < 0)
		g_error("no socket for a proxy");
	proxy->port = ntohs(address.sin_port);
	proxy->thread = g_thread_new("proxy", proxy_thread, proxy);
	return proxy;
}

guint16 proxy_port(Proxy *proxy)
{
	return proxy->port;
}

void proxy_wait_connected(Proxy *proxy)
{
	g_mutex_lock(&proxy->lock);
	while (proxy->waiting < 0)
		g_cond_wait(&proxy->changed, &proxy->lock);
	g_mutex_unlock(&proxy->lock);
}

void proxy_close_first(Proxy *proxy)
{
	char data[4096];

	shutdown(proxy->waiting, SHUT_WR);
	while (recv(proxy->waiting, data, sizeof(data), 0) > 0)
		continue;
}

void proxy_free(Proxy *proxy)
{
	shutdown(proxy->listener, SHUT_RDWR);
	g_thread_join(proxy->thread);
	for (guint i = 0; i < proxy->sockets->len; i++)
		shutdown(g_array_index(proxy->sockets, int, i), SHUT_RDWR);
	for (guint i = 0; i < proxy->pumps->len; i++)
		g_thread_join(proxy->pumps->pdata[i]);
	for (guint i = 0; i < proxy->sockets->len; i++)
		close(g_array_index(proxy->sockets, int, i));
	if (proxy->waiting >= 0)
		close(proxy->waiting);
	close(proxy->listener);
	g_array_unref(proxy->sockets);
	g_ptr_array_unref(proxy->pumps);
	g_mutex_clear(&proxy->lock);
	g_cond_clear(&proxy->changed);
	g_free(proxy);
}
