/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Between tls.c, tls-errors.c and tls-proxy.c. */
#pragma once

#include "transport/net/tls.h"

/* tls-errors.c: what is wrong with a peer's certificate, as the rest of a sentence about it; `host`: NULL
 * for a client. */
char *pr_tls_complaint(GTlsCertificate *certificate, GTlsCertificateFlags flags, const char *host);
/* The distinguished name, or "a certificate without a name"; g_free() it. */
char *pr_tls_subject(GTlsCertificate *certificate);
/* Whether a certificate's common name or distinguished name is one of the list. */
gboolean pr_tls_is_named(const char *subject, char **names);

/* tls-proxy.c: a connection in place of one whose handshake is done. Takes nothing. */
GSocketConnection *pr_tls_splice(GSocketConnection *connection, GIOStream *tls, const char *peer,
				 GError **error);
