/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "transport/control/control.h"

#include <poll.h>
#include <sched.h>
#include <string.h>
#include <sys/socket.h>

#include "transport/control/internal.h"
#include "transport/net/dial.h"
#include "util/try-alloc.h"

#define NOWAIT_US 2000 /* how long pr_control_send_nowait() waits at most */

void pr_msg_free(PrMsg *msg)
{
	if (!msg)
		return;
	g_free(msg->body);
	g_free(msg);
}

static char *local_host(GSocketConnection *connection, const PrUri *uri)
{
	g_autoptr(GSocketAddress) address = g_socket_connection_get_local_address(connection, NULL);

	if (!address || !G_IS_INET_SOCKET_ADDRESS(address))
		return g_strdup(uri->host);
	return g_inet_address_to_string(
		g_inet_socket_address_get_address(G_INET_SOCKET_ADDRESS(address)));
}

PrControl *pr_control_new(GSocketConnection *connection, const PrUri *uri,
			  const PrTransportOps *ops, GError **error)
{
	g_autoptr(PrControl) control = g_new0(PrControl, 1);

	control->connection = connection;
	control->fd = g_socket_get_fd(g_socket_connection_get_socket(connection));
	control->uri = pr_uri_copy(uri);
	control->ops = ops;
	control->peer = pr_peer_text(connection);
	control->local_host = local_host(connection, uri);
	control->reader_waker = control->closed = PR_WAKER_INIT;
	control->tail = g_byte_array_new();
	g_mutex_init(&control->send_lock);
	g_mutex_init(&control->lock);
	g_cond_init(&control->changed);
	g_queue_init(&control->queue);
	if (!pr_waker_init(&control->reader_waker, error) ||
	    !pr_waker_init(&control->closed, error)) {
		g_prefix_error(error, "%s: ", control->peer);
		return NULL;
	}
	return g_steal_pointer(&control);
}

void pr_control_set_handshake(PrControl *control, gint64 deadline, GCancellable *cancel)
{
	control->handshake_deadline = deadline;
	g_set_object(&control->cancel, cancel);
}

const char *pr_control_peer(PrControl *control)
{
	return control->peer;
}

char *pr_control_local_host(PrControl *control)
{
	return g_strdup(control->local_host);
}

guint64 pr_control_rtt_us(PrControl *control)
{
	g_autoptr(GMutexLocker) locker G_GNUC_UNUSED = g_mutex_locker_new(&control->lock);

	return control->rtt_us;
}

GError *pr_control_lost(PrControl *control, const char *what)
{
	return g_error_new(PR_PATH_ERROR, PR_PATH_ERROR_LOST, "%s: %s", control->peer, what);
}

GError *pr_control_lost_errno(PrControl *control, const char *doing, int code)
{
	return g_error_new(PR_PATH_ERROR, PR_PATH_ERROR_LOST, "%s: %s: %s", control->peer, doing,
			   g_strerror(code));
}

gboolean pr_control_has_ended(PrControl *control)
{
	g_autoptr(GMutexLocker) locker G_GNUC_UNUSED = g_mutex_locker_new(&control->lock);

	return control->failure != NULL;
}

/* Only the first reason counts. by_us: the owner ends it, so on_failed is not called. */
static void end_channel(PrControl *control, const GError *reason, gboolean by_us)
{
	g_autoptr(GMutexLocker) locker G_GNUC_UNUSED = g_mutex_locker_new(&control->lock);
	gboolean dead = g_error_matches(reason, PR_PATH_ERROR, PR_PATH_ERROR_LOST) ||
			g_error_matches(reason, PR_PATH_ERROR, PR_PATH_ERROR_SILENT);

	if (control->failure) {
		/* The owner need not hear of it any more, if the reader has not called on_failed
		 * yet. */
		control->reported |= by_us;
		g_cond_broadcast(&control->changed);
		return;
	}
	control->failure = g_error_copy(reason);
	control->reported = by_us;
	control->linger = by_us && !dead;
	shutdown(control->fd, control->linger ? SHUT_WR : SHUT_RDWR);
	pr_waker_wake(&control->closed);
	pr_waker_wake(&control->reader_waker);
	g_cond_broadcast(&control->changed);
}

void pr_control_fail(PrControl *control, GError *reason)
{
	end_channel(control, reason, FALSE);
	g_error_free(reason);
}

void pr_control_shutdown(PrControl *control, const GError *reason)
{
	end_channel(control, reason, TRUE);
}

gboolean pr_control_admit(PrControl *control, gboolean outgoing, uint16_t type)
{
	if (type == PR_MSG_HEARTBEAT || control->ops->admit_message(control->uri, outgoing, type))
		return TRUE;
	pr_control_fail(control, pr_control_lost(control, PR_CUT_TEXT));
	return FALSE;
}

/* Sending */

static void frame_advance(PrFrame *frame, gsize written)
{
	frame->left -= written;
	for (guint i = 0; i < G_N_ELEMENTS(frame->part); i++) {
		gsize n = MIN(written, frame->part[i].iov_len);

		/* A part without bytes may have no address. */
		if (!n)
			continue;
		frame->part[i].iov_base = (uint8_t *)frame->part[i].iov_base + n;
		frame->part[i].iov_len -= n;
		written -= n;
	}
}

/* Writes what fits: bytes, or -errno. */
gssize pr_frame_write(int fd, PrFrame *frame)
{
	struct msghdr msg = {.msg_iov = frame->part, .msg_iovlen = G_N_ELEMENTS(frame->part)};
	gssize n;

	do
		n = sendmsg(fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		return -errno;
	frame_advance(frame, n);
	return n;
}

/* Waits until the socket has room or the channel has ended. FALSE: the deadline of the handshake
 * has come. */
static gboolean wait_for_room(PrControl *control)
{
	struct pollfd fds[] = {
		{.fd = control->fd, .events = POLLOUT},
		{.fd = pr_waker_fd(&control->closed), .events = POLLIN},
	};

	if (control->handshake_deadline)
		return pr_wait_fd(control->fd, POLLOUT, control->handshake_deadline,
				  control->cancel) == PR_WAIT_READY;
	/* Ended by room in the socket, or by the end of the channel. */
	poll(fds, G_N_ELEMENTS(fds), -1);
	return TRUE;
}

/* A write failed. The reader declares the end, after it has read what is still in the socket. */
static void handle_write_error(PrControl *control, int code)
{
	GError *reason = pr_control_lost_errno(control, "sending", code);

	g_mutex_lock(&control->lock);
	if (control->started && !control->failure) {
		if (!control->send_error)
			control->send_error = g_steal_pointer(&reason);
		pr_waker_wake(&control->reader_waker);
		/* Ended by the reader, which declares the end at its next turn. */
		while (!control->failure)
			g_cond_wait(&control->changed, &control->lock);
	}
	g_mutex_unlock(&control->lock);
	if (reason)
		pr_control_fail(control, g_steal_pointer(&reason));
}

/* Under send_lock. */
static gboolean write_whole(PrControl *control, uint16_t type, const void *body, gsize length)
{
	uint8_t header[PR_WIRE_HEADER_BYTES];
	PrFrame frame = {
		.part = {{control->tail->data, control->tail->len},
			 {header, sizeof header},
			 {(void *)body, length}},
		.left = control->tail->len + sizeof header + length,
	};

	pr_header_encode(header, type, length);
	while (frame.left) {
		gssize n = pr_control_has_ended(control) ? -ESHUTDOWN
							 : pr_frame_write(control->fd, &frame);

		if (n == -EAGAIN && !wait_for_room(control))
			n = -ETIMEDOUT;
		if (n < 0 && n != -EAGAIN) {
			handle_write_error(control, -n);
			return FALSE;
		}
	}
	g_byte_array_set_size(control->tail, 0);
	return TRUE;
}

static void copy_failure(PrControl *control, GError **error)
{
	g_autoptr(GMutexLocker) locker G_GNUC_UNUSED = g_mutex_locker_new(&control->lock);

	if (error)
		*error = g_error_copy(control->failure);
}

gboolean pr_control_send(PrControl *control, uint16_t type, const void *body, gsize length,
			 GError **error)
{
	gboolean sent;

	g_assert(length <= pr_msg_max_length(type));
	g_mutex_lock(&control->send_lock);
	sent = !pr_control_has_ended(control) && pr_control_admit(control, TRUE, type) &&
	       write_whole(control, type, body, length);
	g_mutex_unlock(&control->send_lock);
	if (!sent)
		copy_failure(control, error);
	return sent;
}

gboolean pr_control_send_bytes(PrControl *control, uint16_t type, GByteArray *body, GError **error)
{
	return pr_control_send(control, type, body ? body->data : NULL, body ? body->len : 0,
			       error);
}

int pr_control_write_tail(PrControl *control, const void *frames, gsize length)
{
	GByteArray *tail = control->tail;
	PrFrame frame = {0};
	gssize n;

	g_byte_array_append(tail, frames, length);
	frame.part[0] = (struct iovec){tail->data, tail->len};
	frame.left = tail->len;
	n = pr_frame_write(control->fd, &frame);
	if (n > 0)
		g_byte_array_remove_range(tail, 0, n);
	return n == -EAGAIN ? 0 : MIN(n, 0);
}

/* Leaves a frame to the reader, which sends it when it can. */
static void postpone(PrControl *control, const GByteArray *frame)
{
	g_mutex_lock(&control->lock);
	if (!control->postponed)
		control->postponed = g_byte_array_new();
	g_byte_array_append(control->postponed, frame->data, frame->len);
	g_mutex_unlock(&control->lock);
	pr_waker_wake(&control->reader_waker);
}

/* A thread whose message fits in the socket releases the lock in a moment. FALSE: another thread
 * needs longer. */
static gboolean lock_send_briefly(PrControl *control)
{
	gint64 deadline = g_get_monotonic_time() + NOWAIT_US;

	while (!g_mutex_trylock(&control->send_lock)) {
		if (g_get_monotonic_time() > deadline)
			return FALSE;
		sched_yield();
	}
	return TRUE;
}

void pr_control_send_nowait(PrControl *control, uint16_t type, const GByteArray *body)
{
	g_autoptr(GByteArray) frame = g_byte_array_new();
	uint8_t header[PR_WIRE_HEADER_BYTES];

	pr_header_encode(header, type, body->len);
	g_byte_array_append(frame, header, sizeof header);
	g_byte_array_append(frame, body->data, body->len);
	if (!lock_send_briefly(control)) {
		postpone(control, frame);
		return;
	}
	/* Of a failure the reader finds out by itself. */
	if (!pr_control_has_ended(control) && pr_control_admit(control, TRUE, type))
		pr_control_write_tail(control, frame->data, frame->len);
	g_mutex_unlock(&control->send_lock);
}

void pr_control_set_watchdog(PrControl *control, PrWatchdog *watchdog)
{
	control->watchdog = watchdog;
}

gboolean pr_control_start(PrControl *control, guint heartbeat_interval_ms,
			  guint heartbeat_timeout_ms, PrPathFailed on_failed, void *opaque,
			  GError **error)
{
	pr_control_set_handshake(control, 0, NULL);
	control->on_failed = on_failed;
	control->opaque = opaque;
	pr_heartbeat_init(&control->heartbeat, heartbeat_interval_ms, heartbeat_timeout_ms,
			  g_get_monotonic_time());
	g_mutex_lock(&control->lock);
	control->started = TRUE;
	g_mutex_unlock(&control->lock);
	control->reads_ahead = TRUE;
	control->reader = pr_thread_try("control", pr_control_reader, control, error);
	if (!control->reader) {
		/* No thread can declare the end. */
		g_mutex_lock(&control->lock);
		control->started = FALSE;
		g_mutex_unlock(&control->lock);
	}
	return control->reader != NULL;
}

/* Receiving: the engine's side */

/* Under the lock, by the deadline (-1: none). */
static gboolean wait_for_message(PrControl *control, gint64 deadline)
{
	/* Ended by a message, or by the end of the channel. */
	while (g_queue_is_empty(&control->queue) && !(control->failure && control->reported)) {
		if (deadline < 0)
			g_cond_wait(&control->changed, &control->lock);
		else if (!g_cond_wait_until(&control->changed, &control->lock, deadline))
			return FALSE;
	}
	return TRUE;
}

PrMsg *pr_control_recv(PrControl *control, guint timeout_ms, GError **error)
{
	gint64 deadline =
		timeout_ms == G_MAXUINT ? -1 : g_get_monotonic_time() + (gint64)timeout_ms * 1000;
	g_autoptr(GMutexLocker) locker G_GNUC_UNUSED = g_mutex_locker_new(&control->lock);

	control->handling = FALSE;
	if (control->failure)
		g_cond_broadcast(&control->changed);
	gboolean in_time = wait_for_message(control, deadline);
	PrMsg *msg = g_queue_pop_head(&control->queue);

	control->handling = msg != NULL;
	if (msg) {
		control->queued_bytes -= sizeof *msg + msg->length;
		if (control->full)
			pr_waker_wake(&control->reader_waker);
		control->full = FALSE;
	} else if (in_time && error) {
		*error = g_error_copy(control->failure);
	} else {
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_TIMEOUT,
			    "no message from %s within %u ms", control->peer, timeout_ms);
	}
	return msg;
}

void pr_control_set_early(PrControl *control, PrControlEarly early, void *opaque)
{
	control->early = early;
	control->early_opaque = opaque;
}

GSocketConnection *pr_control_take_connection(PrControl *control)
{
	control->fd = -1;
	return g_steal_pointer(&control->connection);
}

void pr_control_put_connection(PrControl *control, GSocketConnection *connection)
{
	control->connection = connection;
	control->fd = g_socket_get_fd(g_socket_connection_get_socket(connection));
}

GSocketConnection *pr_control_release(PrControl *control)
{
	GSocketConnection *connection = pr_control_take_connection(control);

	pr_control_free(control);
	return connection;
}

/* Ends a started channel, if nothing else has, and waits for its reader. */
static void stop_reader(PrControl *control)
{
	g_autoptr(GError) reason =
		g_error_new(PR_PATH_ERROR, PR_PATH_ERROR_LOCAL_REQUEST,
			    "%s: this side has closed the connection", control->peer);

	pr_control_shutdown(control, reason);
	g_thread_join(control->reader);
}

void pr_control_free(PrControl *control)
{
	if (!control)
		return;
	if (control->reader)
		stop_reader(control);
	if (control->connection)
		g_io_stream_close(G_IO_STREAM(control->connection), NULL, NULL);
	g_clear_object(&control->connection);
	g_clear_object(&control->cancel);
	pr_waker_clear(&control->reader_waker);
	pr_waker_clear(&control->closed);
	pr_uri_free(control->uri);
	g_free(control->peer);
	g_free(control->local_host);
	g_byte_array_unref(control->tail);
	g_clear_pointer(&control->postponed, g_byte_array_unref);
	g_queue_clear_full(&control->queue, (GDestroyNotify)pr_msg_free);
	pr_msg_free(control->incoming);
	g_clear_error(&control->failure);
	g_clear_error(&control->send_error);
	g_mutex_clear(&control->send_lock);
	g_mutex_clear(&control->lock);
	g_cond_clear(&control->changed);
	g_free(control);
}
