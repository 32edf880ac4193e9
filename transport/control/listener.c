/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The listener. Goal: nobody who knocks can keep the real peer out, or disturb a migration.
 *
 * Two threads. The door thread accepts and reads first frames, of all strangers at once, and never
 * blocks: each stranger has until its deadline, there are at most STRANGERS_MAX of them, and when one
 * more comes one goes: the one that has waited longest, of the host that has most of them here (peer-limits.h). So
 * a flood from one host pushes out its own. A real peer also sends its HELLO at once, so it has left
 * the door before a flood of silent ones from its own host can push it out. The hello thread gives complete HELLOs to
 * on_hello, which may take seconds, one by one; at most HELLOS_MAX wait for it, and who goes is found likewise.
 *
 * With TLS a stranger first has to send the beginning of a handshake, and then waits for its turn, because
 * handshakes cost us processor time that the guest may need: there are only so many a second, and of those who
 * wait the host that had fewest of late is next. The handshake has a thread of its own;
 * at most SHAKES_MAX go on, and when one more begins one is cancelled, because GIO works through them
 * in a pool of ten threads. Then the stranger is back at the door, for the rest of its time. One that
 * speaks without TLS, or shows a certificate that is not accepted, may say HELLO to be told so.
 *
 * What others can make us log is limited as well.
 */
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "transport/control/internal.h"
#include "transport/control/peer-limits.h"
#include "transport/net/dial.h"
#include "transport/control/listen-sockets.h"
#include "transport/registry.h"
#include "util/try-alloc.h"

#define STRANGERS_MAX	 32
#define HELLOS_MAX	 32
#define SHAKES_MAX	 8
#define ACCEPTED_AT_ONCE 64
#define OUT_OF_FILES_MS	 100 /* how long accepting rests when there are no descriptors left */

/* A connection whose first frame is not complete. Of the door thread. */
typedef struct Stranger {
	int fd;		    /* until it has begun to speak, so that a flood costs little; then -1 */
	PrControl *control; /* from then on */
	PrCrowdHost host;
	gint64 deadline;
	gboolean waits; /* for its turn at a TLS handshake */
	char *refusal;	/* what a HELLO is answered, whatever it says; or NULL */
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
	PrCrowdHost host;
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
	GPtrArray *sockets;   /* GSocket, listening */
	PrWaker stop;	      /* never drained: the door thread has to end */
	PrWaker shaken_waker; /* there is something in `shaken` */
	GThread *door_thread, *hello_thread;

	GPtrArray *strangers; /* the door thread's, in the order of their coming */
	gint64 rest_until;    /* the door thread's: accepting rests */
	PrTokenBucket turns;  /* the door thread's: at TLS handshakes */
	PrLogRatelimit quiet; /* has its own lock */

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
	if (stranger->fd >= 0)
		close(stranger->fd);
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

static gboolean may_say(PrListener *listener, guint *ret_left_out)
{
	return pr_log_ratelimit_allows(&listener->quiet, g_get_monotonic_time(), ret_left_out);
}

static void say(const char *what, const char *why, guint left_out)
{
	g_autofree char *more = NULL;

	if (left_out)
		more = g_strdup_printf(" (and %u more, of which nothing was said)", left_out);
	g_info("listener: %s: %s%s", what, why, more ? more : "");
}

static void note(PrListener *listener, const char *what, const char *why)
{
	guint left_out;

	if (may_say(listener, &left_out))
		say(what, why, left_out);
}

static void turn_away(PrListener *listener, PrControl *control, const char *why)
{
	g_autofree char *what = g_strdup_printf("turned %s away", pr_control_peer(control));

	note(listener, what, why);
	pr_control_free(control);
}

static char *peer_of(int fd)
{
	struct sockaddr_storage native = {0};
	socklen_t size = sizeof(native);
	g_autoptr(GSocketAddress) address = NULL;

	if (getpeername(fd, (struct sockaddr *)&native, &size) == 0)
		address = g_socket_address_new_from_native(&native, size);
	if (!address || !G_IS_INET_SOCKET_ADDRESS(address))
		return g_strdup("an unknown address");
	return pr_address_text(address);
}

/* One that is only a descriptor yet. Its owner frees it. */
static void turn_away_unheard(PrListener *listener, const Stranger *stranger, const char *why)
{
	g_autofree char *peer = NULL;
	g_autofree char *what = NULL;
	guint left_out;

	if (!may_say(listener, &left_out))
		return;
	peer = peer_of(stranger->fd);
	what = g_strdup_printf("turned %s away", peer);
	say(what, why, left_out);
}

/* A stranger that has begun to speak. FALSE: it can't be heard. */
static gboolean make_control(PrListener *listener, Stranger *stranger)
{
	g_autoptr(GError) error = NULL;
	g_autoptr(GSocket) socket = g_socket_new_from_fd(stranger->fd, &error);

	if (socket) {
		stranger->fd = -1;
		pr_configure_socket(socket);
		stranger->control =
			pr_control_new(g_socket_connection_factory_create_connection(socket),
				       listener->uri, listener->ops, &error);
	}
	if (!stranger->control)
		note(listener, "cannot let anybody in", error->message);
	return stranger->control != NULL;
}

/* Takes the control of a peer whose HELLO makes no sense, and tells it so. */
static void refuse(PrListener *listener, PrControl *control, const char *why)
{
	PrHelloAck ack = {.status = PR_HELLO_REFUSED};

	g_strlcpy(ack.reason, why, sizeof ack.reason);
	pr_control_answer(control, &ack, NULL);
	turn_away(listener, control, why);
}

/* Under the lock, of one too many. */
static Visitor *push_out_visitor(PrListener *listener)
{
	PrCrowdHost hosts[HELLOS_MAX + 1];
	guint n = 0;

	for (GList *link = listener->visitors.head; link; link = link->next)
		hosts[n++] = ((Visitor *)link->data)->host;
	return g_queue_pop_nth(&listener->visitors, pr_peer_pick_eviction(hosts, n));
}

static void hand_over_hello(PrListener *listener, PrControl *control, const PrMsg *msg)
{
	g_autoptr(GError) error = NULL;
	g_autoptr(Visitor) pushed_out = NULL;
	Visitor *visitor;
	PrHello hello;

	if (!pr_hello_decode(msg->body, msg->length, &hello, &error)) {
		refuse(listener, control, error->message);
		return;
	}
	visitor = g_new0(Visitor, 1);
	visitor->control = control;
	pr_crowd_host(control->fd, &visitor->host);
	visitor->hello = hello;
	g_mutex_lock(&listener->lock);
	g_queue_push_tail(&listener->visitors, visitor);
	if (listener->visitors.length > HELLOS_MAX)
		pushed_out = push_out_visitor(listener);
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
		turn_away(listener, control, error->message);
}

/* Takes the control of a stranger that has said who it is. */
static void hand_over(PrListener *listener, PrControl *control, const PrMsg *msg,
		      const char *refusal)
{
	if (refusal) {
		if (msg->type == PR_MSG_HELLO)
			refuse(listener, control, refusal);
		else
			turn_away(listener, control, refusal);
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
		turn_away(listener, control, "it begins with HELLO_ACK");
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
		turn_away(listener, g_steal_pointer(&stranger->control), error->message);
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
	pr_waker_wake(&listener->shaken_waker);
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
static void cancel_shake(PrListener *listener)
{
	PrCrowdHost hosts[SHAKES_MAX];
	guint n = 0;
	Shake *shake;

	for (GList *link = listener->shakes.head; link; link = link->next)
		hosts[n++] = ((Shake *)link->data)->stranger->host;
	shake = g_queue_pop_nth(&listener->shakes, pr_peer_pick_eviction(hosts, n));
	/* It frees itself, but not without the lock. */
	g_cancellable_cancel(shake->cancel);
}

/* Takes the stranger's control. */
static void begin_shake(PrListener *listener, Stranger *from)
{
	Shake *shake = g_new0(Shake, 1);
	g_autoptr(GError) error = NULL;

	shake->listener = listener;
	shake->stranger = g_new0(Stranger, 1);
	shake->stranger->fd = -1;
	shake->stranger->control = g_steal_pointer(&from->control);
	shake->stranger->host = from->host;
	shake->stranger->deadline = from->deadline;
	shake->cancel = g_cancellable_new();
	g_mutex_lock(&listener->lock);
	if (listener->shakes.length == SHAKES_MAX) {
		note(listener, "too many TLS handshakes", "one is cancelled");
		cancel_shake(listener);
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
		cancel_shake(listener);
	/* Ended by those handshakes, which were just cancelled. */
	while (listener->n_shakes)
		g_cond_wait(&listener->changed, &listener->lock);
	g_mutex_unlock(&listener->lock);
}

/* Begins as many of the handshakes that wait as may be begun now. */
static void begin_shakes(PrListener *listener)
{
	gint64 now = g_get_monotonic_time();

	while (pr_token_bucket_when(&listener->turns, now) <= now) {
		PrCrowdHost hosts[STRANGERS_MAX];
		guint who[STRANGERS_MAX], n = 0, next;

		for (guint i = 0; i < listener->strangers->len; i++) {
			const Stranger *stranger = listener->strangers->pdata[i];

			who[n] = i;
			hosts[n] = stranger->host;
			n += stranger->waits;
		}
		if (!n)
			return;
		next = who[pr_token_bucket_whose(&listener->turns, hosts, n)];
		pr_token_bucket_take(&listener->turns,
				     &((Stranger *)listener->strangers->pdata[next])->host, now);
		if (make_control(listener, listener->strangers->pdata[next]))
			begin_shake(listener, listener->strangers->pdata[next]);
		g_ptr_array_remove_index(listener->strangers, next);
	}
}

/* Why a stranger that begins like this is not heard; NULL: it is. */
static const char *judge_first(PrListener *listener, uint8_t first)
{
	if (first == TLS_HANDSHAKE)
		return listener->security.tls ? NULL
					      : "it begins with TLS, which this side does not use; "
						"start it with --tls-dir, too";
	/* HELLO or LANE */
	return first == 0 ? NULL : "it is no Postroad";
}

/* What a stranger begins with. TRUE: it is gone. */
static gboolean look(PrListener *listener, Stranger *stranger)
{
	gboolean tls = listener->security.tls != NULL;
	const char *why = NULL;
	uint8_t first;
	gssize n = recv(stranger->fd, &first, 1, MSG_PEEK | MSG_DONTWAIT);

	if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
		if (g_get_monotonic_time() < stranger->deadline)
			return FALSE;
		why = tls ? "it began no TLS handshake in time" : "it did not say HELLO in time";
	} else {
		why = n == 1 ? judge_first(listener, first) : "it left without a word";
	}
	if (why) {
		turn_away_unheard(listener, stranger, why);
		return TRUE;
	}
	stranger->waits = first == TLS_HANDSHAKE;
	if (stranger->waits)
		return FALSE;
	if (tls)
		stranger->refusal =
			g_strdup("this destination wants TLS: start the source with --tls-dir, "
				 "and certificates of the same CA");
	return !make_control(listener, stranger);
}

/* Reads what is there of the first frame. TRUE: the stranger is gone, one way or another. */
static gboolean hear(PrListener *listener, Stranger *stranger)
{
	g_autoptr(GError) error = NULL;
	g_autoptr(PrMsg) msg = NULL;
	gint64 now = g_get_monotonic_time();

	if (stranger->waits && now >= stranger->deadline) {
		turn_away_unheard(
			listener, stranger,
			"so many want a TLS handshake that its turn did not come in time");
		return TRUE;
	}
	if (!stranger->control && !stranger->waits && look(listener, stranger))
		return TRUE;
	if (!stranger->control)
		return FALSE;
	/* A deadline in the past: takes what there is. */
	pr_control_set_handshake(stranger->control, now, NULL);
	msg = pr_control_read_first(stranger->control, &error);
	if (msg)
		hand_over(listener, g_steal_pointer(&stranger->control), msg, stranger->refusal);
	else if (!g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_TIMEOUT))
		turn_away(listener, g_steal_pointer(&stranger->control), error->message);
	else if (now >= stranger->deadline)
		turn_away(listener, g_steal_pointer(&stranger->control),
			  "it did not say HELLO in time");
	return !stranger->control;
}

/* The door thread */

/* When there are too many. */
static void push_out_stranger(PrListener *listener)
{
	PrCrowdHost hosts[STRANGERS_MAX];
	guint n = 0;

	for (; n < listener->strangers->len; n++)
		hosts[n] = ((Stranger *)listener->strangers->pdata[n])->host;
	g_ptr_array_remove_index(listener->strangers, pr_peer_pick_eviction(hosts, n));
}

/* Takes the stranger. */
static void take_in(PrListener *listener, Stranger *taken)
{
	g_autoptr(Stranger) stranger = taken;

	/* What a real peer says is there already more often than not. */
	if (hear(listener, stranger))
		return;
	if (listener->strangers->len == STRANGERS_MAX) {
		note(listener, "too many strangers at the door", "one goes");
		push_out_stranger(listener);
	}
	g_ptr_array_add(listener->strangers, g_steal_pointer(&stranger));
}

/* Those whose handshakes are done. */
static void take_back(PrListener *listener)
{
	pr_waker_drain(&listener->shaken_waker);
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

/* Takes the descriptor. */
static void let_in(PrListener *listener, int fd)
{
	Stranger *stranger = g_new0(Stranger, 1);

	stranger->fd = fd;
	pr_crowd_host(fd, &stranger->host);
	stranger->deadline = g_get_monotonic_time() + (gint64)listener->handshake_ms * 1000;
	take_in(listener, stranger);
}

/* Accepts what waits, a bounded number so that those who were let in are heard in between. */
static void accept_some(PrListener *listener, int listening)
{
	for (guint i = 0; i < ACCEPTED_AT_ONCE; i++) {
		int fd = accept4(listening, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

		if (fd >= 0) {
			let_in(listener, fd);
			continue;
		}
		if (errno == EAGAIN)
			return;
		/* Others are about one connection, which is gone. */
		if (errno != EMFILE && errno != ENFILE && errno != ENOBUFS && errno != ENOMEM)
			continue;
		note(listener, "accept", g_strerror(errno));
		listener->rest_until = g_get_monotonic_time() + OUT_OF_FILES_MS * 1000;
		if (listener->strangers->len)
			push_out_stranger(listener);
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
		if (stranger->waits)
			until = MIN(until, pr_token_bucket_when(&listener->turns, now));
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

	fds[n++] = (struct pollfd){.fd = pr_waker_fd(&listener->stop), .events = POLLIN};
	fds[n++] = (struct pollfd){.fd = pr_waker_fd(&listener->shaken_waker), .events = POLLIN};
	for (guint i = 0; i < listener->sockets->len; i++)
		fds[n++] = (struct pollfd){
			.fd = resting ? -1 : g_socket_get_fd(listener->sockets->pdata[i]),
			.events = POLLIN,
		};
	for (guint i = 0; i < listener->strangers->len; i++) {
		Stranger *stranger = listener->strangers->pdata[i];

		/* Who waits for a turn has said all that is to be heard now. */
		fds[n++] = (struct pollfd){.fd = stranger->waits     ? -1
						 : stranger->control ? stranger->control->fd
								     : stranger->fd,
					   .events = POLLIN};
	}
	poll(fds, n, door_timeout(listener, now));
	return !(fds[0].revents & POLLIN);
}

static gpointer door_main(gpointer opaque)
{
	PrListener *listener = opaque;
	struct pollfd fds[2 + PR_LISTENING_MAX + STRANGERS_MAX] = {0};

	while (door_sleep(listener, fds)) {
		hear_all(listener);
		take_back(listener);
		for (guint i = 0; i < listener->sockets->len; i++)
			if (fds[2 + i].revents)
				accept_some(listener, g_socket_get_fd(listener->sockets->pdata[i]));
		begin_shakes(listener);
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

/* What listens beside the control port does it at an address: no name is looked up twice. */
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
	if (!listener->ops)
		return FALSE;
	if (!pr_listening_open(listener->uri, &listener->security, listener->sockets, cancel,
			       error))
		return FALSE;
	note_port(listener);
	if (!pr_waker_init(&listener->stop, error) ||
	    !pr_waker_init(&listener->shaken_waker, error))
		return FALSE;
	uri = data_uri(listener);
	listener->data = listener->ops->listen(uri, error);
	return listener->data != NULL;
}

PrListener *pr_listener_new(const PrUri *uri, const PrSecurity *security, guint handshake_ms,
			    PrOnHello on_hello, void *opaque, GCancellable *cancel, GError **error)
{
	g_autoptr(PrListener) listener = g_new0(PrListener, 1);
	g_autofree char *address = pr_uri_address(uri);

	listener->uri = pr_uri_copy(uri);
	if (security)
		listener->security = *security;
	listener->handshake_ms = handshake_ms;
	listener->on_hello = on_hello;
	listener->opaque = opaque;
	listener->stop = listener->shaken_waker = PR_WAKER_INIT;
	listener->sockets = g_ptr_array_new_with_free_func(g_object_unref);
	listener->strangers = g_ptr_array_new_with_free_func((GDestroyNotify)stranger_free);
	g_mutex_init(&listener->quiet.lock);
	g_mutex_init(&listener->lock);
	g_cond_init(&listener->changed);
	g_queue_init(&listener->visitors);
	g_queue_init(&listener->shakes);
	g_queue_init(&listener->shaken);
	if (!open_listener(listener, cancel, error)) {
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
	pr_waker_wake(&listener->stop);
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
	pr_waker_clear(&listener->stop);
	pr_waker_clear(&listener->shaken_waker);
	pr_uri_free(listener->uri);
	g_mutex_clear(&listener->quiet.lock);
	g_mutex_clear(&listener->lock);
	g_cond_clear(&listener->changed);
	g_free(listener);
}
