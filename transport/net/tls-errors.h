/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Certificates in words, for the errors of tls.c; and the names of --tls-allow. */
#pragma once

#include <gio/gio.h>

/* What is wrong with a peer's certificate, as the end of a sentence about it. `host`: the name or
 * address that a server's certificate has to be for; NULL for a client's. g_free() it. */
char *pr_tls_complaint(GTlsCertificate *certificate, GTlsCertificateFlags flags, const char *host);
/* The distinguished name, or "a certificate without a name"; g_free() it. */
char *pr_tls_subject(GTlsCertificate *certificate);
/* Whether `names` has this distinguished name, or the common name in it. */
gboolean pr_tls_is_named(const char *subject, char **names);
