/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Data connections of tcp: come in on the control port; here they meet accept(). */
#include "transport/tcp/tcp.h"

#include <string.h>
#include <sys/socket.h>

#include "transport/backends.h"
#include "transport/lane-rendezvous.h"

typedef struct TcpListener {
	PrDataListener base;
	PrPendingLanes *desk; /* of GSocketConnection*, owned */
} TcpListener;

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

/* PrDeskRefuse */
static void refuse(gpointer connection, const char *reason, gpointer opaque)
{
	answer(connection, 1);
	g_object_unref(connection);
}

PrDataListener *pr_tcp_listen(const PrUri *uri, GError **error)
{
	TcpListener *listener;

	if (!pr_backend_check_options(uri, (const char *const[]){NULL}, error))
		return NULL;
	listener = g_new0(TcpListener, 1);
	listener->base.ops = &pr_transport_tcp;
	listener->desk = pr_pending_lanes_new(refuse, NULL, error);
	if (listener->desk)
		return &listener->base;
	g_free(listener);
	return NULL;
}

void pr_tcp_offer(PrDataListener *listener, GSocketConnection *connection, const PrLaneHello *hello)
{
	pr_pending_lanes_offer(((TcpListener *)listener)->desk, connection, hello);
}

static gboolean claim_lanes(PrPendingLanes *desk, const PrPathSetup *setup,
			    GSocketConnection *lanes[PR_LANES_MAX], GError **error)
{
	gint64 deadline = pr_backend_deadline(setup->timeout_ms);

	for (guint n = 0, n_lanes = pr_backend_n_lanes(setup); n < n_lanes;) {
		PrLaneId lane;
		GSocketConnection *connection =
			pr_pending_lanes_claim(desk, setup, deadline, &lane, error);

		if (!connection)
			return FALSE;
		if (lane >= n_lanes || lanes[lane]) {
			refuse(connection, NULL, NULL);
			continue;
		}
		answer(connection, 0);
		lanes[lane] = connection;
		n++;
	}
	return TRUE;
}

gboolean pr_tcp_listener_claim(PrDataListener *listener, const PrPathSetup *setup,
			       GSocketConnection *ret[PR_LANES_MAX], GError **error)
{
	PrPendingLanes *desk = ((TcpListener *)listener)->desk;
	GSocketConnection *lanes[PR_LANES_MAX] = {NULL};
	gboolean ok;

	pr_pending_lanes_expect(desk, &setup->binding);
	ok = claim_lanes(desk, setup, lanes, error);
	pr_pending_lanes_forget(desk, &setup->binding);
	for (guint i = 0; i < pr_backend_n_lanes(setup); i++) {
		if (ok)
			ret[i] = lanes[i];
		else
			g_clear_object(&lanes[i]);
	}
	return ok;
}

void pr_tcp_expect(PrDataListener *listener, const PrBinding *binding)
{
	pr_pending_lanes_expect(((TcpListener *)listener)->desk, binding);
}

void pr_tcp_forget(PrDataListener *listener, const PrBinding *binding)
{
	pr_pending_lanes_forget(((TcpListener *)listener)->desk, binding);
}

void pr_tcp_listener_close(PrDataListener *listener)
{
	pr_pending_lanes_free(((TcpListener *)listener)->desk);
	g_free(listener);
}
