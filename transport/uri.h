/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Paths as the operator writes them: SCHEME:HOST:PORT[?KEY=VALUE[&KEY=VALUE]…], and lists of
 * them, separated by commas, in order of preference. HOST is a name, an IPv4 address, or an IPv6
 * address in brackets. The prefix "faulty+" of a scheme adds fault injection: faulty+tcp:…
 * (transport/faulty/faulty.h).
 */
#pragma once

#include <gio/gio.h>
#include <stdint.h>

typedef enum PrUriError { PR_URI_ERROR_MALFORMED } PrUriError;
#define PR_URI_ERROR pr_uri_error_quark()
GQuark pr_uri_error_quark(void);

typedef struct PrUri {
	char *text;	     /* as it was parsed */
	char *scheme;	     /* "ofi", "tcp", "faulty+ofi", … */
	char *host;	     /* without brackets */
	uint16_t port;	     /* 0 only for a listener, whose port the kernel chooses */
	GHashTable *options; /* key -> value, both strings */
} PrUri;

/* An error quotes the URI, and says what is wrong and what was expected. Port 0 is accepted only
 * with `listening`. */
PrUri *pr_uri_parse(const char *text, gboolean listening, GError **error);
PrUri *pr_uri_copy(const PrUri *uri);
void pr_uri_free(PrUri *uri);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrUri, pr_uri_free)

/* Parses a list of URIs (PrUri *, freed with the array); it has at least one. */
GPtrArray *pr_uri_list_parse(const char *text, gboolean listening, GError **error);

/* The transport that carries the pages: the scheme without its prefix ("faulty+ofi" -> "ofi"). */
const char *pr_scheme_transport(const char *scheme);

/* SCHEME:HOST:PORT, an IPv6 address in brackets, without options; g_free() it. */
char *pr_uri_address(const PrUri *uri);
