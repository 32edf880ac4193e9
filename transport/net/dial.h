/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Names to addresses, addresses to sockets, all bounded in time: deadlines are in microseconds of the
 * monotonic clock. Errors are of the domain PR_PATH_ERROR, or G_IO_ERROR_CANCELLED.
 */
#pragma once

#include <gio/gio.h>
#include <stdint.h>

#include "transport/uri.h"

/* The socket addresses (GSocketAddress, at least one) of a name or an address. */
GPtrArray *pr_resolve(const char *host, uint16_t port, gint64 deadline, GCancellable *cancel,
		      GError **error);

/* Connects to the URI's host at `port`, from the address of its option `bind` if it has one. Tries every
 * address of a name. TCP_NODELAY is set. */
GSocketConnection *pr_dial(const PrUri *uri, uint16_t port, gint64 deadline, GCancellable *cancel,
			   GError **error);

/* TCP_NODELAY: every message matters on its own. A connection that has just died is left to its next use. */
void pr_configure_socket(GSocket *socket);

/* "10.0.0.1:4444", "[::1]:4444"; the caller's to g_free(). */
char *pr_address_text(GSocketAddress *address);
/* As above, for the far end of a connection. */
char *pr_peer_text(GSocketConnection *connection);

typedef enum PrWait { PR_WAIT_READY, PR_WAIT_TIMEOUT, PR_WAIT_CANCELLED } PrWait;
/* Waits for poll(2) events (errors count as ready). */
PrWait pr_wait_fd(int fd, short events, gint64 deadline, GCancellable *cancel);
