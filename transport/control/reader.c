/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The reader thread of a control channel. It reads, sends heartbeats, and declares the end.
 * internal.h says what it guarantees. */
#include "transport/control/internal.h"

#include <poll.h>
#include <string.h>
#include <sys/socket.h>

#include "transport/net/dial.h"

#define QUEUE_BYTES_MAX	 (32 * 1024 * 1024)
#define LINGER_MS	 200
#define BODY_FIRST	 (64 * 1024) /* bytes that are allocated before any of a body has come in */
#define LAST_MESSAGES_MS 1000
#define READ_AT_ONCE	 (8 * 1024 * 1024) /* bytes, before the heartbeat is checked again */

static const PrWatchPoint reading = {"reading the control channel", 300};
static const PrWatchPoint ending = {"reporting the end of the control channel",
				    LAST_MESSAGES_MS + 2000};

/* Under send_lock. Never waits: where the socket has no room, no heartbeat is needed, because the
 * bytes that fill the socket show the peer that this side is alive. */
static int write_heartbeat(PrControl *control, const uint8_t *frame, gsize length)
{
	int result = pr_control_write_tail(control, NULL, 0);

	return result < 0 || control->tail->len ? result
						: pr_control_write_tail(control, frame, length);
}

static void note_send_error(PrControl *control, int code)
{
	g_autoptr(GMutexLocker) locker G_GNUC_UNUSED = g_mutex_locker_new(&control->lock);

	if (!control->send_error)
		control->send_error = pr_control_lost_errno(control, "sending", code);
}

static void send_heartbeat(PrControl *control, gint64 now)
{
	uint8_t frame[PR_WIRE_HEADER_BYTES + PR_HEARTBEAT_BYTES];
	PrHeartbeatBody body;
	int result;

	pr_heartbeat_make(&control->heartbeat, now, &body);
	if (!g_mutex_trylock(&control->send_lock))
		return;
	pr_header_encode(frame, PR_MSG_HEARTBEAT, PR_HEARTBEAT_BYTES);
	pr_heartbeat_encode(frame + PR_WIRE_HEADER_BYTES, &body);
	result = write_heartbeat(control, frame, sizeof frame);
	g_mutex_unlock(&control->send_lock);
	if (result < 0)
		note_send_error(control, -result);
}

/* Sends the frames of pr_control_send_nowait() that were left to the reader. */
static void send_postponed(PrControl *control)
{
	g_autoptr(GByteArray) frames = NULL;
	int result = 0;

	if (!g_mutex_trylock(&control->send_lock))
		return;
	g_mutex_lock(&control->lock);
	frames = g_steal_pointer(&control->postponed);
	g_mutex_unlock(&control->lock);
	if (frames)
		result = pr_control_write_tail(control, frames->data, frames->len);
	g_mutex_unlock(&control->send_lock);
	if (result < 0)
		note_send_error(control, -result);
}

/* Receiving: the reader's side */

typedef enum ReadResult {
	READ_GOT,   /* bytes were received */
	READ_EMPTY, /* the socket has none */
	READ_FULL,  /* the queue has no room */
	READ_ENDED, /* the channel has ended */
} ReadResult;

static void note_heartbeat(PrControl *control, const PrHeartbeatBody *body)
{
	g_autoptr(GMutexLocker) locker = NULL;
	guint64 rtt = pr_heartbeat_handle(&control->heartbeat, g_get_monotonic_time(), body);

	locker = g_mutex_locker_new(&control->lock);
	if (rtt)
		control->rtt_us = rtt;
}

static gboolean is_for_started_channel(uint16_t type)
{
	switch (type) {
	case PR_MSG_HELLO:
	case PR_MSG_HELLO_ACK:
	case PR_MSG_LANE:
	case PR_MSG_LANE_ACK:
	case PR_RP_REQ_PAGES:
	case PR_RP_PAGES:
		return FALSE;
	default:
		return TRUE;
	}
}

/* Takes the message. */
static void enqueue(PrControl *control, PrMsg *msg)
{
	g_autoptr(GMutexLocker) locker G_GNUC_UNUSED = g_mutex_locker_new(&control->lock);

	g_queue_push_tail(&control->queue, msg);
	control->queued_bytes += sizeof *msg + msg->length;
	g_cond_broadcast(&control->changed);
}

static gboolean handled_early(PrControl *control, const PrMsg *msg)
{
	return control->early && control->early(msg, control->early_opaque);
}

static void fail_malformed(PrControl *control, const char *what)
{
	g_autofree char *text =
		g_strdup_printf("the peer does not speak the Postroad protocol: %s", what);

	pr_control_fail(control, pr_control_lost(control, text));
}

static void handle_heartbeat(PrControl *control, const PrMsg *msg)
{
	g_autoptr(GError) error = NULL;
	PrHeartbeatBody body;

	if (pr_heartbeat_decode(msg->body, msg->length, &body, &error))
		note_heartbeat(control, &body);
	else
		fail_malformed(control, error->message);
}

/* Takes a complete message. May end the channel. */
static void handle_message(PrControl *control, PrMsg *taken)
{
	g_autoptr(PrMsg) msg = taken;

	if (msg->type == PR_MSG_HEARTBEAT) {
		handle_heartbeat(control, msg);
	} else if (!is_for_started_channel(msg->type)) {
		g_autofree char *what =
			g_strdup_printf("%s on a started channel", pr_msg_name(msg->type));

		fail_malformed(control, what);
	} else if (pr_control_admit(control, FALSE, msg->type) && pr_msg_is_known(msg->type)) {
		if (!handled_early(control, msg))
			enqueue(control, g_steal_pointer(&msg));
	}
}

/* The header is complete. */
static gboolean begin_body(PrControl *control, GError **error)
{
	PrMsgHeader header;

	if (!pr_header_decode(control->header, &header, error))
		return FALSE;
	control->incoming = g_new0(PrMsg, 1);
	control->incoming->type = header.type;
	control->incoming->length = header.length;
	control->filled = control->allocated = 0;
	return TRUE;
}

/* The memory of a body grows with the bytes that have come in, because the length in the header
 * may be a lie. NULL: no memory is left. */
static uint8_t *body_room(PrControl *control, gsize *ret_n)
{
	PrMsg *msg = control->incoming;

	if (control->filled == control->allocated) {
		gsize wanted = MIN(msg->length, MAX(BODY_FIRST, control->allocated * 2));
		uint8_t *body = g_try_realloc(msg->body, wanted);

		if (!body)
			return NULL;
		msg->body = body;
		control->allocated = wanted;
	}
	*ret_n = control->allocated - control->filled;
	return msg->body + control->filled;
}

static gboolean is_complete(const PrControl *control)
{
	return control->incoming && control->filled == control->incoming->length;
}

static gssize receive(PrControl *control, uint8_t *to, gsize room)
{
	gssize n;

	do
		n = recv(control->fd, to, room, MSG_DONTWAIT);
	while (n < 0 && errno == EINTR);
	control->drained = control->reads_ahead && n > 0 && (gsize)n < room;
	return n < 0 ? -errno : n;
}

static gssize take_ahead(PrControl *control, uint8_t *to, gsize room)
{
	gsize n = MIN(room, control->ahead_n - control->ahead_at);

	memcpy(to, control->ahead + control->ahead_at, n);
	control->ahead_at += n;
	return (gssize)n;
}

/* Several small messages take one system call, and none is needed to find that the socket is
 * empty. */
static gssize receive_ahead(PrControl *control, uint8_t *to, gsize room)
{
	gssize n;

	if (control->ahead_at < control->ahead_n)
		return take_ahead(control, to, room);
	if (control->drained) {
		control->drained = FALSE;
		return -EAGAIN;
	}
	if (!control->reads_ahead || room >= PR_AHEAD_BYTES)
		return receive(control, to, room);
	n = receive(control, control->ahead, PR_AHEAD_BYTES);
	if (n <= 0)
		return n;
	control->ahead_at = 0;
	control->ahead_n = (gsize)n;
	return take_ahead(control, to, room);
}

/* Receives some of the missing bytes: how many, 0 at the end of the stream, or -errno. -EBADMSG,
 * with an error: the header is malformed. */
static gssize receive_part(PrControl *control, GError **error)
{
	gsize room = PR_WIRE_HEADER_BYTES - control->header_filled;
	uint8_t *to = control->incoming ? body_room(control, &room)
					: control->header + control->header_filled;
	gssize n;

	if (!to)
		return -ENOMEM;
	n = receive_ahead(control, to, room);
	if (n < 0)
		return n;
	if (control->incoming) {
		control->filled += n;
		return n;
	}
	control->header_filled += n;
	if (control->header_filled == PR_WIRE_HEADER_BYTES && !begin_body(control, error))
		return -EBADMSG;
	return n;
}

static PrMsg *take_complete(PrControl *control)
{
	control->header_filled = 0;
	return g_steal_pointer(&control->incoming);
}

static GError *receive_failure(PrControl *control, gssize n)
{
	if (n < 0)
		return pr_control_lost_errno(control, "receiving", -n);
	if (control->header_filled)
		return pr_control_lost(control,
				       "the peer closed the connection in the middle of a message");
	return pr_control_lost(control, "the peer closed the connection");
}

/* Whether the queue has room for the incoming message. A message that is alone always fits. */
static gboolean has_room(PrControl *control)
{
	g_autoptr(GMutexLocker) locker G_GNUC_UNUSED = g_mutex_locker_new(&control->lock);
	gsize incoming = control->incoming ? control->incoming->length : 0;

	control->full = control->queued_bytes && control->queued_bytes + incoming > QUEUE_BYTES_MAX;
	return !control->full;
}

static ReadResult receive_once(PrControl *control, gsize *received)
{
	g_autoptr(GError) malformed = NULL;
	gssize n = receive_part(control, &malformed);

	if (n == -EAGAIN)
		return READ_EMPTY;
	if (malformed)
		fail_malformed(control, malformed->message);
	else if (n <= 0)
		pr_control_fail(control, receive_failure(control, n));
	else
		*received += n;
	if (is_complete(control))
		handle_message(control, take_complete(control));
	return pr_control_has_ended(control) ? READ_ENDED : READ_GOT;
}

/* Reads what the socket has, up to READ_AT_ONCE. */
static ReadResult read_socket(PrControl *control, gboolean ignore_full)
{
	gsize received = 0;
	ReadResult result;

	do {
		if (!ignore_full && !has_room(control))
			return READ_FULL;
		result = receive_once(control, &received);
	} while (result == READ_GOT && received < READ_AT_ONCE);
	return result == READ_EMPTY && received ? READ_GOT : result;
}

/* Reads all that the peer had sent before our write failed, then ends the channel. A connection
 * that cannot be written to has an end of stream to be read, too. A TCP socket has it at once,
 * and TLS behind a descriptor (tls-proxy.c) when its thread has passed on what had come in. */
static void end_after_send_error(PrControl *control)
{
	gint64 deadline = g_get_monotonic_time() + LAST_MESSAGES_MS * 1000;
	g_autoptr(GError) reason = NULL;
	ReadResult result;

	g_mutex_lock(&control->lock);
	reason = g_steal_pointer(&control->send_error);
	g_mutex_unlock(&control->lock);
	do
		result = read_socket(control, TRUE);
	while (result != READ_ENDED && g_get_monotonic_time() < deadline &&
	       (result == READ_GOT ||
		pr_wait_fd(control->fd, POLLIN, deadline, NULL) == PR_WAIT_READY));
	pr_control_fail(control, g_steal_pointer(&reason));
}

static gboolean has_send_error(PrControl *control)
{
	g_autoptr(GMutexLocker) locker G_GNUC_UNUSED = g_mutex_locker_new(&control->lock);

	return control->send_error != NULL;
}

static void end_if_silent(PrControl *control, gint64 now)
{
	if (!pr_heartbeat_is_dead(&control->heartbeat, now))
		return;
	/* Reads once more: something may have come in while this thread did not run. */
	switch (read_socket(control, FALSE)) {
	case READ_EMPTY:
		pr_control_fail(
			control,
			g_error_new(PR_PATH_ERROR, PR_PATH_ERROR_SILENT,
				    "nothing heard from %s for %d ms", control->peer,
				    (int)(pr_heartbeat_silence(&control->heartbeat, now) / 1000)));
		break;
	case READ_GOT:
	case READ_FULL:
		pr_heartbeat_heard(&control->heartbeat, now);
		break;
	case READ_ENDED:
		break;
	}
}

/* Sleeps until there is something to read or to send, or a wake-up. Returns the time. */
static gint64 reader_sleep(PrControl *control)
{
	gint64 sleep = pr_heartbeat_sleep(&control->heartbeat, g_get_monotonic_time());
	gboolean room = has_room(control);
	/* poll(2) does not see the bytes that were received ahead. */
	gint64 at_most = room && control->ahead_at < control->ahead_n ? 0 : sleep;
	struct timespec timeout = {at_most / G_USEC_PER_SEC, at_most % G_USEC_PER_SEC * 1000};
	struct pollfd fds[] = {
		{.fd = room ? control->fd : -1, .events = POLLIN},
		{.fd = pr_waker_fd(&control->reader_waker), .events = POLLIN},
	};
	gint64 now;

	ppoll(fds, G_N_ELEMENTS(fds), &timeout, NULL);
	if (fds[1].revents)
		pr_waker_drain(&control->reader_waker);
	now = g_get_monotonic_time();
	pr_heartbeat_woke(&control->heartbeat, now);
	return now;
}

static void reader_turn(PrControl *control, PrWatch *watch, gint64 now)
{
	switch (read_socket(control, FALSE)) {
	case READ_GOT:
	case READ_FULL:
		pr_heartbeat_heard(&control->heartbeat, now);
		break;
	case READ_EMPTY:
		break;
	case READ_ENDED:
		return;
	}
	send_postponed(control);
	if (pr_heartbeat_is_due(&control->heartbeat, now))
		send_heartbeat(control, now);
	if (has_send_error(control)) {
		pr_watch_enter(watch, &ending);
		end_after_send_error(control);
	} else {
		end_if_silent(control, now);
	}
}

/* This side has ended the channel: waits up to LINGER_MS for the peer to close its side, too. */
static void linger(PrControl *control)
{
	gint64 deadline = g_get_monotonic_time() + LINGER_MS * 1000;
	g_autofree uint8_t *dropped = g_malloc(BODY_FIRST);
	gssize n;

	do {
		if (pr_wait_fd(control->fd, POLLIN, deadline, NULL) != PR_WAIT_READY)
			return;
		n = recv(control->fd, dropped, BODY_FIRST, MSG_DONTWAIT);
	} while (n > 0 || (n < 0 && (errno == EAGAIN || errno == EINTR)));
}

/* Waits until the engine has handled the messages that came before the end, because they may say
 * why the peer left. The engine may take long for them. FALSE: on_failed need not be called any
 * more. */
static gboolean wait_for_last_messages(PrControl *control)
{
	gint64 deadline = g_get_monotonic_time() + LAST_MESSAGES_MS * 1000;
	g_autoptr(GMutexLocker) locker G_GNUC_UNUSED = g_mutex_locker_new(&control->lock);

	while (!control->reported && (control->handling || !g_queue_is_empty(&control->queue)))
		if (!g_cond_wait_until(&control->changed, &control->lock, deadline))
			break;
	return !control->reported;
}

/* The channel has ended: calls on_failed, before any receive returns the failure. */
static void report(PrControl *control)
{
	if (control->on_failed)
		control->on_failed(control->failure, control->opaque);
	g_mutex_lock(&control->lock);
	control->reported = TRUE;
	g_cond_broadcast(&control->changed);
	g_mutex_unlock(&control->lock);
}

gpointer pr_control_reader(gpointer opaque)
{
	PrControl *control = opaque;
	gint64 now = g_get_monotonic_time();
	g_autoptr(PrWatch) watch = pr_watch_new(control->watchdog, "control");
	gboolean wait;

	while (!pr_control_has_ended(control)) {
		pr_watch_enter_at(watch, &reading, now);
		reader_turn(control, watch, now);
		pr_watch_idle(watch);
		now = reader_sleep(control);
	}
	pr_watch_enter(watch, &ending);
	if (wait_for_last_messages(control))
		report(control);
	g_mutex_lock(&control->lock);
	wait = control->linger;
	g_mutex_unlock(&control->lock);
	if (wait)
		linger(control);
	return NULL;
}

/* Waits for more of the first frame. */
static gboolean wait_for_first(PrControl *control, GError **error)
{
	switch (pr_wait_fd(control->fd, POLLIN, control->handshake_deadline, control->cancel)) {
	case PR_WAIT_READY:
		return TRUE;
	case PR_WAIT_CANCELLED:
		return !g_cancellable_set_error_if_cancelled(control->cancel, error);
	case PR_WAIT_TIMEOUT:
		break;
	}
	g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_TIMEOUT,
		    "%s has accepted the connection and does not answer", control->peer);
	return FALSE;
}

/* Whether a connection may begin with this message. Its length was checked against the limit of
 * its type. */
static gboolean is_first(const PrMsg *msg, GError **error)
{
	if (msg->type == PR_MSG_HELLO || msg->type == PR_MSG_HELLO_ACK || msg->type == PR_MSG_LANE)
		return TRUE;
	g_set_error(error, PR_WIRE_ERROR, PR_WIRE_ERROR_MALFORMED, "it begins with %s",
		    pr_msg_name(msg->type));
	return FALSE;
}

/* Receives a part of the first frame. */
static gboolean read_first_part(PrControl *control, GError **error)
{
	gssize n = receive_part(control, error);

	if (n == -EAGAIN)
		return wait_for_first(control, error);
	if (n == -EBADMSG)
		return FALSE;
	if (n <= 0) {
		g_propagate_error(error, receive_failure(control, n));
		return FALSE;
	}
	return !control->incoming || is_first(control->incoming, error);
}

PrMsg *pr_control_read_first(PrControl *control, GError **error)
{
	g_autoptr(PrMsg) msg = NULL;

	while (!is_complete(control))
		if (!read_first_part(control, error))
			return NULL;
	msg = take_complete(control);
	/* The fault injection counts the messages of control channels only. */
	if (msg->type == PR_MSG_LANE || pr_control_admit(control, FALSE, msg->type))
		return g_steal_pointer(&msg);
	g_propagate_error(error, g_error_copy(control->failure));
	return NULL;
}
