/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Plays an operator at the monitor's terminal. The first byte is the size of the pieces, the rest
 * is the typed text. When a command waits, the migration is made to complete.
 */
#include <sys/socket.h>
#include <unistd.h>

#include "tests/fuzz/fake-migration.h"
#include "tests/fuzz/fuzz.h"

#include "monitor/hmp.c"

static void on_quit(void *opaque)
{
}

/* A parsed command is in the table, and its arguments are valid. */
static void check_line(const char *line)
{
	g_autoptr(JsonObject) args = NULL;
	g_autoptr(GError) error = NULL;
	const PrCommand *command = NULL;
	gboolean ok = pr_hmp_parse(line, &command, &args, &error);

	fuzz_outcome(ok, error);
	if (ok && command)
		g_assert(command->hmp && pr_command_check(command, args, NULL));
}

static void check_lines(const FuzzInput *input)
{
	FuzzInput copy = *input;
	char *line;

	while ((line = fuzz_line(&copy))) {
		check_line(line);
		g_free(line);
	}
}

static void run_loop(PrMonitor *monitor, int fd)
{
	char room[16384];

	while (g_main_context_iteration(monitor->context, monitor->async_commands->len > 0))
		;
	while (recv(fd, room, sizeof(room), MSG_DONTWAIT) > 0)
		;
}

static void end_wait(PrHmpSession *session, PrMigration *migration, int fd)
{
	while (session->wait) {
		fake_migration_set(migration, PR_STATE_ACTIVE);
		fake_migration_set(migration, PR_STATE_COMPLETED);
		run_loop(session->monitor, fd);
	}
}

static void run_session(PrMonitor *monitor, PrMigration *migration, FuzzInput *input)
{
	gsize step = fuzz_u8(input), n;
	PrHmpSession *session;
	int fds[2];

	check_lines(input);
	g_assert(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds) == 0);
	session = pr_hmp_session_new(monitor, fds[0], fds[0], TRUE);
	while (input->left) {
		const uint8_t *data = fuzz_take(input, step ? step : input->left, &n);

		on_input((const char *)data, n, session);
		run_loop(monitor, fds[1]);
		end_wait(session, migration, fds[1]);
	}
	pr_hmp_session_free(session);
	close(fds[1]);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static GMainContext *context;
	FuzzInput input = {data, size};
	PrParams params;
	PrMigration migration = {0};
	PrMonitor *monitor;

	if (!context)
		context = g_main_context_new();
	pr_params_init(&params);
	monitor = migration.monitor = pr_monitor_new(&params, context, on_quit, NULL);
	pr_monitor_attach(monitor, &migration);
	run_session(monitor, &migration, &input);
	pr_monitor_free(monitor);
	return 0;
}
