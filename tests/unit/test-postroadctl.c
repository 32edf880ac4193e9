/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The program postroadctl, connected to a monitor with a fake engine. */
#include <gio/gio.h>
#include <gio/gunixsocketaddress.h>
#include <glib/gstdio.h>
#include <json-glib/json-glib.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "tests/rigs/fake-engine.h"

typedef struct Run {
	char *out, *err;
	int code; /* exit status */
} Run;

static void run_clear(Run *run)
{
	g_free(run->out);
	g_free(run->err);
}
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(Run, run_clear)

static void assert_contains(const char *text, const char *part)
{
	if (!strstr(text, part))
		fail_msg("'%s' is not in: %s", part, text);
}

/* Runs postroadctl to its end. */
static void ctl(Run *run, const char *path, const char *command, const char *file)
{
	const char *argv[] = {g_getenv("POSTROADCTL"), path, command, file, NULL};
	int status;

	assert_non_null(argv[0]);
	assert_true(g_spawn_sync(NULL, (char **)argv, NULL, G_SPAWN_DEFAULT, NULL, NULL, &run->out,
				 &run->err, &status, NULL));
	assert_true(WIFEXITED(status));
	run->code = WEXITSTATUS(status);
}

static void a_line_prints_its_answer(void **state)
{
	Bench *bench = *state;
	g_auto(Run) run = {0};
	g_autofree char *call = NULL;

	ctl(&run, bench->path, "migrate -d tcp:a:1,tcp:b:1", NULL);
	call = fake_last_call(bench->migration);
	assert_int_equal(run.code, 0);
	assert_string_equal(run.out, "");
	assert_string_equal(run.err, "");
	assert_string_equal(call, "start tcp:a:1,tcp:b:1");
	run_clear(&run);
	ctl(&run, bench->path, "info version", NULL);
	assert_int_equal(run.code, 0);
	assert_string_equal(run.out, "postroad-" PR_VERSION "\n");
}

static void a_failed_line_prints_its_error_and_exits_1(void **state)
{
	Bench *bench = *state;
	g_auto(Run) run = {0};

	fake_fail_next(bench->migration, "nothing is paused");
	ctl(&run, bench->path, "migrate -r tcp:a:1", NULL);
	assert_int_equal(run.code, 1);
	assert_string_equal(run.out, "");
	assert_string_equal(run.err, "postroadctl: nothing is paused\n");
}

static void usage_errors_explain_the_usage(void **state)
{
	Bench *bench = *state;
	static const struct {
		const char *path, *command, *file, *error;
	} rows[] = {
		{NULL, NULL, NULL, "expected QMP-PATH and COMMAND"},
		{"sock", NULL, NULL, "expected QMP-PATH and COMMAND"},
		{"sock", "report", NULL, "report: expected a file name"},
		{"sock", "migrate", "-d", "-d"},
		{"sock", "migrate", "tcp:a:1", "put an HMP line in quotes"},
		{"--frob", NULL, NULL, "--frob"},
	};
	g_auto(Run) help = {0};

	for (guint i = 0; i < G_N_ELEMENTS(rows); i++) {
		g_auto(Run) run = {0};

		ctl(&run, rows[i].path, rows[i].command, rows[i].file);
		assert_int_equal(run.code, 2);
		assert_contains(run.err, "postroadctl: ");
		assert_contains(run.err, rows[i].error);
	}
	ctl(&help, "--help", NULL, NULL);
	assert_int_equal(help.code, 0);
	assert_contains(help.out, "QMP-PATH COMMAND");
	assert_contains(help.out, "watch");
	assert_true(g_file_test(bench->path, G_FILE_TEST_EXISTS));
}

static void a_missing_engine_is_an_error_with_the_path(void **state)
{
	Bench *bench = *state;
	g_autofree char *missing = g_build_filename(bench->dir, "missing", NULL);
	g_autofree char *stale = g_build_filename(bench->dir, "stale", NULL);
	g_autoptr(GSocketAddress) address = g_unix_socket_address_new(stale);
	GSocket *dead = g_socket_new(G_SOCKET_FAMILY_UNIX, G_SOCKET_TYPE_STREAM, 0, NULL);
	g_auto(Run) first = {0}, second = {0};

	ctl(&first, missing, "info status", NULL);
	assert_int_equal(first.code, 1);
	assert_contains(first.err, missing);
	assert_contains(first.err, "there is no such socket");
	assert_true(g_socket_bind(dead, address, FALSE, NULL));
	g_object_unref(dead);
	ctl(&second, stale, "info status", NULL);
	assert_int_equal(second.code, 1);
	assert_contains(second.err, "no process serves this socket");
	assert_int_equal(g_unlink(stale), 0);
}

static void a_report_is_json_with_all_its_parts(void **state)
{
	static const char *const parts[] = {"version", "migration", "paths", "parameters",
					    "capabilities"};
	Bench *bench = *state;
	g_autofree char *file = g_build_filename(bench->dir, "report.json", NULL);
	g_auto(Run) to_file = {0}, to_stdout = {0}, nowhere = {0};
	g_autofree char *text = NULL;
	g_autoptr(JsonNode) node = NULL;

	fake_set_state(bench->migration, PR_STATE_COMPLETED, NULL);
	ctl(&to_file, bench->path, "report", file);
	assert_int_equal(to_file.code, 0);
	assert_true(g_file_get_contents(file, &text, NULL, NULL));
	node = json_from_string(text, NULL);
	assert_non_null(node);
	for (guint i = 0; i < G_N_ELEMENTS(parts); i++)
		assert_true(json_object_has_member(json_node_get_object(node), parts[i]));
	ctl(&to_stdout, bench->path, "report", "-");
	assert_string_equal(to_stdout.out, text);
	ctl(&nowhere, bench->path, "report", "/nonexistent/report");
	assert_int_equal(nowhere.code, 1);
	assert_contains(nowhere.err, "/nonexistent/report");
	assert_int_equal(g_unlink(file), 0);
}

/* A running `watch`, with its output in a pipe. */
typedef struct Watch {
	GPid pid;
	int out;
	GString *buffer;
} Watch;

static void watch_start(Watch *watch, Bench *bench)
{
	const char *argv[] = {g_getenv("POSTROADCTL"), bench->path, "watch", NULL};

	watch->buffer = g_string_new(NULL);
	assert_true(g_spawn_async_with_pipes(
		NULL, (char **)argv, NULL, G_SPAWN_DO_NOT_REAP_CHILD | G_SPAWN_STDERR_TO_DEV_NULL,
		NULL, NULL, &watch->pid, NULL, &watch->out, NULL, NULL));
}

/* Reads lines until one starts with this text. Progress lines may come first. */
static void watch_expect(Watch *watch, const char *start)
{
	for (guint i = 0; i < 1000; i++) {
		g_autofree char *line = read_text_line(watch->out, watch->buffer);

		if (!line)
			fail_msg("the watch ended before '%s'", start);
		if (g_str_has_prefix(line, start))
			return;
	}
	fail_msg("no line '%s'", start);
}

/* Reads the output to its end and returns the exit status. */
static int watch_end(Watch *watch)
{
	char *line;
	int status;

	while ((line = read_text_line(watch->out, watch->buffer)))
		g_free(line);
	assert_int_equal(waitpid(watch->pid, &status, 0), watch->pid);
	close(watch->out);
	g_string_free(watch->buffer, TRUE);
	assert_true(WIFEXITED(status));
	return WEXITSTATUS(status);
}

static void watch_continues_through_a_pause_to_completion(void **state)
{
	Bench *bench = *state;
	Watch watch;

	fake_set_state(bench->migration, PR_STATE_POSTCOPY_ACTIVE, "running there");
	watch_start(&watch, bench);
	watch_expect(&watch, "postcopy-active (running there)");
	watch_expect(&watch, "postcopy-active    75.0%     100.0 MB/s  78 faults  0.2 s left");
	fake_set_state(bench->migration, PR_STATE_POSTCOPY_PAUSED, "link down");
	watch_expect(&watch, "postcopy-paused (link down)");
	fake_set_state(bench->migration, PR_STATE_POSTCOPY_RECOVER, NULL);
	watch_expect(&watch, "postcopy-recover");
	fake_set_state(bench->migration, PR_STATE_POSTCOPY_ACTIVE, NULL);
	watch_expect(&watch, "postcopy-active");
	fake_set_state(bench->migration, PR_STATE_COMPLETED, NULL);
	watch_expect(&watch, "completed");
	assert_int_equal(watch_end(&watch), 0);
}

static void watch_of_a_failure_exits_1(void **state)
{
	static const PrState ends[] = {PR_STATE_FAILED, PR_STATE_CANCELLED};
	Bench *bench = *state;

	for (guint i = 0; i < G_N_ELEMENTS(ends); i++) {
		Watch watch;

		fake_set_state(bench->migration, PR_STATE_SETUP, NULL);
		watch_start(&watch, bench);
		watch_expect(&watch, "setup");
		fake_set_state(bench->migration, ends[i], "why");
		watch_expect(&watch, pr_state_name(ends[i]));
		assert_int_equal(watch_end(&watch), 1);
	}
}

#define ON_BENCH(test_) cmocka_unit_test_setup_teardown(test_, bench_setup, bench_teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		ON_BENCH(a_line_prints_its_answer),
		ON_BENCH(a_failed_line_prints_its_error_and_exits_1),
		ON_BENCH(usage_errors_explain_the_usage),
		ON_BENCH(a_missing_engine_is_an_error_with_the_path),
		ON_BENCH(a_report_is_json_with_all_its_parts),
		ON_BENCH(watch_continues_through_a_pause_to_completion),
		ON_BENCH(watch_of_a_failure_exits_1),
	};

	return cmocka_run_group_tests_name("postroadctl", tests, NULL, NULL);
}
