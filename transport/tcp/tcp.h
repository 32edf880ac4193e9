/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The parts of the tcp: backend among themselves: tcp.c, listener.c, server.c. */
#pragma once

#include <gio/gio.h>

#include "transport/backend.h"

#define PR_TCP_REQUEST_BYTES (PR_WIRE_HEADER_BYTES + PR_REQ_PAGES_BYTES)

/* listener.c: where offered connections and accept() meet. */
PrDataListener *pr_tcp_listen(const PrUri *uri, GError **error);
void pr_tcp_offer(PrDataListener *listener, GSocketConnection *connection,
		  const PrLaneHello *hello);
void pr_tcp_expect(PrDataListener *listener, const PrBinding *binding);
void pr_tcp_forget(PrDataListener *listener, const PrBinding *binding);
void pr_tcp_listener_close(PrDataListener *listener);
/* Waits for one connection per lane with the setup's binding and acknowledges each. */
gboolean pr_tcp_listener_claim(PrDataListener *listener, const PrPathSetup *setup,
			       GSocketConnection *ret[PR_LANES_MAX], GError **error);

/* server.c: answers the REQ_PAGES of one connection until it ends. Returns the reason, to be freed.
 * The socket blocks; shutdown(2) by another thread ends the call. Stays awake for spin_us after each
 * answer. */
char *pr_tcp_serve(int fd, const PrRegion *regions, guint n_regions, guint spin_us);
/* The source's side of a new connection: connects, introduces the lane, waits for the answer. The socket
 * blocks. */
GSocketConnection *pr_tcp_connect_lane(const PrPathSetup *setup, PrLaneId lane, gint64 deadline,
				       GError **error);
/* Sets what both sides want of their sockets; returns the socket's fd. */
int pr_tcp_configure(GSocketConnection *connection, PrLaneId lane);
