/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "tests/rigs/flood.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#define WAIT_US (60 * G_USEC_PER_SEC)

struct Flood {
	struct sockaddr_in from, to; /* constant */
	const void *bytes;
	gsize n;
	GThread *thread;
	int stop; /* atomic */

	GMutex lock;
	GCond changed;
	guint made; /* lock */
};

static int connect_once(Flood *flood)
{
	const struct linger reset = {.l_onoff = 1};
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	/* Close with a reset, as this host would run out of ports otherwise. */
	setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
	if (bind(fd, (struct sockaddr *)&flood->from, sizeof(flood->from)) == 0 &&
	    connect(fd, (struct sockaddr *)&flood->to, sizeof(flood->to)) == 0) {
		if (flood->n)
			(void)send(fd, flood->bytes, flood->n, MSG_NOSIGNAL | MSG_DONTWAIT);
		return fd;
	}
	close(fd);
	return -1;
}

static gpointer flood_main(gpointer opaque)
{
	Flood *flood = opaque;
	int held[FLOOD_HELD];

	for (guint i = 0; i < FLOOD_HELD; i++)
		held[i] = -1;
	for (guint i = 0; !g_atomic_int_get(&flood->stop); i = (i + 1) % FLOOD_HELD) {
		if (held[i] >= 0)
			close(held[i]);
		held[i] = connect_once(flood);
		if (held[i] < 0)
			continue;
		g_mutex_lock(&flood->lock);
		flood->made++;
		g_cond_broadcast(&flood->changed);
		g_mutex_unlock(&flood->lock);
	}
	for (guint i = 0; i < FLOOD_HELD; i++)
		if (held[i] >= 0)
			close(held[i]);
	return NULL;
}

Flood *flood_new(const char *from, uint16_t port, const void *bytes, gsize n)
{
	Flood *flood = g_new0(Flood, 1);

	flood->from.sin_family = flood->to.sin_family = AF_INET;
	inet_pton(AF_INET, from, &flood->from.sin_addr);
	flood->to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	flood->to.sin_port = htons(port);
	flood->bytes = bytes;
	flood->n = n;
	g_mutex_init(&flood->lock);
	g_cond_init(&flood->changed);
	flood->thread = g_thread_new("flood", flood_main, flood);
	return flood;
}

gboolean flood_wait(Flood *flood, guint more)
{
	G_GNUC_UNUSED g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&flood->lock);
	gint64 deadline = g_get_monotonic_time() + WAIT_US;
	guint until = flood->made + more;

	while (flood->made < until)
		if (!g_cond_wait_until(&flood->changed, &flood->lock, deadline))
			return FALSE;
	return TRUE;
}

void flood_free(Flood *flood)
{
	g_atomic_int_set(&flood->stop, 1);
	g_thread_join(flood->thread);
	g_mutex_clear(&flood->lock);
	g_cond_clear(&flood->changed);
	g_free(flood);
}
