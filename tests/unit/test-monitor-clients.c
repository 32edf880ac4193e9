/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Who is served by the monitor's socket, and how many. */
#include <glib/gstdio.h>
#include <string.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "tests/unit/as-user.h"
#include "tests/unit/fake-engine.h"

static void assert_contains(const char *text, const char *part)
{
	if (!strstr(text, part))
		fail_msg("'%s' is not in: %s", part, text);
}

static void expect_turned_away(Bench *bench, const char *why)
{
	g_autoptr(Client) client = client_new(bench);
	g_autofree char *text = client_ask(client, NULL);

	assert_contains(text, "{\"error\":{\"class\":\"GenericError\"");
	assert_contains(text, why);
	assert_true(client_at_end(client));
}

static void one_client_too_many_is_told_so(void **state)
{
	Bench *bench = *state;
	g_autoptr(GPtrArray) clients = g_ptr_array_new_with_free_func((GDestroyNotify)client_free);
	g_autofree char *answer = NULL;

	for (guint i = 0; i < 64; i++)
		g_ptr_array_add(clients, client_ready(bench));
	for (guint i = 0; i < 200; i++)
		expect_turned_away(bench, "there are 64 clients already");
	answer = client_ask(clients->pdata[63], "{\"execute\":\"query-version\"}");
	assert_contains(answer, "return");
	/* One that leaves makes room, when the monitor has seen that. */
	g_ptr_array_set_size(clients, 63);
	for (gboolean let_in = FALSE; !let_in;) {
		g_autoptr(Client) client = client_new(bench);
		g_autofree char *text = client_ask(client, NULL);

		let_in = strstr(text, "\"QMP\"") != NULL;
	}
}

static void stranger(void *opaque)
{
	expect_turned_away(opaque, "user 65534; this monitor serves root and user 0 only");
}

static void other_users_are_turned_away(void **state)
{
	Bench *bench = *state;
	g_autofree char *answer = NULL;

	if (geteuid() != 0)
		skip();
	/* The file's mode alone keeps them out; here somebody has widened it. */
	assert_int_equal(g_chmod(bench->dir, 0755), 0);
	assert_int_equal(g_chmod(bench->path, 0666), 0);
	as_user(NOBODY, stranger, bench);

	g_autoptr(Client) client = client_ready(bench);
	answer = client_ask(client, "{\"execute\":\"query-version\"}");
	assert_contains(answer, "return");
}

#define ON_BENCH(test_) cmocka_unit_test_setup_teardown(test_, bench_setup, bench_teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		ON_BENCH(one_client_too_many_is_told_so),
		ON_BENCH(other_users_are_turned_away),
	};

	return cmocka_run_group_tests_name("monitor-clients", tests, NULL, NULL);
}
