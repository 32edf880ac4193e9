/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Data connections of tcp: come in on the control port, often before the engine has begun to wait for
 * them. An offer that nobody waits for is therefore held, for OFFER_HOLD_MS and up to OFFERS_MAX of
 * them; one that is not for the accept() in progress is refused at once.
 */
#include "transport/tcp.h"

#include <string.h>
#include <sys/socket.h>

#include "transport/backends.h"

#define OFFER_HOLD_MS 5000
#define OFFERS_MAX    8

typedef struct Offer {
	GSocketConnection *connection; /* owned */
	PrLaneHello hello;
	gint64 expires; /* monotonic, microseconds */
} Offer;

typedef struct TcpListener {
	PrDataListener base;
	GMutex lock;
	GCond changed;		    /* any of those below */
	GQueue offers;		    /* of Offer, oldest first; lock */
	const PrPathSetup *waiting; /* of the accept() in progress; lock */
	gboolean closing;	    /* lock */
	GThread *janitor;	    /* lets offers expire; listen() and close() */
} TcpListener;

static void offer_free(Offer *offer)
{
	g_object_unref(offer->connection);
	g_free(offer);
}

/* Twelve bytes into an empty socket buffer: never blocks. */
static void answer(GSocketConnection *connection, uint32_t status)
{
	g_autoptr(GByteArray) body = g_byte_array_new();
	uint8_t frame[PR_WIRE_HEADER_BYTES + sizeof(uint32_t)];

	pr_u32_encode(body, status);
	pr_header_encode(frame, PR_MSG_LANE_ACK, body->len);
	memcpy(frame + PR_WIRE_HEADER_BYTES, body->data, sizeof(uint32_t));
	/* A peer that has gone meanwhile is noticed by the first READ. */
	(void)send(g_socket_get_fd(g_socket_connection_get_socket(connection)), frame,
		   sizeof(frame), MSG_DONTWAIT | MSG_NOSIGNAL);
}

static void refuse(Offer *offer)
{
	answer(offer->connection, 1);
	offer_free(offer);
}

/* Refuses what has been held for too long; returns when to look again, 0 for never. Under the lock. */
static gint64 expire_offers(TcpListener *listener)
{
	Offer *oldest;

	while ((oldest = g_queue_peek_head(&listener->offers))) {
		if (oldest->expires > g_get_monotonic_time())
			return oldest->expires;
		refuse(g_queue_pop_head(&listener->offers));
	}
	return 0;
}

static gpointer janitor_thread(gpointer opaque)
{
	TcpListener *listener = opaque;

	g_mutex_lock(&listener->lock);
	while (!listener->closing) {
		gint64 next = expire_offers(listener);

		if (next)
			g_cond_wait_until(&listener->changed, &listener->lock, next);
		else
			g_cond_wait(&listener->changed, &listener->lock);
	}
	g_mutex_unlock(&listener->lock);
	return NULL;
}

PrDataListener *pr_tcp_listen(const PrUri *uri, GError **error)
{
	TcpListener *listener;

	if (!pr_backend_check_options(uri, (const char *const[]){NULL}, error))
		return NULL;
	listener = g_new0(TcpListener, 1);
	listener->base.ops = &pr_transport_tcp;
	g_mutex_init(&listener->lock);
	g_cond_init(&listener->changed);
	g_queue_init(&listener->offers);
	listener->janitor = g_thread_new("pr-tcp-offers", janitor_thread, listener);
	return &listener->base;
}

void pr_tcp_offer(PrDataListener *base, GSocketConnection *connection, const PrLaneHello *hello)
{
	TcpListener *listener = (TcpListener *)base;
	Offer *offer = g_new0(Offer, 1);

	offer->connection = connection;
	offer->hello = *hello;
	offer->expires = pr_backend_deadline(OFFER_HOLD_MS);
	g_mutex_lock(&listener->lock);
	if (g_queue_get_length(&listener->offers) < OFFERS_MAX)
		g_queue_push_tail(&listener->offers, g_steal_pointer(&offer));
	g_cond_broadcast(&listener->changed);
	g_mutex_unlock(&listener->lock);
	if (offer)
		refuse(offer);
}

/* Gives every held offer to the accept() in progress, or refuses it. Under the lock. */
static guint sort_offers(TcpListener *listener, GSocketConnection *lanes[PR_N_LANES])
{
	Offer *offer;
	guint n = 0;

	while ((offer = g_queue_pop_head(&listener->offers))) {
		uint8_t lane = offer->hello.lane;

		if (!pr_backend_binding_matches(&listener->waiting->binding, &offer->hello) ||
		    lanes[lane]) {
			refuse(offer);
			continue;
		}
		answer(offer->connection, 0);
		lanes[lane] = g_object_ref(offer->connection);
		offer_free(offer);
	}
	for (guint i = 0; i < PR_N_LANES; i++)
		n += lanes[i] != NULL;
	return n;
}

static void on_cancelled(GCancellable *cancel, gpointer opaque)
{
	TcpListener *listener = opaque;

	g_mutex_lock(&listener->lock);
	g_cond_broadcast(&listener->changed);
	g_mutex_unlock(&listener->lock);
}

/* Under the lock. */
static gboolean wait_for_lanes(TcpListener *listener, gint64 deadline,
			       GSocketConnection *lanes[PR_N_LANES], GError **error)
{
	const PrPathSetup *setup = listener->waiting;
	gboolean in_time = TRUE;
	guint n;

	while ((n = sort_offers(listener, lanes)) < PR_N_LANES) {
		if (g_cancellable_is_cancelled(setup->cancel)) {
			g_cancellable_set_error_if_cancelled(setup->cancel, error);
			g_prefix_error(error, "path %s: waiting for the source's data lanes: ",
				       setup->uri->text);
			return FALSE;
		}
		if (!in_time) {
			g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_TIMEOUT,
				    "path %s: only %u of %d data lanes were connected within %u ms",
				    setup->uri->text, n, PR_N_LANES, setup->timeout_ms);
			return FALSE;
		}
		in_time = g_cond_wait_until(&listener->changed, &listener->lock, deadline);
	}
	return TRUE;
}

gboolean pr_tcp_listener_claim(PrDataListener *base, const PrPathSetup *setup,
			       GSocketConnection *ret[PR_N_LANES], GError **error)
{
	gint64 deadline = pr_backend_deadline(setup->timeout_ms);
	TcpListener *listener = (TcpListener *)base;
	GSocketConnection *lanes[PR_N_LANES] = {NULL};
	gulong on_cancel = 0;
	gboolean ok;

	if (setup->cancel)
		on_cancel = g_cancellable_connect(setup->cancel, G_CALLBACK(on_cancelled), listener,
						  NULL);
	g_mutex_lock(&listener->lock);
	listener->waiting = setup;
	ok = wait_for_lanes(listener, deadline, lanes, error);
	listener->waiting = NULL;
	g_mutex_unlock(&listener->lock);
	g_cancellable_disconnect(setup->cancel, on_cancel);
	for (guint i = 0; i < PR_N_LANES; i++) {
		if (ok)
			ret[i] = lanes[i];
		else
			g_clear_object(&lanes[i]);
	}
	return ok;
}

void pr_tcp_listener_close(PrDataListener *base)
{
	TcpListener *listener = (TcpListener *)base;
	Offer *offer;

	g_mutex_lock(&listener->lock);
	listener->closing = TRUE;
	g_cond_broadcast(&listener->changed);
	g_mutex_unlock(&listener->lock);
	g_thread_join(listener->janitor);
	while ((offer = g_queue_pop_head(&listener->offers)))
		refuse(offer);
	g_cond_clear(&listener->changed);
	g_mutex_clear(&listener->lock);
	g_free(listener);
}
