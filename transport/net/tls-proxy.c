/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * TLS behind a descriptor. Goal: who uses a connection need not know whether it is encrypted: polling from
 * several threads, recvmsg(2) right into guest RAM, shutdown(2) by anybody.
 *
 * The user gets one end of a socket pair. A thread moves bytes between the other end and the TLS stream. It
 * alone uses that stream, so no call of GTlsConnection ever meets another one, and it never blocks in
 * one: each direction has a buffer, and is read into only when that is empty. So the back-pressure of the
 * network reaches the user through the socket pair.
 *
 * The ends. The user's shutdown(SHUT_WR), once what it wrote is through, becomes that of the TCP connection,
 * and the other way round. No close_notify is sent: it could block, and the frames that are carried tell where
 * they end; to both sides every end of the stream is a path that was lost. When the user has closed its
 * end, what it had written has CLOSE_MS to get out: the kernel would try for longer with a plain socket, but a
 * thread has to be joined.
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
	gboolean over; /* its source has ended: nothing is read any more */
	gboolean told; /* and its sink knows */
} Flow;

/* Of the thread, but for its making and joining. */
typedef struct Splice {
	GSocketConnection *connection;
	GIOStream *tls;
	char *peer;
	int net, user;
	gboolean readable;  /* the TLS stream may have something */
	gboolean user_gone; /* it has closed its end */
	gint64 close_by;    /* when the user has gone: monotonic, microseconds */
	Flow in, out;	    /* to the user, to the network */
	GThread *thread;
} Splice;

static gboolean has_bytes(const Flow *flow)
{
	return flow->at < flow->end;
}

/* Drops what is on its way, and reads no more. */
static void give_up(Flow *flow)
{
	flow->at = flow->end = 0;
	flow->over = flow->told = TRUE;
}

static gboolean would_block(const GError *error)
{
	return g_error_matches(error, G_IO_ERROR, G_IO_ERROR_WOULD_BLOCK);
}

static void note_error(Splice *splice, const char *doing, const GError *error)
{
	g_info("TLS with %s: %s: %s", splice->peer, doing, error->message);
}

/* As much as there is: a record has 16 KiB at most. */
static void read_net(Splice *splice)
{
	GPollableInputStream *from =
		G_POLLABLE_INPUT_STREAM(g_io_stream_get_input_stream(splice->tls));
	Flow *in = &splice->in;

	in->at = in->end = 0;
	while (splice->readable && !in->over && in->end < BUFFER_BYTES) {
		g_autoptr(GError) error = NULL;
		gssize n = g_pollable_input_stream_read_nonblocking(
			from, in->bytes + in->end, BUFFER_BYTES - in->end, NULL, &error);

		if (n > 0) {
			in->end += n;
			continue;
		}
		splice->readable = FALSE;
		in->over = !would_block(error);
		if (error && in->over)
			note_error(splice, "receiving", error);
	}
}

static void write_user(Splice *splice)
{
	Flow *in = &splice->in;
	gssize n = send(splice->user, in->bytes + in->at, in->end - in->at,
			MSG_DONTWAIT | MSG_NOSIGNAL);

	if (n >= 0)
		in->at += n;
	else if (errno != EAGAIN && errno != EINTR)
		give_up(in);
}

static void read_user(Splice *splice)
{
	Flow *out = &splice->out;
	gssize n = recv(splice->user, out->bytes, BUFFER_BYTES, MSG_DONTWAIT);

	out->at = 0;
	out->end = MAX(n, 0);
	out->over = n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR);
}

static void write_net(Splice *splice)
{
	GPollableOutputStream *to =
		G_POLLABLE_OUTPUT_STREAM(g_io_stream_get_output_stream(splice->tls));
	Flow *out = &splice->out;
	g_autoptr(GError) error = NULL;
	gssize n = g_pollable_output_stream_write_nonblocking(to, out->bytes + out->at,
							      out->end - out->at, NULL, &error);

	if (n >= 0) {
		out->at += n;
	} else if (!would_block(error)) {
		note_error(splice, "sending", error);
		/* What the peer had still sent is read all the same. */
		give_up(out);
		shutdown(splice->user, SHUT_RD);
	}
}

/* Passes on the end of a direction. */
static void pass_end(Flow *flow, int fd)
{
	if (!flow->over || flow->told || has_bytes(flow))
		return;
	flow->told = TRUE;
	shutdown(fd, SHUT_WR);
}

/* Moves what can be moved; never waits. */
static void move(Splice *splice)
{
	gboolean again = TRUE;

	for (guint i = 0; again && i < 16; i++) {
		again = FALSE;
		if (!has_bytes(&splice->in))
			read_net(splice);
		if (has_bytes(&splice->in)) {
			write_user(splice);
			again = !has_bytes(&splice->in) && splice->readable;
		}
		if (!has_bytes(&splice->out) && !splice->out.over)
			read_user(splice);
		if (has_bytes(&splice->out)) {
			write_net(splice);
			again |= !has_bytes(&splice->out);
		}
	}
	pass_end(&splice->in, splice->user);
	pass_end(&splice->out, splice->net);
}

static void note_user_gone(Splice *splice)
{
	splice->user_gone = TRUE;
	splice->close_by = g_get_monotonic_time() + CLOSE_MS * 1000;
	give_up(&splice->in);
}

/* For poll(2). */
static int timeout_ms(const Splice *splice, gboolean reads)
{
	gint64 left = splice->close_by - g_get_monotonic_time();

	/* There are bytes already, in the TLS stream and not in the socket. */
	if (splice->readable && reads)
		return 0;
	if (!splice->user_gone)
		return -1;
	return left <= 0 ? 0 : (left + 999) / 1000;
}

/* FALSE: the user has gone, and the rest has had its time. */
static gboolean sleep_until_ready(Splice *splice)
{
	gboolean in = has_bytes(&splice->in), out = has_bytes(&splice->out);
	short net = (!in && !splice->in.over ? POLLIN : 0) | (out ? POLLOUT : 0);
	short user = (!out && !splice->out.over ? POLLIN : 0) | (in ? POLLOUT : 0);
	struct pollfd fds[] = {
		{.fd = net ? splice->net : -1, .events = net},
		{.fd = splice->user_gone && !user ? -1 : splice->user, .events = user},
	};

	if (splice->user_gone && g_get_monotonic_time() >= splice->close_by)
		return FALSE;
	poll(fds, G_N_ELEMENTS(fds), timeout_ms(splice, net & POLLIN));
	if (fds[0].revents)
		splice->readable = TRUE;
	if ((fds[1].revents & (POLLHUP | POLLERR)) && !splice->user_gone)
		note_user_gone(splice);
	return TRUE;
}

static gpointer splice_main(gpointer opaque)
{
	Splice *splice = opaque;

	do
		move(splice);
	while (!(splice->in.told && splice->out.told) && sleep_until_ready(splice));
	/* Whatever was left undone is over for both. */
	shutdown(splice->net, SHUT_RDWR);
	shutdown(splice->user, SHUT_RDWR);
	return NULL;
}

/* The user has dropped its connection, and with it the other end of the pair. */
static void splice_free(gpointer opaque)
{
	Splice *splice = opaque;

	if (splice->thread)
		g_thread_join(splice->thread);
	if (splice->user >= 0)
		close(splice->user);
	g_object_unref(splice->tls);
	g_io_stream_close(G_IO_STREAM(splice->connection), NULL, NULL);
	g_object_unref(splice->connection);
	g_free(splice->peer);
	g_free(splice);
}
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Splice, splice_free)

static Splice *splice_new(GSocketConnection *connection, GIOStream *tls, const char *peer, int user)
{
	Splice *splice = g_new0(Splice, 1);
	GSocket *socket = g_socket_connection_get_socket(connection);

	g_socket_set_blocking(socket, FALSE);
	splice->connection = g_object_ref(connection);
	splice->tls = g_object_ref(tls);
	splice->peer = g_strdup(peer);
	splice->net = g_socket_get_fd(socket);
	splice->user = user;
	splice->readable = TRUE;
	return splice;
}

GSocketConnection *pr_tls_proxy_new(GSocketConnection *connection, GIOStream *tls, const char *peer,
				    GError **error)
{
	g_autoptr(Splice) splice = NULL;
	g_autoptr(GSocket) socket = NULL;
	GSocketConnection *given;
	int pair[2];

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair)) {
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT,
			    "no socket pair: %s; raise the limit of open files", g_strerror(errno));
		return NULL;
	}
	splice = splice_new(connection, tls, peer, pair[1]);
	socket = g_socket_new_from_fd(pair[0], error);
	if (!socket) {
		close(pair[0]);
		return NULL;
	}
	g_socket_set_blocking(socket, FALSE);
	splice->thread = pr_thread_try("tls", splice_main, splice, error);
	if (!splice->thread)
		return NULL;
	given = g_socket_connection_factory_create_connection(socket);
	/* Freed with the connection, after its socket has been closed. */
	g_object_set_data_full(G_OBJECT(given), "pr-tls-splice", g_steal_pointer(&splice),
			       splice_free);
	return given;
}
