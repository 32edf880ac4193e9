/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The limits of the monitor's socket: users, and the number of clients. */
#include <glib/gstdio.h>
#include <string.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "tests/rigs/as-user.h"
#include "tests/rigs/fake-engine.h"

static void assert_contains(const char *text, const char *part)
{
	if (!strstr(text, part))
		fail_msg("'%s' is not in: %s", part, text);
}

static void expect_refused(Bench *bench, const char *why)
{
	g_autoptr(Client) client = client_new(bench);
	g_autofree char *text = client_request(client, NULL);

	assert_contains(text, "{\"error\":{\"class\":\"GenericError\"");
	assert_contains(text, why);
	assert_true(client_at_end(client));
}

static void too_many_clients_get_an_error(void **state)
{
	Bench *bench = *state;
	g_autoptr(GPtrArray) clients = g_ptr_array_new_with_free_func((GDestroyNotify)client_free);
	g_autofree char *answer = NULL;

	for (guint i = 0; i < 64; i++)
		g_ptr_array_add(clients, client_ready(bench));
	for (guint i = 0; i < 200; i++)
		expect_refused(bench, "there are 64 clients already");
	answer = client_request(clients->pdata[63], "{\"execute\":\"query-version\"}");
	assert_contains(answer, "return");
	/* After a client has disconnected, the monitor accepts another one. */
	g_ptr_array_set_size(clients, 63);
	for (gboolean accepted = FALSE; !accepted;) {
		g_autoptr(Client) client = client_new(bench);
		g_autofree char *text = client_request(client, NULL);

		accepted = strstr(text, "\"QMP\"") != NULL;
	}
}

static void connect_as_nobody(void *opaque)
{
	expect_refused(opaque, "user 65534; this monitor serves root and user 0 only");
}

static void other_users_are_refused(void **state)
{
	Bench *bench = *state;
	g_autofree char *answer = NULL;

	if (geteuid() != 0)
		skip();
	/* The file's mode normally keeps other users out. Here it is widened. */
	assert_int_equal(g_chmod(bench->dir, 0755), 0);
	assert_int_equal(g_chmod(bench->path, 0666), 0);
	as_user(NOBODY, connect_as_nobody, bench);

	g_autoptr(Client) client = client_ready(bench);
	answer = client_request(client, "{\"execute\":\"query-version\"}");
	assert_contains(answer, "return");
}

#define ON_BENCH(test_) cmocka_unit_test_setup_teardown(test_, bench_setup, bench_teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		ON_BENCH(too_many_clients_get_an_error),
		ON_BENCH(other_users_are_refused),
	};

	return cmocka_run_group_tests_name("monitor-clients", tests, NULL, NULL);
}
