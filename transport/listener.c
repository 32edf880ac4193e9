/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The listener. Goal: nobody who knocks can keep the real peer out, or disturb a migration.
 *
 * Two threads. The door thread accepts and reads first frames, of all strangers at once, and never
 * blocks: each stranger has until its deadline, there are at most STRANGERS_MAX of them, and when one
 * more comes the one that has waited longest goes. A real peer sends its HELLO at once, so it has left
 * the door before a flood of silent ones can push it out. The hello thread gives complete HELLOs to
 * on_hello, which may take seconds, one by one; at most HELLOS_MAX wait for it, the oldest goes first.
 *
 * With TLS a stranger first has to send the beginning of a handshake. The handshake has a thread of its own;
 * at most SHAKES_MAX go on, and when one more begins the oldest is cancelled, because GIO works through them
 * in a pool of ten threads. Then the stranger is back at the door, for the rest of its time. One that
 * speaks without TLS, or shows a certificate that is not accepted, may say HELLO to be told so.
 */
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "transport/control-internal.h"
#include "transport/dial.h"
#include "transport/spare.h"

#define STRANGERS_MAX	32
#define HELLOS_MAX	32
#define SHAKES_MAX	8
#define SOCKETS_MAX	16 /* addresses of one name */
#define BACKLOG		128
#define RESOLVE_MS	5000
#define OUT_OF_FILES_MS 100 /* how long accepting rests when there are no descriptors left */

/* A connection whose first frame is not complete. Of the door thread. */
typedef struct Stranger {
	PrControl *control;
	gint64 deadline;
	gboolean greeted; /* whether it uses TLS is settled */
	char *refusal;	  /* what a HELLO is answered, whatever it says; or NULL */
} Stranger;

/* A TLS handshake, of its own thread. */
typedef struct Shake {
	PrListener *listener;
	Stranger *stranger;
	GCancellable *cancel;
} Shake;

/* A connection that has said HELLO. */
typedef struct Visitor {
	PrControl *control;
	PrHello hello;
} Visitor;

struct PrListener {
	/* Constant. */
	PrUri *uri;
	const PrTransportOps *ops;
	PrDataListener *data;
	PrSecurity security;
	guint handshake_ms;
	PrOnHello on_hello;
	void *opaque;
	GPtrArray *sockets; /* GSocket, listening */
	int stop_fd;	    /* eventfd: readable when the door thread has to end */
	int shaken_fd;	    /* eventfd: readable when there is something in `shaken` */
	GThread *door_thread, *hello_thread;

	GPtrArray *strangers; /* the door thread's, in the order of their coming */
	gint64 rest_until;    /* the door thread's: accepting rests */

	GMutex lock; /* of the rest */
	GCond changed;
	GQueue visitors;
	GQueue shakes;	/* Shake, in progress and not cancelled, oldest first */
	guint n_shakes; /* threads */
	GQueue shaken;	/* Stranger, on its way back to the door */
	gboolean stopping;
};

static void stranger_free(Stranger *stranger)
{
	if (!stranger)
		return;
	pr_control_free(stranger->control);
	g_free(stranger->refusal);
	g_free(stranger);
}
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Stranger, stranger_free)

static void visitor_free(Visitor *visitor)
{
	pr_control_free(visitor->control);
	pr_hello_clear(&visitor->hello);
	g_free(visitor);
}
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Visitor, visitor_free)

/* First frames */

static void turn_away(PrControl *control, const char *why)
{
	g_info("listener: turned %s away: %s", pr_control_peer(control), why);
	pr_control_free(control);
}

/* Takes the control of a peer whose HELLO makes no sense, and tells it so. */
static void refuse(PrControl *control, const char *why)
{
	PrHelloAck ack = {.status = PR_HELLO_REFUSED};

	g_strlcpy(ack.reason, why, sizeof ack.reason);
	pr_control_answer(control, &ack, NULL);
	turn_away(control, why);
}

static void hand_over_hello(PrListener *listener, PrControl *control, const PrMsg *msg)
{
	g_autoptr(GError) error = NULL;
	g_autoptr(Visitor) pushed_out = NULL;
	Visitor *visitor;
	PrHello hello;

	if (!pr_hello_decode(msg->body, msg->length, &hello, &error)) {
		refuse(control, error->message);
		return;
	}
	visitor = g_new0(Visitor, 1);
	visitor->control = control;
	visitor->hello = hello;
	g_mutex_lock(&listener->lock);
	g_queue_push_tail(&listener->visitors, visitor);
	if (listener->visitors.length > HELLOS_MAX)
		pushed_out = g_queue_pop_head(&listener->visitors);
	g_cond_signal(&listener->changed);
	g_mutex_unlock(&listener->lock);
}

static void hand_over_lane(PrListener *listener, PrControl *control, const PrMsg *msg)
{
	g_autoptr(GError) error = NULL;
	PrLaneHello lane;

	if (pr_lane_hello_decode(msg->body, msg->length, &lane, &error))
		listener->ops->offer(listener->data, pr_control_release(control), &lane);
	else
		turn_away(control, error->message);
}

/* Takes the control of a stranger that has said who it is. */
static void hand_over(PrListener *listener, PrControl *control, const PrMsg *msg,
		      const char *refusal)
{
	if (refusal) {
		if (msg->type == PR_MSG_HELLO)
			refuse(control, refusal);
		else
			turn_away(control, refusal);
		return;
	}
	switch (msg->type) {
	case PR_MSG_HELLO:
		hand_over_hello(listener, control, msg);
		break;
	case PR_MSG_LANE:
		hand_over_lane(listener, control, msg);
		break;
	default:
		turn_away(control, "it begins with HELLO_ACK");
	}
}

/* TLS */

#define TLS_HANDSHAKE 0x16 /* the first byte of a TLS connection; of no frame of ours */

static gboolean shake_hands(PrListener *listener, Shake *shake)
{
	g_autoptr(GError) error = NULL;
	Stranger *stranger = shake->stranger;
	GSocketConnection *connection =
		pr_tls_accept(listener->security.tls, pr_control_take_connection(stranger->control),
			      stranger->deadline, shake->cancel, &stranger->refusal, &error);

	if (connection)
		pr_control_put_connection(stranger->control, connection);
	else
		turn_away(g_steal_pointer(&stranger->control), error->message);
	return connection != NULL;
}

static gpointer shake_main(gpointer opaque)
{
	Shake *shake = opaque;
	PrListener *listener = shake->listener;
	gboolean shaken = shake_hands(listener, shake);

	g_mutex_lock(&listener->lock);
	g_queue_remove(&listener->shakes, shake);
	if (shaken)
		g_queue_push_tail(&listener->shaken, g_steal_pointer(&shake->stranger));
	eventfd_write(listener->shaken_fd, 1);
	g_mutex_unlock(&listener->lock);
	g_object_unref(shake->cancel);
	stranger_free(shake->stranger);
	g_free(shake);
	g_mutex_lock(&listener->lock);
	listener->n_shakes--;
	g_cond_broadcast(&listener->changed);
	g_mutex_unlock(&listener->lock);
	return NULL;
}

/* Under the lock. */
static void cancel_oldest_shake(PrListener *listener)
{
	Shake *oldest = g_queue_pop_head(&listener->shakes);

	/* It frees itself, but not without the lock. */
	g_cancellable_cancel(oldest->cancel);
}

/* Takes the stranger's control. */
static void begin_shake(PrListener *listener, Stranger *from)
{
	Shake *shake = g_new0(Shake, 1);
	g_autoptr(GError) error = NULL;

	shake->listener = listener;
	shake->stranger = g_new0(Stranger, 1);
	shake->stranger->control = g_steal_pointer(&from->control);
	shake->stranger->deadline = from->deadline;
	shake->stranger->greeted = TRUE;
	shake->cancel = g_cancellable_new();
	g_mutex_lock(&listener->lock);
	if (listener->shakes.length == SHAKES_MAX) {
		g_info("listener: too many TLS handshakes, the oldest goes");
		cancel_oldest_shake(listener);
	}
	g_queue_push_tail(&listener->shakes, shake);
	listener->n_shakes++;
	g_mutex_unlock(&listener->lock);
	GThread *thread = pr_thread_try("tls-shake", shake_main, shake, &error);
	if (thread) {
		g_thread_unref(thread);
		return;
	}
	/* Nobody will shake its hand: as if that had been cancelled. */
	g_info("listener: %s", error->message);
	g_cancellable_cancel(shake->cancel);
	shake_main(shake);
}

/* Cancels all handshakes and waits for their threads. */
static void end_shakes(PrListener *listener)
{
	g_mutex_lock(&listener->lock);
	while (listener->shakes.length)
		cancel_oldest_shake(listener);
	/* Ended by those handshakes, which were just cancelled. */
	while (listener->n_shakes)
		g_cond_wait(&listener->changed, &listener->lock);
	g_mutex_unlock(&listener->lock);
}

/* Finds out whether a stranger begins with TLS. TRUE: it is gone, to its handshake or for good. */
static gboolean greet(PrListener *listener, Stranger *stranger)
{
	uint8_t first;
	gssize n = recv(stranger->control->fd, &first, 1, MSG_PEEK | MSG_DONTWAIT);

	if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
		if (g_get_monotonic_time() < stranger->deadline)
			return FALSE;
		turn_away(g_steal_pointer(&stranger->control), "it began no TLS handshake in time");
		return TRUE;
	}
	if (n == 1 && first == TLS_HANDSHAKE) {
		begin_shake(listener, stranger);
		return TRUE;
	}
	stranger->greeted = TRUE;
	stranger->refusal = g_strdup("this destination wants TLS: start the source with --tls-dir, "
				     "and certificates of the same CA");
	return FALSE;
}

/* What is said of a first frame that can't be read. */
static void turn_away_malformed(PrControl *control, const GError *error)
{
	gboolean tls = error->domain == PR_WIRE_ERROR && control->header[0] == TLS_HANDSHAKE;

	turn_away(control, tls ? "it begins with TLS, which this side does not use; start it "
				 "with --tls-dir, too"
			       : error->message);
}

/* Reads what is there of the first frame. TRUE: the stranger is gone, one way or another. */
static gboolean hear(PrListener *listener, Stranger *stranger)
{
	g_autoptr(GError) error = NULL;
	g_autoptr(PrMsg) msg = NULL;
	gint64 now = g_get_monotonic_time();

	if (!stranger->greeted && greet(listener, stranger))
		return TRUE;
	if (!stranger->greeted)
		return FALSE;
	/* A deadline in the past: takes what there is. */
	pr_control_set_handshake(stranger->control, now, NULL);
	msg = pr_control_read_first(stranger->control, &error);
	if (msg)
		hand_over(listener, g_steal_pointer(&stranger->control), msg, stranger->refusal);
	else if (!g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_TIMEOUT))
		turn_away_malformed(g_steal_pointer(&stranger->control), error);
	else if (now >= stranger->deadline)
		turn_away(g_steal_pointer(&stranger->control), "it did not say HELLO in time");
	return !stranger->control;
}

/* The door thread */

/* Takes the stranger. */
static void take_in(PrListener *listener, Stranger *taken)
{
	g_autoptr(Stranger) stranger = taken;

	/* What a real peer says is there already more often than not. */
	if (hear(listener, stranger))
		return;
	if (listener->strangers->len == STRANGERS_MAX) {
		g_info("listener: too many strangers at the door, the oldest goes");
		g_ptr_array_remove_index(listener->strangers, 0);
	}
	g_ptr_array_add(listener->strangers, g_steal_pointer(&stranger));
}

/* Those whose handshakes are done. */
static void take_back(PrListener *listener)
{
	eventfd_t count;

	eventfd_read(listener->shaken_fd, &count);
	for (;;) {
		Stranger *stranger;

		g_mutex_lock(&listener->lock);
		stranger = g_queue_pop_head(&listener->shaken);
		g_mutex_unlock(&listener->lock);
		if (!stranger)
			return;
		take_in(listener, stranger);
	}
}

static void let_in(PrListener *listener, GSocket *socket)
{
	g_autoptr(GError) error = NULL;
	GSocketConnection *connection = g_socket_connection_factory_create_connection(socket);
	PrControl *control = pr_control_new(connection, listener->uri, listener->ops, &error);
	Stranger *stranger;

	if (!control) {
		g_info("listener: %s", error->message);
		return;
	}
	pr_configure_socket(socket);
	stranger = g_new0(Stranger, 1);
	stranger->control = control;
	stranger->deadline = g_get_monotonic_time() + (gint64)listener->handshake_ms * 1000;
	stranger->greeted = !listener->security.tls;
	take_in(listener, stranger);
}

/* Accepts what waits, a bounded number so that those who were let in are heard in between. */
static void accept_some(PrListener *listener, GSocket *listening)
{
	for (guint i = 0; i < STRANGERS_MAX / 2; i++) {
		g_autoptr(GError) error = NULL;
		g_autoptr(GSocket) socket = g_socket_accept(listening, NULL, &error);

		if (socket) {
			let_in(listener, socket);
			continue;
		}
		if (g_error_matches(error, G_IO_ERROR, G_IO_ERROR_WOULD_BLOCK))
			return;
		g_info("listener: accept: %s", error->message);
		listener->rest_until = g_get_monotonic_time() + OUT_OF_FILES_MS * 1000;
		if (g_error_matches(error, G_IO_ERROR, G_IO_ERROR_TOO_MANY_OPEN_FILES) &&
		    listener->strangers->len)
			g_ptr_array_remove_index(listener->strangers, 0);
		return;
	}
}

static void hear_all(PrListener *listener)
{
	for (guint i = 0; i < listener->strangers->len;)
		if (hear(listener, listener->strangers->pdata[i]))
			g_ptr_array_remove_index(listener->strangers, i);
		else
			i++;
}

/* Until when the door thread may sleep; -1: for ever. */
static int door_timeout(PrListener *listener, gint64 now)
{
	gint64 until = listener->rest_until > now ? listener->rest_until : G_MAXINT64;

	for (guint i = 0; i < listener->strangers->len; i++) {
		Stranger *stranger = listener->strangers->pdata[i];

		until = MIN(until, stranger->deadline);
	}
	if (until == G_MAXINT64)
		return -1;
	return until <= now ? 0 : MIN((until - now + 999) / 1000, G_MAXINT);
}

/* Sleeps until somebody knocks or speaks. FALSE: the listener is being freed. */
static gboolean door_sleep(PrListener *listener, struct pollfd *fds)
{
	gint64 now = g_get_monotonic_time();
	gboolean resting = listener->rest_until > now;
	guint n = 0;

	fds[n++] = (struct pollfd){.fd = listener->stop_fd, .events = POLLIN};
	fds[n++] = (struct pollfd){.fd = listener->shaken_fd, .events = POLLIN};
	for (guint i = 0; i < listener->sockets->len; i++)
		fds[n++] = (struct pollfd){
			.fd = resting ? -1 : g_socket_get_fd(listener->sockets->pdata[i]),
			.events = POLLIN,
		};
	for (guint i = 0; i < listener->strangers->len; i++) {
		Stranger *stranger = listener->strangers->pdata[i];

		fds[n++] = (struct pollfd){.fd = stranger->control->fd, .events = POLLIN};
	}
	poll(fds, n, door_timeout(listener, now));
	return !(fds[0].revents & POLLIN);
}

static gpointer door_main(gpointer opaque)
{
	PrListener *listener = opaque;
	struct pollfd fds[2 + SOCKETS_MAX + STRANGERS_MAX] = {0};

	while (door_sleep(listener, fds)) {
		hear_all(listener);
		take_back(listener);
		for (guint i = 0; i < listener->sockets->len; i++)
			if (fds[2 + i].revents)
				accept_some(listener, listener->sockets->pdata[i]);
	}
	return NULL;
}

/* The hello thread */

static Visitor *next_visitor(PrListener *listener)
{
	g_autoptr(GMutexLocker) locker G_GNUC_UNUSED = g_mutex_locker_new(&listener->lock);

	/* Ended by a visitor, or by stop_threads(). */
	while (!listener->stopping && g_queue_is_empty(&listener->visitors))
		g_cond_wait(&listener->changed, &listener->lock);
	return listener->stopping ? NULL : g_queue_pop_head(&listener->visitors);
}

static gpointer hello_main(gpointer opaque)
{
	PrListener *listener = opaque;

	for (;;) {
		g_autoptr(Visitor) visitor = next_visitor(listener);
		gint64 now = g_get_monotonic_time();

		if (!visitor)
			return NULL;
		pr_control_set_handshake(visitor->control,
					 now + (gint64)listener->handshake_ms * 1000, NULL);
		listener->on_hello(g_steal_pointer(&visitor->control), &visitor->hello, listener,
				   listener->opaque);
	}
}

/* Creation */

static GSocket *listen_at(GSocketAddress *address, GError **error)
{
	g_autoptr(GSocket) socket =
		g_socket_new(g_socket_address_get_family(address), G_SOCKET_TYPE_STREAM,
			     G_SOCKET_PROTOCOL_TCP, error);

	if (!socket)
		return NULL;
	g_socket_set_blocking(socket, FALSE);
	g_socket_set_listen_backlog(socket, BACKLOG);
	if (!g_socket_bind(socket, address, TRUE, error) || !g_socket_listen(socket, error))
		return NULL;
	return g_steal_pointer(&socket);
}

static uint16_t port_of(GSocket *socket)
{
	g_autoptr(GSocketAddress) address = g_socket_get_local_address(socket, NULL);

	return g_inet_socket_address_get_port(G_INET_SOCKET_ADDRESS(address));
}

/* An address as it is, but with the port that the first socket was given. */
static GSocketAddress *with_port(GSocketAddress *address, uint16_t port)
{
	GInetSocketAddress *inet = G_INET_SOCKET_ADDRESS(address);
	gboolean has_scope = g_socket_address_get_family(address) == G_SOCKET_FAMILY_IPV6;

	return g_object_new(G_TYPE_INET_SOCKET_ADDRESS, "address",
			    g_inet_socket_address_get_address(inet), "port", (guint)port,
			    "scope-id", has_scope ? g_inet_socket_address_get_scope_id(inet) : 0,
			    NULL);
}

/* Plain connections from other hosts only where somebody has said so. */
static gboolean check_security(PrListener *listener, GPtrArray *addresses, GError **error)
{
	const PrSecurity *security = &listener->security;

	if (security->tls)
		return pr_tls_check_server(security->tls, error);
	for (guint i = 0; i < addresses->len && !security->plain_net; i++) {
		GInetSocketAddress *address = addresses->pdata[i];

		if (g_inet_address_get_is_loopback(g_inet_socket_address_get_address(address)))
			continue;
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT,
			    "other hosts could reach it, and nothing would be encrypted or "
			    "authenticated; give --tls-dir DIR with certificates, or --insecure if "
			    "you trust everybody on that network");
		return FALSE;
	}
	return TRUE;
}

/* Listens on every address of the host. One that this machine doesn't have (::1 without IPv6) is left
 * out as long as there is another. */
static gboolean open_sockets(PrListener *listener, GPtrArray *addresses, GError **error)
{
	g_autoptr(GError) last = NULL;
	uint16_t port = listener->uri->port;

	for (guint i = 0; i < MIN(addresses->len, SOCKETS_MAX); i++) {
		g_autoptr(GSocketAddress) address = with_port(addresses->pdata[i], port);
		GSocket *socket;

		g_clear_error(&last);
		socket = listen_at(address, &last);
		if (socket) {
			port = port_of(socket);
			g_ptr_array_add(listener->sockets, socket);
		} else if (g_error_matches(last, G_IO_ERROR, G_IO_ERROR_ADDRESS_IN_USE)) {
			break;
		}
	}
	if (listener->sockets->len && !g_error_matches(last, G_IO_ERROR, G_IO_ERROR_ADDRESS_IN_USE))
		return TRUE;
	g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT, "%s; %s", last->message,
		    g_error_matches(last, G_IO_ERROR, G_IO_ERROR_ADDRESS_IN_USE)
			    ? "use another port or stop what listens there"
			    : "use an address of this host");
	return FALSE;
}

/* The URI with the port that was really bound, in its text, too. */
static void note_port(PrListener *listener)
{
	PrUri *uri = listener->uri;
	const char *options = strchr(uri->text, '?');
	g_autofree char *address = NULL;
	char *text;

	uri->port = port_of(listener->sockets->pdata[0]);
	address = pr_uri_address(uri);
	text = g_strconcat(address, options, NULL);
	g_free(uri->text);
	uri->text = text;
}

static gboolean open_listener(PrListener *listener, GError **error)
{
	gint64 deadline = g_get_monotonic_time() + RESOLVE_MS * 1000;
	g_autoptr(GPtrArray) addresses = NULL;

	listener->ops = pr_transport_find(listener->uri->scheme, error);
	if (!listener->ops)
		return FALSE;
	addresses = pr_resolve(listener->uri->host, listener->uri->port, deadline, NULL, error);
	if (!addresses || !check_security(listener, addresses, error) ||
	    !open_sockets(listener, addresses, error))
		return FALSE;
	note_port(listener);
	listener->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	listener->shaken_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (listener->stop_fd < 0 || listener->shaken_fd < 0) {
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT,
			    "no eventfd: %s; raise the limit of open files", g_strerror(errno));
		return FALSE;
	}
	listener->data = listener->ops->listen(listener->uri, error);
	return listener->data != NULL;
}

PrListener *pr_listener_new(const PrUri *uri, const PrSecurity *security, guint handshake_ms,
			    PrOnHello on_hello, void *opaque, GError **error)
{
	g_autoptr(PrListener) listener = g_new0(PrListener, 1);
	g_autofree char *address = pr_uri_address(uri);

	listener->uri = pr_uri_copy(uri);
	if (security)
		listener->security = *security;
	listener->handshake_ms = handshake_ms;
	listener->on_hello = on_hello;
	listener->opaque = opaque;
	listener->stop_fd = listener->shaken_fd = -1;
	listener->sockets = g_ptr_array_new_with_free_func(g_object_unref);
	listener->strangers = g_ptr_array_new_with_free_func((GDestroyNotify)stranger_free);
	g_mutex_init(&listener->lock);
	g_cond_init(&listener->changed);
	g_queue_init(&listener->visitors);
	g_queue_init(&listener->shakes);
	g_queue_init(&listener->shaken);
	if (!open_listener(listener, error)) {
		g_prefix_error(error, "cannot listen on %s: ", address);
		return NULL;
	}
	listener->door_thread = pr_thread_try("listener", door_main, listener, error);
	if (listener->door_thread)
		listener->hello_thread = pr_thread_try("hello", hello_main, listener, error);
	if (!listener->hello_thread) {
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

static void stop_threads(PrListener *listener)
{
	eventfd_write(listener->stop_fd, 1);
	g_thread_join(listener->door_thread);
	end_shakes(listener);
	g_mutex_lock(&listener->lock);
	listener->stopping = TRUE;
	g_cond_signal(&listener->changed);
	g_mutex_unlock(&listener->lock);
	if (listener->hello_thread)
		g_thread_join(listener->hello_thread);
}

void pr_listener_free(PrListener *listener)
{
	if (!listener)
		return;
	if (listener->door_thread)
		stop_threads(listener);
	pr_data_listener_close(listener->data);
	g_ptr_array_unref(listener->strangers);
	g_ptr_array_unref(listener->sockets);
	g_queue_clear_full(&listener->visitors, (GDestroyNotify)visitor_free);
	g_queue_clear_full(&listener->shaken, (GDestroyNotify)stranger_free);
	if (listener->stop_fd >= 0)
		close(listener->stop_fd);
	if (listener->shaken_fd >= 0)
		close(listener->shaken_fd);
	pr_uri_free(listener->uri);
	g_mutex_clear(&listener->lock);
	g_cond_clear(&listener->changed);
	g_free(listener);
}
