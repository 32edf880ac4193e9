/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The destination's listener of tcp:. Data lanes come in on the control port and wait here for
 * accept(). */
#include "transport/tcp/tcp.h"

#include <string.h>
#include <sys/socket.h>

#include "transport/backends.h"
#include "transport/lane-rendezvous.h"

/* Twelve bytes into an empty socket buffer: send(2) never blocks. */
static void answer(GSocketConnection *connection, uint32_t status)
{
	g_autoptr(GByteArray) body = g_byte_array_new();
	uint8_t frame[PR_WIRE_HEADER_BYTES + sizeof(uint32_t)];

	pr_u32_encode(body, status);
	pr_header_encode(frame, PR_MSG_LANE_ACK, body->len);
	memcpy(frame + PR_WIRE_HEADER_BYTES, body->data, sizeof(uint32_t));
	/* If the peer has gone meanwhile, the first READ fails. */
	(void)send(g_socket_get_fd(g_socket_connection_get_socket(connection)), frame,
		   sizeof(frame), MSG_DONTWAIT | MSG_NOSIGNAL);
}

void pr_tcp_acknowledge(GSocketConnection *connection)
{
	answer(connection, 0);
}

static void refuse(gpointer connection, const char *reason, gpointer opaque)
{
	answer(connection, 1);
	g_object_unref(connection);
}

PrDataListener *pr_tcp_listen(const PrUri *uri, GError **error)
{
	PrBackendListener *listener;

	if (!pr_backend_check_options(uri, (const char *const[]){NULL}, error))
		return NULL;
	listener = g_new0(PrBackendListener, 1);
	listener->base.ops = &pr_transport_tcp;
	listener->pending = pr_pending_lanes_new(refuse, NULL, error);
	if (listener->pending)
		return &listener->base;
	g_free(listener);
	return NULL;
}

void pr_tcp_offer(PrDataListener *listener, GSocketConnection *connection, const PrLaneHello *hello)
{
	pr_pending_lanes_offer(((PrBackendListener *)listener)->pending, connection, hello);
}

void pr_tcp_listener_close(PrDataListener *listener)
{
	pr_pending_lanes_free(((PrBackendListener *)listener)->pending);
	g_free(listener);
}
