/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Several clients of one monitor: neither many commands nor an asynchronous command of one delay
 * others. */
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "tests/rigs/fake-engine.h"

#define FIRST  1000 /* handshake-timeout, ms */
#define ASKED  300
#define PROMPT "(postroad) "

/* Blocks the monitor's thread until the mutex is unlocked. */
static gboolean wait_for_mutex(gpointer opaque)
{
	g_mutex_lock(opaque);
	g_mutex_unlock(opaque);
	return G_SOURCE_REMOVE;
}

/*
 * Each command of the busy client increments a parameter. Its value in the other client's answer
 * shows how many of them were run before.
 */
static void many_commands_of_one_client_do_not_delay_others(void **state)
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

	g_autofree char *answer = client_request(client, NULL);
	const char *value = strstr(answer, "\"handshake-timeout\":");
	assert_non_null(value);
	assert_int_equal(sscanf(value, "\"handshake-timeout\":%d", &stands), 1);
	/*
	 * A few of them may have run. Before the first one the parameter has its default, which is
	 * larger.
	 */
	assert_true(stands < FIRST + ASKED / 10 || stands > FIRST + ASKED);

	for (guint i = 0; i < ASKED; i++) {
		g_autofree char *done = client_request(greedy, NULL);

		assert_non_null(strstr(done, "return"));
	}
	assert_int_equal(pr_param(&bench->params, PR_PARAM_HANDSHAKE_TIMEOUT), FIRST + ASKED - 1);
	g_mutex_clear(&busy);
}

#define RECOVER(more)                                                                              \
	"{\"execute\":\"migrate-recover\",\"arguments\":{\"uri\":\"tcp:there:1\"}" more "}"
#define BY_HMP(command, line)                                                                      \
	"{\"execute\":\"" command "\",\"id\":1,\"arguments\":{\"command-line\":\"" line "\"}}"
#define VERSION "{\"execute\":\"query-version\",\"id\":2}"

static void wait_for_call(Bench *bench, const char *wanted)
{
	gint64 deadline = g_get_monotonic_time() + 20 * G_USEC_PER_SEC;

	for (;;) {
		g_autofree char *call = fake_last_call(bench->migration);

		if (!strcmp(call, wanted))
			return;
		if (g_get_monotonic_time() > deadline)
			fail_msg("the engine was asked for '%s', not for '%s'", call, wanted);
		g_usleep(1000);
	}
}

static void assert_answered(Client *client, const char *text, const char *part)
{
	g_autofree char *answer = client_request(client, text);

	if (!strstr(answer, part))
		fail_msg("'%s' is not in: %s", part, answer);
}

static void assert_nothing_to_read(Client *client)
{
	struct pollfd fd = {.fd = client->fd, .events = POLLIN};

	assert_int_equal(client->input->len, 0);
	assert_int_equal(poll(&fd, 1, 0), 0);
}

/* The answers keep the order of the commands, so the second command waits for the first. */
static void a_name_look_up_delays_only_its_client(void **state)
{
	static const char *const asked[] = {
		RECOVER(",\"id\":1"),
		BY_HMP("human-monitor-command", "migrate_recover tcp:there:1"),
		BY_HMP("x-postroad-hmp", "migrate_recover tcp:there:1"),
	};
	Bench *bench = *state;
	g_autoptr(Client) other = client_ready(bench);

	for (gsize i = 0; i < G_N_ELEMENTS(asked); i++) {
		g_autoptr(Client) client = client_ready(bench);
		g_autofree char *both = g_strconcat(asked[i], VERSION, NULL);

		fake_block_names(bench->migration, TRUE);
		client_send(client, both);
		wait_for_call(bench, "recover tcp:there:1");
		assert_answered(other, VERSION, "return");
		assert_answered(other, BY_HMP("x-postroad-hmp", "info status"), "Engine status");
		assert_nothing_to_read(client);
		fake_block_names(bench->migration, FALSE);
		assert_answered(client, NULL, "\"id\":1");
		assert_answered(client, NULL, "\"id\":2");
		/* The client is served again. */
		assert_answered(client, "{\"execute\":\"migrate-pause\",\"id\":3}", "\"id\":3");
	}
}

static void a_name_look_up_delays_the_next_line_of_a_terminal(void **state)
{
	Bench *bench = *state;
	g_autoptr(Client) other = client_ready(bench);
	g_autoptr(GString) input = g_string_new(NULL);
	static const char lines[] = "migrate_recover tcp:there:1\ninfo status\n";
	char so_far[128] = "";

	fake_block_names(bench->migration, TRUE);
	assert_int_equal(write(bench->hmp_fd, lines, strlen(lines)), strlen(lines));
	wait_for_call(bench, "recover tcp:there:1");
	assert_answered(other, VERSION, "return");
	assert_int_equal(read(bench->hmp_fd, so_far, sizeof(so_far) - 1), strlen(PROMPT));
	assert_string_equal(so_far, PROMPT);
	fake_block_names(bench->migration, FALSE);
	g_autofree char *line = read_text_line(bench->hmp_fd, input);
	assert_non_null(strstr(line, "Engine status"));
}

static void a_failed_look_up_is_an_error(void **state)
{
	Bench *bench = *state;
	g_autoptr(Client) client = client_ready(bench);

	fake_fail_next(bench->migration, "the name there could not be looked up");
	assert_answered(
		client, RECOVER(",\"id\":7"),
		"{\"error\":{\"class\":\"GenericError\",\"desc\":\"the name there could not be "
		"looked up\"},\"id\":7}");
	assert_answered(client, RECOVER(""), "{\"return\":{}}");
	assert_answered(client, "{\"execute\":\"migrate-incoming\"}", "'uri' is missing");
	assert_answered(client, VERSION, "return");
}

static void a_client_may_disconnect_during_a_look_up(void **state)
{
	Bench *bench = *state;
	g_autoptr(Client) other = client_ready(bench);

	for (guint i = 0; i < 3; i++) {
		Client *client = client_ready(bench);
		g_autofree char *twice = g_strconcat(RECOVER(""), RECOVER(""), NULL);

		fake_block_names(bench->migration, TRUE);
		client_send(client, twice);
		wait_for_call(bench, "recover tcp:there:1");
		client_free(client);
		assert_answered(other, "{\"execute\":\"migrate-pause\"}", "return");
		fake_block_names(bench->migration, FALSE);
	}
	assert_answered(other, VERSION, "return");
}

/* The teardown fails if the engine does not end. */
static void a_look_up_does_not_delay_the_engines_end(void **state)
{
	Bench *bench = *state;
	g_autoptr(Client) client = client_ready(bench);

	fake_block_names(bench->migration, TRUE);
	client_send(client, RECOVER(""));
	wait_for_call(bench, "recover tcp:there:1");
}

#define ON_BENCH(test_) cmocka_unit_test_setup_teardown(test_, bench_setup, bench_teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		ON_BENCH(many_commands_of_one_client_do_not_delay_others),
		ON_BENCH(a_name_look_up_delays_only_its_client),
		ON_BENCH(a_name_look_up_delays_the_next_line_of_a_terminal),
		ON_BENCH(a_failed_look_up_is_an_error),
		ON_BENCH(a_client_may_disconnect_during_a_look_up),
		ON_BENCH(a_look_up_does_not_delay_the_engines_end),
	};

	return cmocka_run_group_tests_name("monitor-turns", tests, NULL, NULL);
}
