/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The sockets that a listener accepts from. For transport/ only. */
#pragma once

#include <gio/gio.h>
#include <stdint.h>

#include "transport/uri.h"
#include "transport/net/tls.h"

#define PR_LISTENING_MAX 16 /* addresses of one name */

/* Adds a GSocket for every address of the URI's host, all with the same port, which the kernel
 * may choose. It also fails where other hosts can reach an address and connections would be
 * plain, unless the operator has allowed that. */
gboolean pr_listening_open(const PrUri *uri, const PrSecurity *security, GPtrArray *sockets,
			   GCancellable *cancel, GError **error);
/* The port that it is bound to. */
uint16_t pr_listening_port(GSocket *socket);
/* The address that it is bound to; g_free() it. */
char *pr_listening_host(GSocket *socket);
