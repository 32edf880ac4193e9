/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Plays a QMP client of the monitor, for the framer, requests and all commands. The first byte is
 * the size of the pieces, the rest is the client's data. Every answer must be valid QMP.
 */
#include <sys/socket.h>

#include "tests/fuzz/fake-migration.h"
#include "tests/fuzz/fuzz.h"

#include "monitor/qmp.c"

static void on_quit(void *opaque)
{
}

static void check_error(JsonObject *error)
{
	g_assert(*json_object_get_string_member(error, "class"));
	g_assert(*json_object_get_string_member(error, "desc"));
}

static void check_answer(const char *line, gsize len)
{
	g_autoptr(JsonParser) parser = json_parser_new();
	JsonObject *answer;
	guint kinds = 0;

	g_assert(g_utf8_validate_len(line, len, NULL));
	g_assert(json_parser_load_from_data(parser, line, len, NULL));
	g_assert(JSON_NODE_HOLDS_OBJECT(json_parser_get_root(parser)));
	answer = json_node_get_object(json_parser_get_root(parser));
	if (json_object_has_member(answer, "error"))
		check_error(json_object_get_object_member(answer, "error"));
	kinds += json_object_has_member(answer, "error");
	kinds += json_object_has_member(answer, "return");
	kinds += json_object_has_member(answer, "event");
	kinds += json_object_has_member(answer, "QMP");
	g_assert(kinds == 1);
}

/* Reads and checks the client's answers. */
static void read_answers(int fd, GString *unread)
{
	char room[16384], *end;
	ssize_t n;

	while ((n = recv(fd, room, sizeof(room), MSG_DONTWAIT)) > 0)
		g_string_append_len(unread, room, n);
	while ((end = memchr(unread->str, '\n', unread->len))) {
		gsize len = end - unread->str;

		g_assert(len && unread->str[len - 1] == '\r');
		check_answer(unread->str, len - 1);
		g_string_erase(unread, 0, len + 1);
	}
}

static void run_client(PrQmpServer *server, FuzzInput *input)
{
	g_autoptr(GString) unread = g_string_new(NULL);
	gsize step = fuzz_u8(input), n;
	int fds[2];

	g_assert(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds) == 0);
	add_client(server, fds[0]);
	while (input->left && server->clients->len) {
		const uint8_t *data = fuzz_take(input, step ? step : input->left, &n);

		on_input((const char *)data, n, server->clients->pdata[0]);
		while (g_main_context_iteration(server->monitor->context,
						server->monitor->async_commands->len > 0))
			;
		read_answers(fds[1], unread);
	}
	g_assert(!unread->len);
	g_ptr_array_set_size(server->clients, 0);
	close(fds[1]);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static GMainContext *context;
	FuzzInput input = {data, size};
	PrParams params;
	PrMigration migration = {0};
	PrQmpServer server = {0};

	if (!context)
		context = g_main_context_new();
	pr_params_init(&params);
	server.monitor = migration.monitor = pr_monitor_new(&params, context, on_quit, NULL);
	server.clients = g_ptr_array_new_with_free_func((GDestroyNotify)client_free);
	pr_monitor_attach(server.monitor, &migration);
	server.monitor->qmp = &server;
	run_client(&server, &input);
	server.monitor->qmp = NULL;
	g_ptr_array_unref(server.clients);
	pr_monitor_free(server.monitor);
	return 0;
}
