/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "transport/uri.h"

#include <string.h>

G_DEFINE_QUARK(pr_uri_error, pr_uri_error)

#define URI_SHAPE "SCHEME:HOST:PORT[?KEY=VALUE[&KEY=VALUE]...]"

/* The error quotes the URI, then says what is wrong with it and what was expected. */
static gboolean G_GNUC_PRINTF(3, 4)
	malformed(GError **error, const char *text, const char *format, ...)
{
	g_autofree char *what = NULL;
	va_list args;

	va_start(args, format);
	what = g_strdup_vprintf(format, args);
	va_end(args);
	g_set_error(error, PR_URI_ERROR, PR_URI_ERROR_MALFORMED, "URI \"%s\": %s", text, what);
	return FALSE;
}

/* A part of a URI's text. */
typedef struct Span {
	const char *at;
	gsize length;
} Span;

static char *span_dup(Span span)
{
	return g_strndup(span.at, span.length);
}

/* Splits `rest` at the first `c`: TRUE if there is one. */
static gboolean cut_at(Span *rest, char c, Span *ret_head)
{
	const char *at = memchr(rest->at, c, rest->length);

	if (!at)
		return FALSE;
	*ret_head = (Span){rest->at, at - rest->at};
	rest->length -= ret_head->length + 1;
	rest->at = at + 1;
	return TRUE;
}

static gboolean is_made_of(Span span, const char *extra)
{
	for (gsize i = 0; i < span.length; i++)
		if (!g_ascii_isalnum(span.at[i]) && !strchr(extra, span.at[i]))
			return FALSE;
	return span.length > 0;
}

static gboolean parse_scheme(PrUri *uri, Span *rest, GError **error)
{
	Span scheme;

	if (!cut_at(rest, ':', &scheme))
		return malformed(error, uri->text, "there is no ':'; expected " URI_SHAPE);
	uri->scheme = span_dup(scheme);
	for (const char *c = uri->scheme; *c; c++)
		if (!g_ascii_islower(*c) && !g_ascii_isdigit(*c) && *c != '+')
			return malformed(error, uri->text,
					 "scheme \"%s\" must be of lower case letters, digits "
					 "and '+', as in tcp: or faulty+ofi:",
					 uri->scheme);
	if (!scheme.length)
		return malformed(error, uri->text, "the scheme is empty; expected " URI_SHAPE);
	return TRUE;
}

/* [ADDRESS] or [ADDRESS%SCOPE] */
static gboolean parse_bracketed(PrUri *uri, Span *rest, GError **error)
{
	g_autoptr(GInetAddress) address = NULL;
	g_autofree char *bare = NULL;
	Span inside, after;

	rest->at++;
	rest->length--;
	if (!cut_at(rest, ']', &inside))
		return malformed(error, uri->text, "'[' is not closed; expected [ADDRESS]:PORT");
	uri->host = span_dup(inside);
	bare = g_strndup(uri->host, strcspn(uri->host, "%"));
	address = g_inet_address_new_from_string(bare);
	if (!address || g_inet_address_get_family(address) != G_SOCKET_FAMILY_IPV6 ||
	    g_str_has_suffix(uri->host, "%"))
		return malformed(error, uri->text, "\"%s\" in brackets is not an IPv6 address",
				 uri->host);
	if (!cut_at(rest, ':', &after) || after.length)
		return malformed(error, uri->text, "expected a ':' and the port after ']'");
	return TRUE;
}

static gboolean check_host(PrUri *uri, Span host, GError **error)
{
	if (!host.length)
		return malformed(error, uri->text,
				 "the host is empty; give a name or an address (0.0.0.0 or [::] "
				 "to listen on all)");
	if (!is_made_of(host, ".-_"))
		return malformed(error, uri->text, "host \"%s\" is neither a name nor an address",
				 uri->host);
	if (strspn(uri->host, "0123456789.") == host.length && !g_hostname_is_ip_address(uri->host))
		return malformed(error, uri->text, "host \"%s\" is not an IPv4 address", uri->host);
	return TRUE;
}

static gboolean parse_host(PrUri *uri, Span *rest, GError **error)
{
	Span host;

	if (rest->length && rest->at[0] == '[')
		return parse_bracketed(uri, rest, error);
	if (!cut_at(rest, ':', &host))
		return malformed(error, uri->text, "the port is missing; expected " URI_SHAPE);
	if (memchr(rest->at, ':', rest->length))
		return malformed(error, uri->text,
				 "there are too many ':'; put an IPv6 address in brackets, as in "
				 "tcp:[::1]:4444");
	uri->host = span_dup(host);
	return check_host(uri, host, error);
}

static gboolean parse_port(PrUri *uri, Span port, gboolean listening, GError **error)
{
	g_autofree char *text = span_dup(port);
	guint64 value;

	if (!g_ascii_string_to_unsigned(text, 10, listening ? 0 : 1, UINT16_MAX, &value, NULL))
		return malformed(error, uri->text, "port \"%s\" is not a number from %d to %d",
				 text, listening ? 0 : 1, UINT16_MAX);
	uri->port = value;
	return TRUE;
}

static gboolean parse_option(PrUri *uri, Span option, GError **error)
{
	g_autofree char *text = span_dup(option);
	Span value = option, key;

	if (!cut_at(&value, '=', &key) || !value.length || !is_made_of(key, "-_."))
		return malformed(error, uri->text, "option \"%s\" is not KEY=VALUE", text);
	if (!g_hash_table_insert(uri->options, span_dup(key), span_dup(value)))
		return malformed(error, uri->text, "option \"%s\": its key was given before", text);
	return TRUE;
}

static gboolean parse_options(PrUri *uri, Span options, GError **error)
{
	Span option;

	while (cut_at(&options, '&', &option))
		if (!parse_option(uri, option, error))
			return FALSE;
	return parse_option(uri, options, error);
}

static gboolean check_characters(const char *text, GError **error)
{
	if (!*text)
		return malformed(error, text, "it is empty; expected " URI_SHAPE);
	for (const char *c = text; *c; c++)
		if (!g_ascii_isgraph(*c) || *c == ',' || *c == '"')
			return malformed(error, text,
					 "it contains a blank, a comma, a quote or a character "
					 "beyond ASCII; expected " URI_SHAPE);
	return TRUE;
}

PrUri *pr_uri_parse(const char *text, gboolean listening, GError **error)
{
	g_autoptr(PrUri) uri = g_new0(PrUri, 1);
	Span options = {text, strlen(text)};
	Span rest;
	gboolean has_options = TRUE;

	uri->text = g_strdup(text);
	uri->options = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, g_free);
	if (!check_characters(text, error))
		return NULL;
	if (!cut_at(&options, '?', &rest)) {
		rest = options;
		has_options = FALSE;
	}
	if (!parse_scheme(uri, &rest, error) || !parse_host(uri, &rest, error) ||
	    !parse_port(uri, rest, listening, error))
		return NULL;
	if (has_options && !parse_options(uri, options, error))
		return NULL;
	return g_steal_pointer(&uri);
}

PrUri *pr_uri_copy(const PrUri *uri)
{
	PrUri *copy = g_new0(PrUri, 1);
	GHashTableIter iter;
	gpointer key, value;

	copy->text = g_strdup(uri->text);
	copy->scheme = g_strdup(uri->scheme);
	copy->host = g_strdup(uri->host);
	copy->port = uri->port;
	copy->options = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, g_free);
	g_hash_table_iter_init(&iter, uri->options);
	while (g_hash_table_iter_next(&iter, &key, &value))
		g_hash_table_insert(copy->options, g_strdup(key), g_strdup(value));
	return copy;
}

void pr_uri_free(PrUri *uri)
{
	if (!uri)
		return;
	g_free(uri->text);
	g_free(uri->scheme);
	g_free(uri->host);
	g_hash_table_unref(uri->options);
	g_free(uri);
}

GPtrArray *pr_uri_list_parse(const char *text, gboolean listening, GError **error)
{
	g_autoptr(GPtrArray) uris = g_ptr_array_new_with_free_func((GDestroyNotify)pr_uri_free);
	g_auto(GStrv) elements = g_strsplit(text, ",", -1);

	if (!*text) {
		malformed(error, text, "it is empty; expected " URI_SHAPE);
		return NULL;
	}
	for (char **element = elements; *element; element++) {
		PrUri *uri = NULL;

		if (!**element)
			malformed(error, text,
				  "an element of the list is empty; expected URI[,URI]...");
		else
			uri = pr_uri_parse(*element, listening, error);
		if (!uri)
			return NULL;
		g_ptr_array_add(uris, uri);
	}
	return g_steal_pointer(&uris);
}

char *pr_uri_address(const PrUri *uri)
{
	gboolean brackets = strchr(uri->host, ':') != NULL;

	return g_strdup_printf("%s:%s%s%s:%u", uri->scheme, brackets ? "[" : "", uri->host,
			       brackets ? "]" : "", uri->port);
}

const char *pr_scheme_transport(const char *scheme)
{
	const char *plus = strrchr(scheme, '+');

	return plus ? plus + 1 : scheme;
}
