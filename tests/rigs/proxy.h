/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A proxy in front of a port of this host. It accepts the first connection and does not forward it,
 * so that client waits for an answer. It forwards later connections.
 */
#pragma once

#include <glib.h>

typedef struct Proxy Proxy;

Proxy *proxy_new(guint16 to_port);
/* Ends all connections. */
void proxy_free(Proxy *proxy);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Proxy, proxy_free)

guint16 proxy_port(Proxy *proxy);
/* Waits until the first client has connected. */
void proxy_wait_connected(Proxy *proxy);
/* Closes the first client's connection, and returns when the client has closed it, too. */
void proxy_close_first(Proxy *proxy);
