/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * TLS behind a descriptor. Goal: code that uses a connection need not know whether it is
 * encrypted. It polls from several threads, receives with recvmsg(2) right into guest RAM, and
 * any thread may call shutdown(2).
 *
 * The user has one end of a socket pair. A thread moves bytes between the other end and the TLS
 * stream. Only this thread uses that stream, so two calls of GTlsConnection never meet. It never
 * blocks in one: each direction has a buffer, and reads only when its buffer is empty. So the
 * back-pressure of the network reaches the user through the socket pair.
 *
 * The ends. When the user calls shutdown(SHUT_WR), the proxy sends what the user wrote, and then
 * shuts down the TCP connection; and the other way round. It sends no close_notify: that could
 * block, and the frames tell where they end. Both sides treat any end of the stream as a lost
 * path. When the user has closed its end, the bytes that it had written have CLOSE_MS to be sent.
 * The kernel would try for longer with a plain socket, but this thread has to be joined.
 *
 * Cost: a copy and a change of threads in each direction.
 */
#include <errno.h>
#include <gio/gunixconnection.h>
#include <poll.h>
#include <stdint.h>
#include <sys/socket.h>
#include <unistd.h>

#include "transport/net/tls-proxy.h"
#include "transport/path-error.h"
#include "util/try-alloc.h"

#define BUFFER_BYTES (128 * 1024)
#define CLOSE_MS     200

/* One direction. */
typedef struct Flow {
	uint8_t bytes[BUFFER_BYTES];
	gsize at, end;
	gboolean ended;	    /* its source has ended: nothing is read any more */
	gboolean passed_on; /* and its sink was shut down */
} Flow;

/* Its thread's, once that is started. */
typedef struct TlsProxy {
	GSocketConnection *connection;
	GIOStream *tls;
	char *peer;
	int net, user;
	gboolean readable;  /* the TLS stream may have something */
	gboolean user_gone; /* the user has closed its end */
	gint64 close_by;    /* where user_gone: when to give up; us, monotonic */
	Flow in, out;	    /* to the user, to the network */
	GThread *thread;
} TlsProxy;

static gboolean has_bytes(const Flow *flow)
{
	return flow->at < flow->end;
}

/* Drops the bytes in the buffer, and reads no more. */
static void drop(Flow *flow)
{
	flow->at = flow->end = 0;
	flow->ended = flow->passed_on = TRUE;
}

static gboolean would_block(const GError *error)
{
	return g_error_matches(error, G_IO_ERROR, G_IO_ERROR_WOULD_BLOCK);
}

static void note_error(TlsProxy *proxy, const char *doing, const GError *error)
{
	g_info("TLS with %s: %s: %s", proxy->peer, doing, error->message);
}

/* Reads until there is no more, or the buffer is full: a record has 16 KiB at most. */
static void read_net(TlsProxy *proxy)
{
	GPollableInputStream *from =
		G_POLLABLE_INPUT_STREAM(g_io_stream_get_input_stream(proxy->tls));
	Flow *in = &proxy->in;

	in->at = in->end = 0;
	while (proxy->readable && !in->ended && in->end < BUFFER_BYTES) {
		g_autoptr(GError) error = NULL;
		gssize n = g_pollable_input_stream_read_nonblocking(
			from, in->bytes + in->end, BUFFER_BYTES - in->end, NULL, &error);

		if (n > 0) {
			in->end += n;
			continue;
		}
		proxy->readable = FALSE;
		in->ended = !would_block(error);
		if (error && in->ended)
			note_error(proxy, "receiving", error);
	}
}

static void write_user(TlsProxy *proxy)
{
	Flow *in = &proxy->in;
	gssize n = send(proxy->user, in->bytes + in->at, in->end - in->at,
			MSG_DONTWAIT | MSG_NOSIGNAL);

	if (n >= 0)
		in->at += n;
	else if (errno != EAGAIN && errno != EINTR)
		drop(in);
}

static void read_user(TlsProxy *proxy)
{
	Flow *out = &proxy->out;
	gssize n = recv(proxy->user, out->bytes, BUFFER_BYTES, MSG_DONTWAIT);

	out->at = 0;
	out->end = MAX(n, 0);
	out->ended = n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR);
}

static void write_net(TlsProxy *proxy)
{
	GPollableOutputStream *to =
		G_POLLABLE_OUTPUT_STREAM(g_io_stream_get_output_stream(proxy->tls));
	Flow *out = &proxy->out;
	g_autoptr(GError) error = NULL;
	gssize n = g_pollable_output_stream_write_nonblocking(to, out->bytes + out->at,
							      out->end - out->at, NULL, &error);

	if (n >= 0) {
		out->at += n;
	} else if (!would_block(error)) {
		note_error(proxy, "sending", error);
		/* Bytes that the peer had sent before are still read. */
		drop(out);
		shutdown(proxy->user, SHUT_RD);
	}
}

/* Passes on the end of a direction, once its bytes are through. */
static void pass_end(Flow *flow, int fd)
{
	if (!flow->ended || flow->passed_on || has_bytes(flow))
		return;
	flow->passed_on = TRUE;
	shutdown(fd, SHUT_WR);
}

/* Moves what can be moved now; never waits. */
static void move(TlsProxy *proxy)
{
	gboolean again = TRUE;

	for (guint i = 0; again && i < 16; i++) {
		again = FALSE;
		if (!has_bytes(&proxy->in))
			read_net(proxy);
		if (has_bytes(&proxy->in)) {
			write_user(proxy);
			again = !has_bytes(&proxy->in) && proxy->readable;
		}
		if (!has_bytes(&proxy->out) && !proxy->out.ended)
			read_user(proxy);
		if (has_bytes(&proxy->out)) {
			write_net(proxy);
			again |= !has_bytes(&proxy->out);
		}
	}
	pass_end(&proxy->in, proxy->user);
	pass_end(&proxy->out, proxy->net);
}

static void note_user_gone(TlsProxy *proxy)
{
	proxy->user_gone = TRUE;
	proxy->close_by = g_get_monotonic_time() + CLOSE_MS * 1000;
	drop(&proxy->in);
}

/* For poll(2). */
static int timeout_ms(const TlsProxy *proxy, gboolean reads)
{
	gint64 left = proxy->close_by - g_get_monotonic_time();

	/* The TLS stream may have bytes that poll(2) does not see in the socket. */
	if (proxy->readable && reads)
		return 0;
	if (!proxy->user_gone)
		return -1;
	return left <= 0 ? 0 : (left + 999) / 1000;
}

/* FALSE: the user has closed its end, and close_by has come. */
static gboolean sleep_until_ready(TlsProxy *proxy)
{
	gboolean in = has_bytes(&proxy->in), out = has_bytes(&proxy->out);
	short net = (!in && !proxy->in.ended ? POLLIN : 0) | (out ? POLLOUT : 0);
	short user = (!out && !proxy->out.ended ? POLLIN : 0) | (in ? POLLOUT : 0);
	struct pollfd fds[] = {
		{.fd = net ? proxy->net : -1, .events = net},
		{.fd = proxy->user_gone && !user ? -1 : proxy->user, .events = user},
	};

	if (proxy->user_gone && g_get_monotonic_time() >= proxy->close_by)
		return FALSE;
	poll(fds, G_N_ELEMENTS(fds), timeout_ms(proxy, net & POLLIN));
	if (fds[0].revents)
		proxy->readable = TRUE;
	if ((fds[1].revents & (POLLHUP | POLLERR)) && !proxy->user_gone)
		note_user_gone(proxy);
	return TRUE;
}

static gpointer proxy_thread(gpointer opaque)
{
	TlsProxy *proxy = opaque;

	do
		move(proxy);
	while (!(proxy->in.passed_on && proxy->out.passed_on) && sleep_until_ready(proxy));
	/* Ends both directions for both sides. */
	shutdown(proxy->net, SHUT_RDWR);
	shutdown(proxy->user, SHUT_RDWR);
	return NULL;
}

/* Called when the user's connection is freed, which has closed the other end of the pair. */
static void proxy_free(gpointer opaque)
{
	TlsProxy *proxy = opaque;

	if (proxy->thread)
		g_thread_join(proxy->thread);
	if (proxy->user >= 0)
		close(proxy->user);
	g_object_unref(proxy->tls);
	g_io_stream_close(G_IO_STREAM(proxy->connection), NULL, NULL);
	g_object_unref(proxy->connection);
	g_free(proxy->peer);
	g_free(proxy);
}
G_DEFINE_AUTOPTR_CLEANUP_FUNC(TlsProxy, proxy_free)

static TlsProxy *proxy_new(GSocketConnection *connection, GIOStream *tls, const char *peer,
			   int user)
{
	TlsProxy *proxy = g_new0(TlsProxy, 1);
	GSocket *socket = g_socket_connection_get_socket(connection);

	g_socket_set_blocking(socket, FALSE);
	proxy->connection = g_object_ref(connection);
	proxy->tls = g_object_ref(tls);
	proxy->peer = g_strdup(peer);
	proxy->net = g_socket_get_fd(socket);
	proxy->user = user;
	proxy->readable = TRUE;
	return proxy;
}

GSocketConnection *pr_tls_proxy_new(GSocketConnection *connection, GIOStream *tls, const char *peer,
				    GError **error)
{
	g_autoptr(TlsProxy) proxy = NULL;
	g_autoptr(GSocket) socket = NULL;
	GSocketConnection *user_end;
	int pair[2];

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair)) {
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT,
			    "no socket pair: %s; raise the limit of open files", g_strerror(errno));
		return NULL;
	}
	proxy = proxy_new(connection, tls, peer, pair[1]);
	socket = g_socket_new_from_fd(pair[0], error);
	if (!socket) {
		close(pair[0]);
		return NULL;
	}
	g_socket_set_blocking(socket, FALSE);
	proxy->thread = pr_thread_try("tls", proxy_thread, proxy, error);
	if (!proxy->thread)
		return NULL;
	user_end = g_socket_connection_factory_create_connection(socket);
	/* Freed with the connection, after its socket has been closed. */
	g_object_set_data_full(G_OBJECT(user_end), "pr-tls-proxy", g_steal_pointer(&proxy),
			       proxy_free);
	return user_end;
}
