/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The listener. Goal: no peer that connects can keep the real peer out, or disturb a migration.
 *
 * The way of a connection, in the order of the functions below:
 *
 *  1. accept_conns() accepts it. It has until its deadline for all the steps that follow.
 *  2. sniff_protocol() looks at its first byte: plain frames, TLS, or neither.
 *  3. start_tls_handshakes(): with TLS it waits for its turn, because handshakes cost processor
 *     time that the guest may need. PrTokenBucket limits them, and the host that had fewest of
 *     late is next. Then the handshake runs in a thread of its own (tls-handshakes.h), and
 *     collect_handshaken() brings the connection back.
 *  4. read_first_frame() reads its first frame, piece by piece as it comes in.
 *  5. hand_over() gives a connection with a HELLO to the thread that calls on_hello
 *     (hello-queue.h), and one with a LANE to the backend's offer().
 *
 * The accept thread does all but the handshakes and on_hello, for all connections at once, and
 * never blocks. At most PENDING_MAX connections are pending; one more evicts one (peer-limits.h).
 * So a flood from one host evicts its own. A real peer sends its HELLO at once: it is handed over
 * before a flood of silent connections from its own host can evict it.
 *
 * A peer that speaks without TLS where TLS is required may say HELLO, and so may one whose
 * certificate is not accepted: the answer has the reason. What peers can cause to be logged is
 * limited, too.
 */
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>

#include "transport/control/hello-queue.h"
#include "transport/control/internal.h"
#include "transport/control/listen-sockets.h"
#include "transport/control/peer-limits.h"
#include "transport/control/pending-conn.h"
#include "transport/control/tls-handshakes.h"
#include "transport/registry.h"
#include "util/try-alloc.h"

#define PENDING_MAX	 32
#define ACCEPTED_AT_ONCE 64
#define OUT_OF_FILES_MS	 100 /* how long accepting pauses when there are no descriptors left */

#define TLS_HANDSHAKE	 0x16 /* the first byte of a TLS connection; of no frame of ours */

struct PrListener {
	/* Constant. */
	PrUri *uri;
	const PrTransportOps *ops;
	PrDataListener *data;
	PrSecurity security;
	guint handshake_ms;
	PrOnHello on_hello;
	void *opaque;
	GPtrArray *sockets;	     /* GSocket, listening */
	PrHelloQueue *hellos;	     /* has its own lock */
	PrTlsHandshakes *handshakes; /* NULL without TLS; has its own lock */
	PrWaker stop;		     /* never drained: the accept thread has to end */
	GThread *accept_thread;

	/* The accept thread's. */
	GPtrArray *pending;  /* PrPendingConn, in the order in which they came */
	gint64 paused_until; /* no connection is accepted before; us, monotonic */
	PrTokenBucket tls_turns;
	PrLogRatelimit log_limit;
};

static void note(PrListener *listener, const char *what, const char *why)
{
	g_autofree char *more = NULL;
	guint suppressed;

	if (!pr_log_ratelimit_allows(&listener->log_limit, g_get_monotonic_time(), &suppressed))
		return;
	if (suppressed)
		more = g_strdup_printf(" (%u more lines like this were left out)", suppressed);
	g_info("listener: %s: %s%s", what, why, more ? more : "");
}

/* Returns the connection's next step. */
static PrPendingStep turn_away(PrListener *listener, const PrPendingConn *conn, const char *why)
{
	g_autofree char *peer = pr_pending_conn_peer(conn);
	g_autofree char *what = g_strdup_printf("turned %s away", peer);

	note(listener, what, why);
	return PR_PENDING_DONE;
}

/* As turn_away(), of a peer that has sent a HELLO: the answer to it has the reason. */
static PrPendingStep refuse(PrListener *listener, const PrPendingConn *conn, const char *why)
{
	PrHelloAck ack = {.status = PR_HELLO_REFUSED};

	pr_reason_copy(ack.reason, why);
	pr_control_answer(conn->control, &ack, NULL);
	return turn_away(listener, conn, why);
}

static PrPendingStep open_conn(PrListener *listener, PrPendingConn *conn)
{
	g_autoptr(GError) error = NULL;

	if (pr_pending_conn_open(conn, listener->uri, listener->ops, &error))
		return PR_PENDING_FRAME;
	note(listener, "cannot take a connection", error->message);
	return PR_PENDING_DONE;
}

/* Step 2: what it begins with */

static PrPendingStep sniff_first_byte(PrListener *listener, PrPendingConn *conn, uint8_t first)
{
	gboolean tls = listener->security.tls != NULL;

	if (first == TLS_HANDSHAKE && tls)
		return PR_PENDING_TLS_TURN;
	if (first == TLS_HANDSHAKE)
		return turn_away(listener, conn,
				 "it begins with TLS, which this side does not use; start this "
				 "side with --tls-dir, too");
	/* Of HELLO and LANE. */
	if (first != 0)
		return turn_away(listener, conn, "it does not speak the Postroad protocol");
	if (tls)
		conn->refusal =
			g_strdup("this destination wants TLS: start the source with --tls-dir, "
				 "and certificates of the same CA");
	return open_conn(listener, conn);
}

static PrPendingStep sniff_protocol(PrListener *listener, PrPendingConn *conn)
{
	uint8_t first;
	gssize n = recv(conn->fd, &first, 1, MSG_PEEK | MSG_DONTWAIT);

	if (n == 1)
		return sniff_first_byte(listener, conn, first);
	if (n == 0 || (errno != EAGAIN && errno != EINTR))
		return turn_away(listener, conn,
				 "it closed the connection without sending anything");
	if (g_get_monotonic_time() < conn->deadline)
		return PR_PENDING_SILENT;
	return turn_away(listener, conn,
			 listener->security.tls ? "it began no TLS handshake in time"
						: "it did not say HELLO in time");
}

/* Step 3: TLS */

static PrPendingStep wait_for_tls_turn(PrListener *listener, PrPendingConn *conn)
{
	if (g_get_monotonic_time() < conn->deadline)
		return PR_PENDING_TLS_TURN;
	return turn_away(listener, conn,
			 "its turn at a TLS handshake did not come in time, because too many "
			 "connections want one");
}

/* The connection whose turn it is, by its index; -1: none waits. */
static int pick_tls_turn(PrListener *listener)
{
	PrPeerHost hosts[PENDING_MAX];
	guint indices[PENDING_MAX], n = 0;

	for (guint i = 0; i < listener->pending->len; i++) {
		const PrPendingConn *conn = listener->pending->pdata[i];

		if (conn->step != PR_PENDING_TLS_TURN)
			continue;
		indices[n] = i;
		hosts[n++] = conn->host;
	}
	return n ? (int)indices[pr_token_bucket_pick_next(&listener->tls_turns, hosts, n)] : -1;
}

/* Takes the connection. */
static void start_tls_handshake(PrListener *listener, PrPendingConn *taken)
{
	g_autoptr(PrPendingConn) conn = taken;
	g_autoptr(GError) error = NULL;

	if (open_conn(listener, conn) == PR_PENDING_DONE)
		return;
	if (pr_tls_handshakes_start(listener->handshakes, conn, &error))
		g_steal_pointer(&conn);
	else
		turn_away(listener, conn, error->message);
}

/* Starts as many of the handshakes that wait as may be started now. */
static void start_tls_handshakes(PrListener *listener)
{
	PrTokenBucket *turns = &listener->tls_turns;
	gint64 now = g_get_monotonic_time();
	int next;

	while (pr_token_bucket_available_at(turns, now) <= now &&
	       (next = pick_tls_turn(listener)) >= 0) {
		PrPendingConn *conn = g_ptr_array_steal_index(listener->pending, next);

		pr_token_bucket_take(turns, &conn->host, now);
		start_tls_handshake(listener, conn);
	}
}

/* Step 4: its first frame */

/* Reads what has come in. NULL: the frame is not complete, or the connection is done. */
static PrMsg *read_first_frame(PrListener *listener, PrPendingConn *conn)
{
	gint64 now = g_get_monotonic_time();
	g_autoptr(GError) error = NULL;
	PrMsg *msg;

	/* The deadline is in the past, so that it does not wait for more. */
	pr_control_set_handshake(conn->control, now, NULL);
	msg = pr_control_read_first(conn->control, &error);
	if (msg)
		return msg;
	if (!g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_TIMEOUT))
		conn->step = turn_away(listener, conn, error->message);
	else if (now >= conn->deadline)
		conn->step = turn_away(listener, conn, "it did not say HELLO in time");
	return NULL;
}

/* Step 5: to whom it belongs */

static PrPendingStep hand_over_hello(PrListener *listener, PrPendingConn *conn, const PrMsg *msg)
{
	g_autoptr(GError) error = NULL;
	PrHello hello;

	if (!pr_hello_decode(msg->body, msg->length, &hello, &error))
		return refuse(listener, conn, error->message);
	pr_hello_queue_push(listener->hellos, g_steal_pointer(&conn->control), &hello);
	return PR_PENDING_DONE;
}

static PrPendingStep hand_over_lane(PrListener *listener, PrPendingConn *conn, const PrMsg *msg)
{
	g_autoptr(GError) error = NULL;
	PrLaneHello lane;

	if (!pr_lane_hello_decode(msg->body, msg->length, &lane, &error))
		return turn_away(listener, conn, error->message);
	listener->ops->offer(listener->data, pr_control_release(g_steal_pointer(&conn->control)),
			     &lane);
	return PR_PENDING_DONE;
}

static PrPendingStep hand_over(PrListener *listener, PrPendingConn *conn, const PrMsg *msg)
{
	if (conn->refusal && msg->type == PR_MSG_HELLO)
		return refuse(listener, conn, conn->refusal);
	if (conn->refusal)
		return turn_away(listener, conn, conn->refusal);
	if (msg->type == PR_MSG_HELLO)
		return hand_over_hello(listener, conn, msg);
	if (msg->type == PR_MSG_LANE)
		return hand_over_lane(listener, conn, msg);
	return turn_away(listener, conn, "it begins with HELLO_ACK");
}

/* From the hello queue's thread. */
static void handle_hello(PrControl *control, const PrHello *hello, void *opaque)
{
	PrListener *listener = opaque;
	gint64 deadline = g_get_monotonic_time() + (gint64)listener->handshake_ms * 1000;

	pr_control_set_handshake(control, deadline, NULL);
	listener->on_hello(control, hello, listener, listener->opaque);
}

/* The accept thread: the steps of all connections */

/* Takes a connection as far as it gets without waiting. FALSE: it is done. */
static gboolean advance(PrListener *listener, PrPendingConn *conn)
{
	if (conn->step == PR_PENDING_SILENT)
		conn->step = sniff_protocol(listener, conn);
	if (conn->step == PR_PENDING_TLS_TURN)
		conn->step = wait_for_tls_turn(listener, conn);
	if (conn->step == PR_PENDING_FRAME) {
		g_autoptr(PrMsg) msg = read_first_frame(listener, conn);

		if (msg)
			conn->step = hand_over(listener, conn, msg);
	}
	return conn->step != PR_PENDING_DONE;
}

static void advance_all(PrListener *listener)
{
	for (guint i = 0; i < listener->pending->len;)
		if (advance(listener, listener->pending->pdata[i]))
			i++;
		else
			g_ptr_array_remove_index(listener->pending, i);
}

static void evict_one(PrListener *listener)
{
	PrPeerHost hosts[PENDING_MAX];
	guint n = 0;

	for (; n < listener->pending->len; n++)
		hosts[n] = ((PrPendingConn *)listener->pending->pdata[n])->host;
	g_ptr_array_remove_index(listener->pending, pr_peer_pick_eviction(hosts, n));
}

/* Takes the connection. */
static void add_pending(PrListener *listener, PrPendingConn *taken)
{
	g_autoptr(PrPendingConn) conn = taken;

	/* The HELLO of a real peer has usually come in already. */
	if (!advance(listener, conn))
		return;
	if (listener->pending->len == PENDING_MAX) {
		note(listener, "too many connections are pending", "one of them is closed");
		evict_one(listener);
	}
	g_ptr_array_add(listener->pending, g_steal_pointer(&conn));
}

/* Takes the descriptor. */
static void accept_conn(PrListener *listener, int fd)
{
	gint64 deadline = g_get_monotonic_time() + (gint64)listener->handshake_ms * 1000;

	add_pending(listener, pr_pending_conn_new(fd, deadline));
}

/* Accepts what waits, a bounded number, so that those which are pending advance in between. */
static void accept_conns(PrListener *listener, int listening)
{
	for (guint i = 0; i < ACCEPTED_AT_ONCE; i++) {
		int fd = accept4(listening, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

		if (fd >= 0) {
			accept_conn(listener, fd);
			continue;
		}
		if (errno == EAGAIN)
			return;
		/* Other errors are about one connection, which is gone. */
		if (errno != EMFILE && errno != ENFILE && errno != ENOBUFS && errno != ENOMEM)
			continue;
		note(listener, "accept", g_strerror(errno));
		listener->paused_until = g_get_monotonic_time() + OUT_OF_FILES_MS * 1000;
		if (listener->pending->len)
			evict_one(listener);
		return;
	}
}

/* Connections whose TLS handshakes have ended. */
static void collect_handshaken(PrListener *listener)
{
	for (;;) {
		g_autoptr(GError) failure = NULL;
		g_autoptr(PrPendingConn) conn =
			pr_tls_handshakes_pop(listener->handshakes, &failure);

		if (!conn)
			return;
		if (failure)
			turn_away(listener, conn, failure->message);
		else
			add_pending(listener, g_steal_pointer(&conn));
	}
}

/* How long the accept thread may sleep, in ms; -1: for ever. */
static int sleep_ms(PrListener *listener, gint64 now)
{
	gint64 until = listener->paused_until > now ? listener->paused_until : G_MAXINT64;

	for (guint i = 0; i < listener->pending->len; i++) {
		PrPendingConn *conn = listener->pending->pdata[i];

		until = MIN(until, conn->deadline);
		if (conn->step == PR_PENDING_TLS_TURN)
			until = MIN(until, pr_token_bucket_available_at(&listener->tls_turns, now));
	}
	if (until == G_MAXINT64)
		return -1;
	return until <= now ? 0 : MIN((until - now + 999) / 1000, G_MAXINT);
}

/* Sleeps until there is something to do. FALSE: the listener is being freed. The listening
 * sockets begin with fds[2]. */
static gboolean wait_for_peers(PrListener *listener, struct pollfd *fds)
{
	gint64 now = g_get_monotonic_time();
	gboolean paused = listener->paused_until > now;
	guint n = 0;

	fds[n++] = (struct pollfd){.fd = pr_waker_fd(&listener->stop), .events = POLLIN};
	fds[n++] = (struct pollfd){
		.fd = listener->handshakes ? pr_tls_handshakes_fd(listener->handshakes) : -1,
		.events = POLLIN,
	};
	for (guint i = 0; i < listener->sockets->len; i++)
		fds[n++] = (struct pollfd){
			.fd = paused ? -1 : g_socket_get_fd(listener->sockets->pdata[i]),
			.events = POLLIN,
		};
	for (guint i = 0; i < listener->pending->len; i++)
		fds[n++] = (struct pollfd){
			.fd = pr_pending_conn_poll_fd(listener->pending->pdata[i]),
			.events = POLLIN,
		};
	poll(fds, n, sleep_ms(listener, now));
	return !(fds[0].revents & POLLIN);
}

static gpointer accept_thread(gpointer opaque)
{
	PrListener *listener = opaque;
	struct pollfd fds[2 + PR_LISTENING_MAX + PENDING_MAX] = {0};

	while (wait_for_peers(listener, fds)) {
		advance_all(listener);
		if (listener->handshakes)
			collect_handshaken(listener);
		for (guint i = 0; i < listener->sockets->len; i++)
			if (fds[2 + i].revents)
				accept_conns(listener,
					     g_socket_get_fd(listener->sockets->pdata[i]));
		start_tls_handshakes(listener);
	}
	return NULL;
}

/* Creation */

/* The URI with the port that was really bound, in its text, too. */
static void note_port(PrListener *listener)
{
	PrUri *uri = listener->uri;
	const char *options = strchr(uri->text, '?');
	g_autofree char *address = NULL;
	char *text;

	uri->port = pr_listening_port(listener->sockets->pdata[0]);
	address = pr_uri_address(uri);
	text = g_strconcat(address, options, NULL);
	g_free(uri->text);
	uri->text = text;
}

/* What listens beside the control port is given an address, so that no name is looked up twice. */
static PrUri *data_uri(PrListener *listener)
{
	PrUri *uri = pr_uri_copy(listener->uri);

	if (!g_hostname_is_ip_address(uri->host)) {
		g_free(uri->host);
		uri->host = pr_listening_host(listener->sockets->pdata[0]);
	}
	return uri;
}

static gboolean open_listener(PrListener *listener, GCancellable *cancel, GError **error)
{
	g_autoptr(PrUri) uri = NULL;

	listener->ops = pr_transport_find(listener->uri->scheme, error);
	if (!listener->ops || !pr_listening_open(listener->uri, &listener->security,
						 listener->sockets, cancel, error))
		return FALSE;
	note_port(listener);
	if (!pr_waker_init(&listener->stop, error))
		return FALSE;
	uri = data_uri(listener);
	listener->data = listener->ops->listen(uri, error);
	return listener->data != NULL;
}

static gboolean start_threads(PrListener *listener, GError **error)
{
	const PrTls *tls = listener->security.tls;

	if (tls)
		listener->handshakes = pr_tls_handshakes_new(tls, error);
	if (tls && !listener->handshakes)
		return FALSE;
	listener->hellos = pr_hello_queue_new(handle_hello, listener, error);
	if (listener->hellos)
		listener->accept_thread = pr_thread_try("listener", accept_thread, listener, error);
	return listener->accept_thread != NULL;
}

PrListener *pr_listener_new(const PrUri *uri, const PrSecurity *security, guint handshake_ms,
			    PrOnHello on_hello, void *opaque, GCancellable *cancel, GError **error)
{
	g_autoptr(PrListener) listener = g_new0(PrListener, 1);

	listener->uri = pr_uri_copy(uri);
	if (security)
		listener->security = *security;
	listener->handshake_ms = handshake_ms;
	listener->on_hello = on_hello;
	listener->opaque = opaque;
	listener->stop = PR_WAKER_INIT;
	g_mutex_init(&listener->log_limit.lock);
	listener->sockets = g_ptr_array_new_with_free_func(g_object_unref);
	listener->pending = g_ptr_array_new_with_free_func((GDestroyNotify)pr_pending_conn_free);
	if (!open_listener(listener, cancel, error) || !start_threads(listener, error)) {
		g_autofree char *address = pr_uri_address(uri);

		g_prefix_error(error, "cannot listen on %s: ", address);
		return NULL;
	}
	return g_steal_pointer(&listener);
}

const PrUri *pr_listener_uri(PrListener *listener)
{
	return listener->uri;
}

PrDataListener *pr_listener_data(PrListener *listener)
{
	return listener->data;
}

void pr_listener_free(PrListener *listener)
{
	if (!listener)
		return;
	pr_waker_wake(&listener->stop);
	if (listener->accept_thread)
		g_thread_join(listener->accept_thread);
	pr_tls_handshakes_free(listener->handshakes);
	pr_hello_queue_free(listener->hellos);
	pr_data_listener_close(listener->data);
	g_ptr_array_unref(listener->pending);
	g_ptr_array_unref(listener->sockets);
	pr_waker_clear(&listener->stop);
	pr_uri_free(listener->uri);
	g_mutex_clear(&listener->log_limit.lock);
	g_free(listener);
}
