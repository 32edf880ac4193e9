/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Several clients of one monitor: each has its turn, however much another one asks. */
#include <stdio.h>
#include <string.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "tests/unit/fake-engine.h"

#define FIRST 1000 /* handshake-timeout, ms */
#define ASKED 300

/* Keeps the monitor's thread busy until it is let go. */
static gboolean wait_for_mutex(gpointer opaque)
{
	g_mutex_lock(opaque);
	g_mutex_unlock(opaque);
	return G_SOURCE_REMOVE;
}

/* The commands of the one count up; where the count stands when the other one is answered says how many went before. */
static void one_who_asks_much_does_not_keep_the_others_waiting(void **state)
{
	Bench *bench = *state;
	g_autoptr(Client) greedy = client_ready(bench);
	g_autoptr(Client) client = client_ready(bench);
	g_autoptr(GString) much = g_string_new(NULL);
	GMutex busy;
	int stands = 0;

	for (guint i = 0; i < ASKED; i++)
		g_string_append_printf(much,
				       "{\"execute\":\"migrate-set-parameters\",\"arguments\":"
				       "{\"handshake-timeout\":%u}}",
				       FIRST + i);
	g_mutex_init(&busy);
	g_mutex_lock(&busy);
	g_main_context_invoke(bench->context, wait_for_mutex, &busy);
	client_send(greedy, much->str);
	client_send(client, "{\"execute\":\"query-migrate-parameters\"}");
	g_mutex_unlock(&busy);

	g_autofree char *answer = client_ask(client, NULL);
	const char *value = strstr(answer, "\"handshake-timeout\":");
	assert_non_null(value);
	assert_int_equal(sscanf(value, "\"handshake-timeout\":%d", &stands), 1);
	/* It may have had a turn or two; the default value is larger. */
	assert_true(stands < FIRST + ASKED / 10 || stands > FIRST + ASKED);

	for (guint i = 0; i < ASKED; i++) {
		g_autofree char *done = client_ask(greedy, NULL);

		assert_non_null(strstr(done, "return"));
	}
	assert_int_equal(pr_param(&bench->params, PR_PARAM_HANDSHAKE_TIMEOUT), FIRST + ASKED - 1);
	g_mutex_clear(&busy);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(one_who_asks_much_does_not_keep_the_others_waiting,
						bench_setup, bench_teardown),
	};

	return cmocka_run_group_tests_name("monitor-turns", tests, NULL, NULL);
}
