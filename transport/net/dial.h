/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Looks up names, and connects sockets, all within a deadline (us, monotonic). Errors are
 * PR_PATH_ERROR, PR_RESOURCE_ERROR or G_IO_ERROR_CANCELLED.
 */
#pragma once

#include <gio/gio.h>
#include <stdint.h>

#include "transport/uri.h"

/* The socket addresses (GSocketAddress, at least one) of a name or an address. */
GPtrArray *pr_resolve(const char *host, uint16_t port, gint64 deadline, GCancellable *cancel,
		      GError **error);

/* Connects to the URI's host at `port`, from the address of its option `bind` if it has one.
 * Tries every address of a name. TCP_NODELAY is set. */
GSocketConnection *pr_dial(const PrUri *uri, uint16_t port, gint64 deadline, GCancellable *cancel,
			   GError **error);

/* Sets TCP_NODELAY, because every message matters on its own. That fails on a connection that has
 * just died; the failure is only logged, as the next use of the socket fails, too. */
void pr_configure_socket(GSocket *socket);

/* "10.0.0.1:4444" or "[::1]:4444"; g_free() it. */
char *pr_address_text(GSocketAddress *address);
/* The same, of the far end of a connection. */
char *pr_peer_text(GSocketConnection *connection);

typedef enum PrWait { PR_WAIT_READY, PR_WAIT_TIMEOUT, PR_WAIT_CANCELLED } PrWait;
/* Waits for poll(2) events (errors count as ready). */
PrWait pr_wait_fd(int fd, short events, gint64 deadline, GCancellable *cancel);
