/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Floors of a plain TCP connection over loopback. */
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "tests/bench/raw-memory.h"
#include "tests/bench/raw.h"

#define PAGE	      4096
#define LATENCY_PAGES 1024 /* pages that the reads repeat in turn */

typedef struct Request {
	uint64_t offset, length;
} Request;

typedef struct Server {
	int fd;
	RawMemory memory;
} Server;

static gboolean transfer(int fd, uint8_t *at, gsize size, gboolean sending)
{
	while (size) {
		gssize n = sending ? send(fd, at, size, MSG_NOSIGNAL) : recv(fd, at, size, 0);

		if (n <= 0)
			return FALSE;
		at += n;
		size -= n;
	}
	return TRUE;
}

static gpointer server_thread(gpointer opaque)
{
	Server *server = opaque;
	Request request;

	while (transfer(server->fd, (uint8_t *)&request, sizeof(request), FALSE) &&
	       transfer(server->fd, server->memory.at + request.offset, request.length, TRUE))
		;
	return NULL;
}

/* Two connected sockets on loopback. */
static gboolean connect_pair(int listener, int ret[2], GError **error)
{
	struct sockaddr_in address = {.sin_family = AF_INET,
				      .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t size = sizeof(address);
	int on = 1;

	if (bind(listener, (struct sockaddr *)&address, size) < 0 || listen(listener, 1) < 0 ||
	    getsockname(listener, (struct sockaddr *)&address, &size) < 0)
		return raw_errno("listen", error);
	ret[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (ret[0] < 0 || connect(ret[0], (struct sockaddr *)&address, size) < 0)
		return raw_errno("connect", error);
	ret[1] = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	if (ret[1] < 0)
		return raw_errno("accept", error);
	for (guint i = 0; i < 2; i++)
		setsockopt(ret[i], IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
	return TRUE;
}

typedef struct Pair {
	int fds[2]; /* of the client, of the server */
	Server server;
	GThread *thread;
	RawMemory to;
} Pair;

#define PAIR_INIT ((Pair){.fds = {-1, -1}, .server.memory = RAW_MEMORY_INIT, .to = RAW_MEMORY_INIT})

static gboolean pair_init(Pair *pair, uint64_t size, GError **error)
{
	int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	gboolean ok;

	if (listener < 0)
		return raw_errno("socket", error);
	ok = connect_pair(listener, pair->fds, error);
	close(listener);
	if (!ok || !raw_memory_init(&pair->server.memory, size, TRUE, error) ||
	    !raw_memory_init(&pair->to, size, FALSE, error))
		return FALSE;
	pair->server.fd = pair->fds[1];
	pair->thread = g_thread_new("server", server_thread, &pair->server);
	return TRUE;
}

static void pair_clear(Pair *pair)
{
	if (pair->fds[0] >= 0)
		shutdown(pair->fds[0], SHUT_RDWR);
	if (pair->thread)
		g_thread_join(pair->thread);
	for (guint i = 0; i < 2; i++)
		if (pair->fds[i] >= 0)
			close(pair->fds[i]);
	raw_memory_clear(&pair->server.memory);
	raw_memory_clear(&pair->to);
}
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(Pair, pair_clear)

static gboolean send_request(Pair *pair, uint64_t offset, uint64_t length, GError **error)
{
	Request request = {offset, length};

	return transfer(pair->fds[0], (uint8_t *)&request, sizeof(request), TRUE) ||
	       raw_errno("send", error);
}

gboolean raw_tcp_rate(uint64_t total, uint32_t size, guint window, double *ret_rate, GError **error)
{
	g_auto(Pair) pair = PAIR_INIT;
	uint64_t requested = 0, begin;

	if (!pair_init(&pair, total, error))
		return FALSE;
	begin = raw_now_ns();
	for (uint64_t at = 0; at < total; at += size) {
		for (; requested < total && requested - at < (uint64_t)window * size;
		     requested += size)
			if (!send_request(&pair, requested, MIN(size, total - requested), error))
				return FALSE;
		if (!transfer(pair.fds[0], pair.to.at + at, MIN(size, total - at), FALSE))
			return raw_errno("recv", error);
	}
	*ret_rate = total * 1e9 / (raw_now_ns() - begin);
	return TRUE;
}

gboolean raw_tcp_latency(guint n, RawLatency *ret, GError **error)
{
	g_autofree uint64_t *samples = g_new0(uint64_t, n);
	g_auto(Pair) pair = PAIR_INIT;

	if (!pair_init(&pair, LATENCY_PAGES * PAGE, error))
		return FALSE;
	for (guint i = 0; i < n; i++) {
		uint64_t begin = raw_now_ns(), offset = (uint64_t)(i % LATENCY_PAGES) * PAGE;

		if (!send_request(&pair, offset, PAGE, error))
			return FALSE;
		if (!transfer(pair.fds[0], pair.to.at + offset, PAGE, FALSE))
			return raw_errno("recv", error);
		samples[i] = raw_now_ns() - begin;
	}
	*ret = raw_latency(samples, n);
	return TRUE;
}
