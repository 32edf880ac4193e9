/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Sends commands to a running engine: one HMP line, a live view, or a report. */
#include <errno.h>
#include <gio/gio.h>
#include <gio/gunixsocketaddress.h>
#include <json-glib/json-glib.h>
#include <locale.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define EXIT_USAGE	   2
#define GREETING_TIMEOUT_S 5
#define WATCH_TTY_US	   (250 * 1000)	 /* between two updates of `watch` on a terminal */
#define WATCH_PLAIN_US	   (1000 * 1000) /* between two updates elsewhere */

typedef enum CtlError {
	CTL_ERROR_CONNECT,  /* no engine at this path */
	CTL_ERROR_GONE,	    /* the engine closed the connection */
	CTL_ERROR_PROTOCOL, /* the program at this path is not an engine */
	CTL_ERROR_COMMAND,  /* the engine's own error text */
	CTL_ERROR_USAGE,
} CtlError;
#define CTL_ERROR ctl_error_quark()
static G_DEFINE_QUARK(ctl_error, ctl_error)

	typedef struct Ctl Ctl;
typedef void (*OnEvent)(Ctl *ctl, JsonObject *event);

struct Ctl {
	char *path;
	GSocketConnection *connection;
	GDataInputStream *input;
	gint64 last_id;
	OnEvent on_event; /* or NULL */
	gboolean tty;
	gboolean has_events; /* `watch`: events came, so a query need not report state changes */
	char *last_line;     /* `watch`: the last line printed where there is no terminal */
	char *last_state;    /* `watch`: the last state printed */
	gsize width;	     /* of the line on the terminal that the next one overwrites */
};

static void ctl_free(Ctl *ctl)
{
	g_clear_object(&ctl->input);
	g_clear_object(&ctl->connection);
	g_free(ctl->path);
	g_free(ctl->last_line);
	g_free(ctl->last_state);
	g_free(ctl);
}
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Ctl, ctl_free)

/* Returns the next message. One that is not a JSON object is an error. */
static JsonObject *receive(Ctl *ctl, GError **error)
{
	g_autoptr(JsonParser) parser = json_parser_new();
	g_autoptr(GError) local = NULL;
	g_autofree char *line = g_data_input_stream_read_line(ctl->input, NULL, NULL, &local);
	JsonNode *root;

	if (!line && local && g_error_matches(local, G_IO_ERROR, G_IO_ERROR_TIMED_OUT)) {
		g_set_error(error, CTL_ERROR, CTL_ERROR_PROTOCOL,
			    "%s: no answer within %d s; is it the QMP socket of postroad?",
			    ctl->path, GREETING_TIMEOUT_S);
		return NULL;
	}
	if (!line) {
		g_set_error(error, CTL_ERROR, CTL_ERROR_GONE,
			    "%s: the engine closed the connection%s%s", ctl->path,
			    local ? ": " : "", local ? local->message : "");
		return NULL;
	}
	root = json_parser_load_from_data(parser, line, -1, NULL) ? json_parser_get_root(parser)
								  : NULL;
	if (!root || !JSON_NODE_HOLDS_OBJECT(root)) {
		g_set_error(error, CTL_ERROR, CTL_ERROR_PROTOCOL,
			    "%s: the program that serves this socket does not speak QMP; give the "
			    "path of postroad's --qmp",
			    ctl->path);
		return NULL;
	}
	return json_node_dup_object(root);
}

static gboolean send_request(Ctl *ctl, const char *name, JsonObject *args, GError **error)
{
	g_autoptr(JsonNode) node = json_node_new(JSON_NODE_OBJECT);
	g_autoptr(GError) local = NULL;
	g_autofree char *text = NULL, *line = NULL;
	JsonObject *request = json_object_new();
	GOutputStream *output = g_io_stream_get_output_stream(G_IO_STREAM(ctl->connection));

	json_object_set_string_member(request, "execute", name);
	if (args)
		json_object_set_object_member(request, "arguments", json_object_ref(args));
	json_object_set_int_member(request, "id", ++ctl->last_id);
	json_node_take_object(node, request);
	text = json_to_string(node, FALSE);
	line = g_strconcat(text, "\n", NULL);
	if (g_output_stream_write_all(output, line, strlen(line), NULL, NULL, &local))
		return TRUE;
	g_set_error(error, CTL_ERROR, CTL_ERROR_GONE, "%s: the engine closed the connection: %s",
		    ctl->path, local->message);
	return FALSE;
}

static JsonNode *fail_command(JsonObject *reply, GError **error)
{
	JsonNode *body = json_object_get_member(reply, "error");
	const char *text = "the engine sent an answer without a result";

	if (body && JSON_NODE_HOLDS_OBJECT(body))
		text = json_object_get_string_member_with_default(json_node_get_object(body),
								  "desc", text);
	g_set_error_literal(error, CTL_ERROR, CTL_ERROR_COMMAND, text);
	return NULL;
}

/* Sends a command and waits for its answer. Passes the events that come first to on_event. */
static JsonNode *execute(Ctl *ctl, const char *name, JsonObject *args, GError **error)
{
	if (!send_request(ctl, name, args, error))
		return NULL;
	for (;;) {
		g_autoptr(JsonObject) reply = receive(ctl, error);

		if (!reply)
			return NULL;
		if (json_object_has_member(reply, "event")) {
			if (ctl->on_event)
				ctl->on_event(ctl, reply);
			continue;
		}
		if (json_object_get_int_member_with_default(reply, "id", 0) != ctl->last_id)
			continue;
		if (!json_object_has_member(reply, "return"))
			return fail_command(reply, error);
		return json_object_dup_member(reply, "return");
	}
}

static GSocketConnection *connect_to(const char *path, GError **error)
{
	g_autoptr(GSocketClient) client = g_socket_client_new();
	g_autoptr(GSocketAddress) address = g_unix_socket_address_new(path);
	g_autoptr(GError) local = NULL;
	GSocketConnection *connection;

	connection = g_socket_client_connect(client, G_SOCKET_CONNECTABLE(address), NULL, &local);
	if (connection)
		return connection;
	if (g_error_matches(local, G_IO_ERROR, G_IO_ERROR_NOT_FOUND))
		g_set_error(error, CTL_ERROR, CTL_ERROR_CONNECT,
			    "%s: there is no such socket; is postroad running with --qmp %s?", path,
			    path);
	else if (g_error_matches(local, G_IO_ERROR, G_IO_ERROR_CONNECTION_REFUSED))
		g_set_error(error, CTL_ERROR, CTL_ERROR_CONNECT,
			    "%s: no process serves this socket; is postroad running?", path);
	else
		g_set_error(error, CTL_ERROR, CTL_ERROR_CONNECT, "%s: %s", path, local->message);
	return NULL;
}

static Ctl *ctl_new(const char *path, GError **error)
{
	g_autoptr(Ctl) ctl = g_new0(Ctl, 1);
	g_autoptr(JsonObject) greeting = NULL;
	g_autoptr(JsonNode) result = NULL;
	GSocket *socket;

	ctl->path = g_strdup(path);
	ctl->connection = connect_to(path, error);
	if (!ctl->connection)
		return NULL;
	socket = g_socket_connection_get_socket(ctl->connection);
	g_socket_set_timeout(socket, GREETING_TIMEOUT_S);
	ctl->input =
		g_data_input_stream_new(g_io_stream_get_input_stream(G_IO_STREAM(ctl->connection)));
	g_data_input_stream_set_newline_type(ctl->input, G_DATA_STREAM_NEWLINE_TYPE_ANY);
	greeting = receive(ctl, error);
	if (!greeting)
		return NULL;
	if (json_object_has_member(greeting, "error")) {
		fail_command(greeting, error);
		g_prefix_error(error, "%s: ", path);
		return NULL;
	}
	if (!json_object_has_member(greeting, "QMP")) {
		g_set_error(error, CTL_ERROR, CTL_ERROR_PROTOCOL,
			    "%s: the program that serves this socket does not speak QMP; give the "
			    "path of postroad's --qmp",
			    path);
		return NULL;
	}
	result = execute(ctl, "qmp_capabilities", NULL, error);
	if (!result)
		return NULL;
	/* A command may wait for the end of the migration. */
	g_socket_set_timeout(socket, 0);
	return g_steal_pointer(&ctl);
}

static gboolean run_line(Ctl *ctl, const char *line, GError **error)
{
	g_autoptr(JsonObject) args = json_object_new();
	g_autoptr(JsonNode) result = NULL;

	json_object_set_string_member(args, "command-line", line);
	result = execute(ctl, "x-postroad-hmp", args, error);
	if (!result)
		return FALSE;
	if (json_node_get_value_type(result) == G_TYPE_STRING)
		fputs(json_node_get_string(result), stdout);
	return TRUE;
}

static gint64 int_of(JsonObject *object, const char *name)
{
	return object ? json_object_get_int_member_with_default(object, name, 0) : 0;
}

static JsonObject *object_of(JsonObject *object, const char *name)
{
	JsonNode *node = json_object_get_member(object, name);

	return node && JSON_NODE_HOLDS_OBJECT(node) ? json_node_get_object(node) : NULL;
}

static char *format_progress(JsonObject *info)
{
	JsonObject *ram = object_of(info, "ram"), *extras = object_of(info, "postroad");
	gint64 total = int_of(ram, "total"), remaining = int_of(ram, "remaining");
	gint64 left_ms = int_of(extras, "expected-ms");
	double mbps = ram ? json_object_get_double_member_with_default(ram, "mbps", 0) : 0;
	const char *status = json_object_get_string_member_with_default(info, "status", "none");
	g_autofree char *left = NULL;

	if (!ram)
		return g_strdup_printf("%-17s no migration yet", status);
	left = left_ms ? g_strdup_printf("%.1f s", left_ms / 1000.0) : g_strdup("?");
	return g_strdup_printf("%-17s %5.1f%%  %8.1f MB/s  %" G_GINT64_FORMAT " faults  %s left",
			       status, total ? 100.0 * (total - remaining) / total : 0.0, mbps / 8,
			       int_of(extras, "faults") ? int_of(extras, "faults")
							: int_of(ram, "postcopy-requests"),
			       remaining ? left : "0 s");
}

static void show_progress(Ctl *ctl, const char *line)
{
	if (ctl->tty) {
		gsize width = strlen(line);

		printf("\r%s%*s", line, (int)(ctl->width > width ? ctl->width - width : 0), "");
		ctl->width = width;
	} else if (g_strcmp0(line, ctl->last_line)) {
		printf("%s\n", line);
		g_free(ctl->last_line);
		ctl->last_line = g_strdup(line);
	}
	fflush(stdout);
}

/* Prints a new state with its reason. The line stays on the terminal. */
static void show_state(Ctl *ctl, const char *status, const char *reason)
{
	if (!g_strcmp0(status, ctl->last_state))
		return;
	if (ctl->tty)
		printf("\r%*s\r", (int)ctl->width, "");
	ctl->width = 0;
	printf("%s%s%s%s\n", status, reason ? " (" : "", reason ? reason : "", reason ? ")" : "");
	fflush(stdout);
	g_free(ctl->last_state);
	ctl->last_state = g_strdup(status);
}

static void on_watch_event(Ctl *ctl, JsonObject *event)
{
	JsonObject *data = object_of(event, "data");

	if (g_strcmp0(json_object_get_string_member_with_default(event, "event", NULL),
		      "MIGRATION") ||
	    !data)
		return;
	ctl->has_events = TRUE;
	show_state(ctl, json_object_get_string_member_with_default(data, "status", "?"),
		   json_object_get_string_member_with_default(data, "reason", NULL));
}

/* Handles events until the next update is due. */
static gboolean handle_events(Ctl *ctl, GError **error)
{
	GSocket *socket = g_socket_connection_get_socket(ctl->connection);
	gint64 until = g_get_monotonic_time() + (ctl->tty ? WATCH_TTY_US : WATCH_PLAIN_US);

	for (;;) {
		g_autoptr(JsonObject) event = NULL;
		gint64 left = until - g_get_monotonic_time();

		if (left <= 0)
			return TRUE;
		if (!g_buffered_input_stream_get_available(G_BUFFERED_INPUT_STREAM(ctl->input)) &&
		    !g_socket_condition_timed_wait(socket, G_IO_IN, left, NULL, NULL))
			return TRUE;
		event = receive(ctl, error);
		if (!event)
			return FALSE;
		on_watch_event(ctl, event);
	}
}

static gboolean is_final(const char *status)
{
	return !strcmp(status, "completed") || !strcmp(status, "failed") ||
	       !strcmp(status, "cancelled");
}

static void fail_migration(JsonObject *info, const char *status, GError **error)
{
	const char *why = json_object_get_string_member_with_default(info, "error-desc", NULL);

	g_set_error(error, CTL_ERROR, CTL_ERROR_COMMAND, "the migration has %s%s%s",
		    !strcmp(status, "failed") ? "failed" : "been cancelled", why ? ": " : "",
		    why ? why : "");
}

/* Prints the state and progress. Returns TRUE at the end; *ret_ok: the migration has completed. */
static gboolean update(Ctl *ctl, gboolean *ret_ok, GError **error)
{
	g_autoptr(JsonNode) result = execute(ctl, "query-migrate", NULL, error);
	g_autofree char *line = NULL;
	JsonObject *info, *extras;
	const char *status, *reason;

	*ret_ok = FALSE;
	if (!result)
		return TRUE;
	if (!JSON_NODE_HOLDS_OBJECT(result)) {
		g_set_error(
			error, CTL_ERROR, CTL_ERROR_PROTOCOL,
			"%s: the program that serves this socket is not postroad; give the path "
			"of postroad's --qmp",
			ctl->path);
		return TRUE;
	}
	info = json_node_get_object(result);
	extras = object_of(info, "postroad");
	status = json_object_get_string_member_with_default(info, "status", "none");
	reason = extras ? json_object_get_string_member_with_default(extras, "reason", NULL) : NULL;
	if (!ctl->has_events || is_final(status))
		show_state(ctl, status, reason);
	line = format_progress(info);
	show_progress(ctl, line);
	*ret_ok = !strcmp(status, "completed");
	if (is_final(status) && !*ret_ok)
		fail_migration(info, status, error);
	return is_final(status);
}

static gboolean watch(Ctl *ctl, GError **error)
{
	gboolean ok = FALSE;

	ctl->tty = isatty(STDOUT_FILENO);
	ctl->on_event = on_watch_event;
	while (!update(ctl, &ok, error))
		if (!handle_events(ctl, error))
			break;
	if (ctl->tty)
		printf("\n");
	return ok;
}

static gboolean write_report(const char *file, JsonNode *report, GError **error)
{
	g_autofree char *text = json_to_string(report, TRUE);
	g_autofree char *whole = g_strconcat(text, "\n", NULL);

	if (strcmp(file, "-"))
		return g_file_set_contents(file, whole, -1, error);
	fputs(whole, stdout);
	return TRUE;
}

static gboolean report(Ctl *ctl, const char *file, GError **error)
{
	static const struct {
		const char *member, *command;
	} parts[] = {
		{"version", "query-version"},
		{"migration", "query-migrate"},
		{"paths", "query-paths"},
		{"parameters", "query-migrate-parameters"},
		{"capabilities", "query-migrate-capabilities"},
	};
	g_autoptr(JsonNode) node = json_node_new(JSON_NODE_OBJECT);
	JsonObject *object = json_object_new();

	json_node_take_object(node, object);
	for (guint i = 0; i < G_N_ELEMENTS(parts); i++) {
		JsonNode *result = execute(ctl, parts[i].command, NULL, error);

		if (!result)
			return FALSE;
		json_object_set_member(object, parts[i].member, result);
	}
	return write_report(file, node, error);
}

static const char description[] =
	"QMP-PATH is the socket of postroad's option --qmp. COMMAND is one of\n"
	"  'HMP LINE'    run this HMP line, in quotes, and print its answer; 'help' lists the\n"
	"                commands. 'migrate' without -d waits until the migration has completed,\n"
	"                failed or paused\n"
	"  watch         show the progress until the migration has completed, failed or been\n"
	"                cancelled; a pause does not end it\n"
	"  report FILE   write the state, paths and parameters as JSON; FILE - is standard output\n"
	"\n"
	"Exit status: 0: success; 1: the command or the migration failed, or no engine answered;\n"
	"2: usage error.\n"
	"\n"
	"Examples:\n"
	"  postroadctl /run/vm/pr.sock 'migrate -d ofi:10.0.1.2:4444,ofi:10.0.2.2:4444'\n"
	"  postroadctl /run/vm/pr.sock watch\n"
	"  postroadctl /run/vm/pr.sock 'migrate -r -d ofi:10.0.2.2:4444'\n";

static gboolean parse_options(int *argc, char ***argv, gboolean *ret_version, GError **error)
{
	const GOptionEntry entries[] = {
		{"version", 'v', 0, G_OPTION_ARG_NONE, ret_version, "show the version", NULL},
		{NULL},
	};
	g_autoptr(GOptionContext) context = g_option_context_new("QMP-PATH COMMAND [FILE]");

	g_option_context_set_summary(context, "Sends commands to a running postroad.");
	g_option_context_set_description(context, description);
	g_option_context_add_main_entries(context, entries, NULL);
	return g_option_context_parse(context, argc, argv, error);
}

static gboolean check_arguments(int argc, char **argv, GError **error)
{
	gboolean is_report = argc > 2 && !strcmp(argv[2], "report");

	if (argc < 3)
		g_set_error(error, CTL_ERROR, CTL_ERROR_USAGE, "expected QMP-PATH and COMMAND");
	else if (is_report && argc < 4)
		g_set_error(error, CTL_ERROR, CTL_ERROR_USAGE,
			    "report: expected a file name, or - for standard output");
	else if (argc > 3 + is_report)
		g_set_error(error, CTL_ERROR, CTL_ERROR_USAGE,
			    "unexpected argument '%s'; put an HMP line in quotes",
			    argv[3 + is_report]);
	else
		return TRUE;
	return FALSE;
}

static gboolean run(char **argv, GError **error)
{
	g_autoptr(Ctl) ctl = ctl_new(argv[1], error);

	if (!ctl)
		return FALSE;
	if (!strcmp(argv[2], "watch"))
		return watch(ctl, error);
	if (!strcmp(argv[2], "report"))
		return report(ctl, argv[3], error);
	return run_line(ctl, argv[2], error);
}

int main(int argc, char **argv)
{
	g_autoptr(GError) error = NULL;
	gboolean version = FALSE;

	setlocale(LC_CTYPE, "");
	signal(SIGPIPE, SIG_IGN);
	if (!parse_options(&argc, &argv, &version, &error) ||
	    (!version && !check_arguments(argc, argv, &error))) {
		fprintf(stderr, "postroadctl: %s; see postroadctl --help\n", error->message);
		return EXIT_USAGE;
	}
	if (version) {
		printf("postroadctl %s\n", PR_VERSION);
		return 0;
	}
	if (run(argv, &error))
		return 0;
	fflush(stdout);
	fprintf(stderr, "postroadctl: %s\n", error->message);
	return 1;
}
