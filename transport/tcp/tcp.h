/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What tcp.c, listener.c and server.c, the files of the tcp: backend, offer each other. */
#pragma once

#include <gio/gio.h>

#include "transport/backend.h"

#define PR_TCP_REQUEST_BYTES (PR_WIRE_HEADER_BYTES + PR_REQ_PAGES_BYTES)

/* listener.c: entries of the ops table. Connections that are offered wait for accept(). */
PrDataListener *pr_tcp_listen(const PrUri *uri, GError **error);
void pr_tcp_offer(PrDataListener *listener, GSocketConnection *connection,
		  const PrLaneHello *hello);
void pr_tcp_listener_close(PrDataListener *listener);
/* Tells the source that its lane is accepted. */
void pr_tcp_acknowledge(GSocketConnection *connection);

/* server.c: answers the REQ_PAGES of one connection until it ends. Returns the reason, to be freed;
 * NULL: the peer closed the connection. The socket blocks; another thread ends the call by
 * shutdown(2). After each answer the thread polls for spin_us before it sleeps. */
char *pr_tcp_serve(int fd, const PrRegion *regions, guint n_regions, guint spin_us);
/* The source's side of a new lane: connects, sends the lane's hello, waits for the answer. The
 * socket blocks. */
GSocketConnection *pr_tcp_connect_lane(const PrPathSetup *setup, PrLaneId lane, gint64 deadline,
				       GError **error);
/* Sets the socket options that both sides want; returns the socket's fd. */
int pr_tcp_configure(GSocketConnection *connection, PrLaneId lane);
