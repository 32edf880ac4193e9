/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Parses URIs and lists of them (transport/uri.c). The first byte says whether they are for
 * listening. */
#include <string.h>

#include "tests/fuzz/fuzz.h"
#include "transport/uri.h"

static void same_uri(const PrUri *a, const PrUri *b)
{
	GHashTableIter iter;
	gpointer key, value;

	g_assert_cmpstr(a->scheme, ==, b->scheme);
	g_assert_cmpstr(a->host, ==, b->host);
	g_assert_cmpint(a->port, ==, b->port);
	g_assert_cmpuint(g_hash_table_size(a->options), ==, g_hash_table_size(b->options));
	g_hash_table_iter_init(&iter, a->options);
	while (g_hash_table_iter_next(&iter, &key, &value))
		g_assert_cmpstr(value, ==, g_hash_table_lookup(b->options, key));
}

/* A URI's address is the URI without options. The parser must accept it and return the same
 * values. */
static void check_address(const PrUri *uri, gboolean listening)
{
	g_autofree char *address = pr_uri_address(uri);
	g_autofree char *again = NULL;
	g_autoptr(PrUri) bare = pr_uri_parse(address, listening, NULL);

	g_assert_nonnull(bare);
	g_assert_cmpstr(bare->scheme, ==, uri->scheme);
	g_assert_cmpstr(bare->host, ==, uri->host);
	g_assert_cmpint(bare->port, ==, uri->port);
	g_assert_cmpuint(g_hash_table_size(bare->options), ==, 0);
	again = pr_uri_address(bare);
	g_assert_cmpstr(again, ==, address);
}

static void check_uri(const PrUri *uri, const char *text, gboolean listening)
{
	g_autoptr(PrUri) copy = pr_uri_copy(uri);

	g_assert_cmpstr(uri->text, ==, text);
	g_assert(*uri->scheme && *uri->host);
	g_assert(listening || uri->port);
	g_assert(*pr_scheme_transport(uri->scheme) || g_str_has_suffix(uri->scheme, "+"));
	same_uri(uri, copy);
	check_address(uri, listening);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	FuzzInput input = {data, size};
	gboolean listening = fuzz_u8(&input) & 1;
	g_autofree char *text = g_strndup((const char *)input.at, input.left);
	g_auto(GStrv) elements = g_strsplit(text, ",", -1);
	g_autoptr(GError) error = NULL;
	g_autoptr(GPtrArray) uris = pr_uri_list_parse(text, listening, &error);

	fuzz_outcome(uris != NULL, error);
	if (!uris)
		return 0;
	g_assert_cmpuint(uris->len, ==, g_strv_length(elements));
	for (guint i = 0; i < uris->len; i++)
		check_uri(uris->pdata[i], elements[i], listening);
	return 0;
}
