/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The sockets that a listener accepts from. For transport/ only. */
#pragma once

#include <gio/gio.h>
#include <stdint.h>

#include "transport/uri.h"
#include "transport/net/tls.h"

#define PR_LISTENING_MAX 16 /* addresses of one name */

/* Adds a GSocket for every address of the URI's host, all with the same port, which the system may choose. FALSE: also
 * where the addresses can be reached by others and nothing protects them. */
gboolean pr_listening_open(const PrUri *uri, const PrSecurity *security, GPtrArray *sockets,
			   GCancellable *cancel, GError **error);
uint16_t pr_listening_port(GSocket *socket);
/* Its address, as text; g_free() it. */
char *pr_listening_host(GSocket *socket);
