/* SPDX-License-Identifier: GPL-2.0-or-later */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#include "transport/uri.h"

static void uris_are_split_into_their_parts(void **state)
{
	static const struct {
		const char *text, *scheme, *host;
		uint16_t port;
		const char *address;
	} table[] = {
		{"tcp:10.0.1.2:4444", "tcp", "10.0.1.2", 4444, "tcp:10.0.1.2:4444"},
		{"ofi:host-2.example.org:1", "ofi", "host-2.example.org", 1,
		 "ofi:host-2.example.org:1"},
		{"rdma:[fe80::1%eth0]:65535", "rdma", "fe80::1%eth0", 65535,
		 "rdma:[fe80::1%eth0]:65535"},
		{"faulty+tcp:[::1]:4444?cut=5", "faulty+tcp", "::1", 4444, "faulty+tcp:[::1]:4444"},
		{"tcp:localhost:04444", "tcp", "localhost", 4444, "tcp:localhost:4444"},
	};

	for (gsize i = 0; i < G_N_ELEMENTS(table); i++) {
		g_autoptr(GError) error = NULL;
		g_autoptr(PrUri) uri = pr_uri_parse(table[i].text, FALSE, &error);
		g_autofree char *address = NULL;

		assert_null(error);
		assert_string_equal(uri->text, table[i].text);
		assert_string_equal(uri->scheme, table[i].scheme);
		assert_string_equal(uri->host, table[i].host);
		assert_int_equal(uri->port, table[i].port);
		address = pr_uri_address(uri);
		assert_string_equal(address, table[i].address);
	}
}

static void options_are_split_into_keys_and_values(void **state)
{
	g_autoptr(PrUri) uri =
		pr_uri_parse("tcp:h:1?bind=::1&cut=RP_PONG=2&x-y_z=a?b", FALSE, NULL);

	assert_non_null(uri);
	assert_int_equal(g_hash_table_size(uri->options), 3);
	assert_string_equal(g_hash_table_lookup(uri->options, "bind"), "::1");
	assert_string_equal(g_hash_table_lookup(uri->options, "cut"), "RP_PONG=2");
	assert_string_equal(g_hash_table_lookup(uri->options, "x-y_z"), "a?b");
}

static void an_error_quotes_the_malformed_uri_and_explains_it(void **state)
{
	static const struct {
		const char *text, *says;
	} table[] = {
		{"", "it is empty"},
		{"tcp", "there is no ':'"},
		{"tcp:", "the port is missing"},
		{":h:1", "the scheme is empty"},
		{"TCP:h:1", "scheme \"TCP\""},
		{"tcp:h", "the port is missing"},
		{"tcp:h:", "port \"\""},
		{"tcp:h:0", "from 1 to 65535"},
		{"tcp:h:65536", "port \"65536\""},
		{"tcp:h:-1", "port \"-1\""},
		{"tcp:h:+1", "port \"+1\""},
		{"tcp:h:1x", "port \"1x\""},
		{"tcp:h:99999999999999999999999", "port"},
		{"tcp::1", "the host is empty"},
		{"tcp:a/b:1", "neither a name nor an address"},
		{"tcp:10.0.0.256:1", "not an IPv4 address"},
		{"tcp:10.0.1:1", "not an IPv4 address"},
		{"tcp:::1:4444", "brackets"},
		{"tcp:fe80::1:4444", "brackets"},
		{"tcp:[::1:4444", "'[' is not closed"},
		{"tcp:[]:4444", "not an IPv6 address"},
		{"tcp:[10.0.0.1]:4444", "not an IPv6 address"},
		{"tcp:[name]:4444", "not an IPv6 address"},
		{"tcp:[fe80::1%]:4444", "not an IPv6 address"},
		{"tcp:[::1]", "after ']'"},
		{"tcp:[::1]4444", "after ']'"},
		{"tcp:[::1]x:4444", "after ']'"},
		{"tcp:h:1?", "not KEY=VALUE"},
		{"tcp:h:1?a", "not KEY=VALUE"},
		{"tcp:h:1?a=", "not KEY=VALUE"},
		{"tcp:h:1?=b", "not KEY=VALUE"},
		{"tcp:h:1?a=b&", "not KEY=VALUE"},
		{"tcp:h:1?a=b&a=c", "given before"},
		{"tcp:h:1 ", "a blank"},
		{"tcp:h :1", "a blank"},
		{"tcp:h\xc3\xa4:1", "beyond ASCII"},
		{"tcp:h:1,tcp:h:2", "a comma"},
	};

	for (gsize i = 0; i < G_N_ELEMENTS(table); i++) {
		g_autoptr(GError) error = NULL;
		g_autoptr(PrUri) uri = pr_uri_parse(table[i].text, FALSE, &error);
		g_autofree char *quoted = g_strdup_printf("\"%s\"", table[i].text);

		if (uri)
			fail_msg("\"%s\" was accepted", table[i].text);
		assert_true(g_error_matches(error, PR_URI_ERROR, PR_URI_ERROR_MALFORMED));
		if (!strstr(error->message, table[i].says) || !strstr(error->message, quoted))
			fail_msg("%s does not say %s", error->message, table[i].says);
	}
}

static void port_zero_is_accepted_only_for_a_listener(void **state)
{
	g_autoptr(PrUri) uri = pr_uri_parse("tcp:[::]:0", TRUE, NULL);

	assert_non_null(uri);
	assert_int_equal(uri->port, 0);
}

static void a_copy_is_equal_and_independent(void **state)
{
	g_autoptr(PrUri) uri = pr_uri_parse("tcp:h:1?a=b", FALSE, NULL);
	g_autoptr(PrUri) copy = pr_uri_copy(uri);

	g_clear_pointer(&uri, pr_uri_free);
	assert_string_equal(copy->text, "tcp:h:1?a=b");
	assert_string_equal(copy->scheme, "tcp");
	assert_string_equal(copy->host, "h");
	assert_int_equal(copy->port, 1);
	assert_string_equal(g_hash_table_lookup(copy->options, "a"), "b");
}

static void lists_keep_their_order(void **state)
{
	g_autoptr(GPtrArray) uris =
		pr_uri_list_parse("ofi:10.0.1.2:4444,tcp:[::1]:1?a=b,tcp:h:2", FALSE, NULL);

	assert_non_null(uris);
	assert_int_equal(uris->len, 3);
	assert_string_equal(((PrUri *)uris->pdata[0])->text, "ofi:10.0.1.2:4444");
	assert_string_equal(((PrUri *)uris->pdata[1])->text, "tcp:[::1]:1?a=b");
	assert_string_equal(((PrUri *)uris->pdata[2])->host, "h");
}

static void lists_with_a_bad_element_are_refused(void **state)
{
	static const struct {
		const char *text, *says;
	} table[] = {
		{"", "is empty"},
		{",", "element of the list is empty"},
		{"tcp:h:1,", "element of the list is empty"},
		{",tcp:h:1", "element of the list is empty"},
		{"tcp:h:1,,tcp:h:2", "element of the list is empty"},
		{"tcp:h:1, tcp:h:2", "a blank"},
		{"tcp:h:1,tcp:h", "\"tcp:h\": the port is missing"},
	};

	for (gsize i = 0; i < G_N_ELEMENTS(table); i++) {
		g_autoptr(GError) error = NULL;
		g_autoptr(GPtrArray) uris = pr_uri_list_parse(table[i].text, FALSE, &error);

		assert_null(uris);
		assert_true(g_error_matches(error, PR_URI_ERROR, PR_URI_ERROR_MALFORMED));
		if (!strstr(error->message, table[i].says))
			fail_msg("%s does not say %s", error->message, table[i].says);
	}
}

static void a_wrapped_scheme_names_its_transport(void **state)
{
	assert_string_equal(pr_scheme_transport("faulty+ofi"), "ofi");
	assert_string_equal(pr_scheme_transport("tcp"), "tcp");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(uris_are_split_into_their_parts),
		cmocka_unit_test(options_are_split_into_keys_and_values),
		cmocka_unit_test(an_error_quotes_the_malformed_uri_and_explains_it),
		cmocka_unit_test(port_zero_is_accepted_only_for_a_listener),
		cmocka_unit_test(a_copy_is_equal_and_independent),
		cmocka_unit_test(lists_keep_their_order),
		cmocka_unit_test(lists_with_a_bad_element_are_refused),
		cmocka_unit_test(a_wrapped_scheme_names_its_transport),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
