/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Paths as the operator names them: SCHEME:HOST:PORT[?KEY=VALUE[&KEY=VALUE]…], and lists of them,
 * separated by commas, in order of preference. HOST is a name, an IPv4 address or an IPv6 address
 * in brackets. A scheme may be wrapped for fault injection: faulty+tcp:… (see transport/faulty/faulty.c).
 */
#pragma once

#include <gio/gio.h>
#include <stdint.h>

typedef enum PrUriError { PR_URI_ERROR_MALFORMED } PrUriError;
#define PR_URI_ERROR pr_uri_error_quark()
GQuark pr_uri_error_quark(void);

typedef struct PrUri {
	char *text;	     /* as given */
	char *scheme;	     /* "ofi", "tcp", "faulty+ofi", … */
	char *host;	     /* without brackets */
	uint16_t port;	     /* 0 only where a listener may choose one */
	GHashTable *options; /* key -> value, both strings */
} PrUri;

/* Errors quote the URI and say what is wrong and what was expected. Port 0 is accepted only with
 * `listening`. */
PrUri *pr_uri_parse(const char *text, gboolean listening, GError **error);
PrUri *pr_uri_copy(const PrUri *uri);
void pr_uri_free(PrUri *uri);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrUri, pr_uri_free)

/* An element list of PrUri*, freed with the array; at least one. */
GPtrArray *pr_uri_list_parse(const char *text, gboolean listening, GError **error);

/* The transport that carries the pages: the scheme without wrappers ("faulty+ofi" -> "ofi"). */
const char *pr_scheme_transport(const char *scheme);

/* SCHEME:HOST:PORT with brackets where needed; the caller's to g_free(). */
char *pr_uri_address(const PrUri *uri);
