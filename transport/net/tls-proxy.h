/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A TLS connection that is used as if it were a plain socket. */
#pragma once

#include <gio/gio.h>

/* Makes a connection whose descriptor carries what goes through the stream `tls` over
 * `connection`. The handshake is done. Keeps references of both. `peer` is for log lines. */
GSocketConnection *pr_tls_proxy_new(GSocketConnection *connection, GIOStream *tls, const char *peer,
				    GError **error);
