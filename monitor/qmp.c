/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The QMP server speaks QEMU's protocol, so that QEMU's own clients can drive the engine. Commands
 * run in the order of their arrival, and most are answered at once. Two kinds are answered later.
 * An HMP `migrate` without -d delays no other command; the answer carries its id. An asynchronous
 * command (async-command.h) delays the next commands of its client, whose answers keep their order,
 * but no other client's.
 */
#include <errno.h>
#include <gio/gio.h>
#include <gio/gunixsocketaddress.h>
#include <glib/gstdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "monitor/async-command.h"
#include "monitor/commands.h"
#include "monitor/hmp.h"
#include "monitor/internal.h"
#include "monitor/json.h"
#include "monitor/qmp.h"
#include "monitor/stream.h"
#include "util/json-framer.h"

#define MAX_CLIENTS	64 /* each may hold 1 MiB of a message and 1 MiB of answers in memory */
#define BACKLOG		16
#define ACCEPT_RETRY_MS 100 /* until accept() is tried again after it found no free descriptor */

/* Owned by the thread of the main context, like its clients. */
struct PrQmpServer {
	PrMonitor *monitor;
	char *path;
	GSocket *socket;
	GSource *source;	 /* accepts clients; NULL: accepting is paused */
	GSource *retry;		 /* ends the pause; NULL: accepting is not paused */
	gboolean short_of_files; /* the lack of descriptors was logged */
	dev_t device;		 /* with inode: of the socket file, so that no other's is removed */
	ino_t inode;
	GPtrArray *clients;
};

typedef struct QmpClient {
	PrQmpServer *server;
	PrStream *stream;
	PrFramer framer;
	gboolean negotiated;
	GPtrArray *pending;	  /* Pending: commands not answered yet */
	struct Pending *blocking; /* the one that the next commands wait for, or NULL */
	GQueue requests;	  /* JsonObject: requests read meanwhile, oldest first */
} QmpClient;

/* A command that is answered later, or one that carries an HMP line. */
typedef struct Pending {
	QmpClient *client;
	JsonNode *id;	 /* or NULL */
	gboolean strict; /* a failed HMP line is a QMP error */
	PrWait *wait;
} Pending;

static void pending_free(Pending *pending)
{
	if (pending->wait)
		pr_monitor_unwait(pending->wait);
	g_clear_pointer(&pending->id, json_node_unref);
	g_free(pending);
}

/* Takes the object. */
static void send_object(QmpClient *client, JsonObject *object)
{
	g_autoptr(JsonNode) node = pr_json_object(object);
	g_autofree char *text = json_to_string(node, FALSE);
	g_autofree char *line = g_strconcat(text, "\r\n", NULL);

	pr_stream_write(client->stream, line, strlen(line));
}

static void add_id(JsonObject *object, JsonNode *id)
{
	if (id)
		json_object_set_member(object, "id", json_node_copy(id));
}

/* Takes the result. */
static void send_return(QmpClient *client, JsonNode *result, JsonNode *id)
{
	JsonObject *object = json_object_new();

	json_object_set_member(object, "return", result);
	add_id(object, id);
	send_object(client, object);
}

static void send_error(QmpClient *client, const GError *error, JsonNode *id)
{
	JsonObject *object = json_object_new(), *body = json_object_new();
	gboolean unknown = g_error_matches(error, PR_COMMAND_ERROR, PR_COMMAND_ERROR_NOT_FOUND);
	/* The JSON parser's errors quote its input, which may be invalid UTF-8. */
	g_autofree char *desc = g_utf8_make_valid(error->message, -1);

	json_object_set_string_member(body, "class", unknown ? "CommandNotFound" : "GenericError");
	json_object_set_string_member(body, "desc", desc);
	json_object_set_object_member(object, "error", body);
	add_id(object, id);
	send_object(client, object);
}

static void send_greeting(QmpClient *client)
{
	JsonObject *object = json_object_new(), *qmp = json_object_new();
	JsonArray *capabilities = json_array_new();

	json_array_add_string_element(capabilities, "oob");
	json_object_set_member(qmp, "version", pr_command_version());
	json_object_set_array_member(qmp, "capabilities", capabilities);
	json_object_set_object_member(object, "QMP", qmp);
	send_object(client, object);
}

/* QEMU's monitor ends its lines with CR LF. */
static char *terminal_lines(const char *text)
{
	g_auto(GStrv) lines = g_strsplit(text, "\n", -1);

	return g_strjoinv("\r\n", lines);
}

static void serve_request(QmpClient *client, JsonObject *request);

static Pending *pending_new(QmpClient *client, JsonNode *id)
{
	Pending *pending = g_new0(Pending, 1);

	pending->client = client;
	pending->id = id ? json_node_copy(id) : NULL;
	g_ptr_array_add(client->pending, pending);
	return pending;
}

/* The command is answered later, by this wait. */
static void pending_start(Pending *pending, PrWait *wait)
{
	pending->wait = wait;
	if (!wait->async)
		return;
	pending->client->blocking = pending;
	pr_stream_set_reading(pending->client->stream, FALSE);
}

/* Call it after the answer. Runs the requests that waited for it. */
static void pending_end(Pending *pending)
{
	QmpClient *client = pending->client;
	gboolean blocked = client->blocking == pending;

	pending->wait = NULL;
	g_ptr_array_remove(client->pending, pending);
	if (!blocked)
		return;
	client->blocking = NULL;
	while (!client->blocking && !g_queue_is_empty(&client->requests)) {
		g_autoptr(JsonObject) request = g_queue_pop_head(&client->requests);

		serve_request(client, request);
	}
	if (!client->blocking)
		pr_stream_set_reading(client->stream, TRUE);
}

static void on_hmp_answer(const char *text, const GError *error, void *opaque)
{
	Pending *pending = opaque;
	QmpClient *client = pending->client;
	g_autofree char *error_text = error ? g_strdup_printf("Error: %s\n", error->message) : NULL;
	g_autofree char *shown = NULL;

	if (error && pending->strict) {
		g_autoptr(GError) plain = g_error_new_literal(
			PR_COMMAND_ERROR, PR_COMMAND_ERROR_REFUSED, error->message);

		send_error(client, plain, pending->id);
	} else {
		shown = pending->strict ? g_strdup(text)
					: terminal_lines(error ? error_text : text);
		send_return(client, pr_json_string(shown), pending->id);
	}
	pending_end(pending);
}

static void run_hmp_line(QmpClient *client, JsonObject *args, gboolean strict, JsonNode *id)
{
	Pending *pending = pending_new(client, id);
	PrWait *wait;

	pending->strict = strict;
	wait = pr_hmp_run(client->server->monitor,
			  json_object_get_string_member(args, "command-line"), on_hmp_answer,
			  pending);
	if (wait)
		pending_start(pending, wait);
}

static void on_async_answer(const char *text, const GError *error, void *opaque)
{
	Pending *pending = opaque;

	if (error)
		send_error(pending->client, error, pending->id);
	else
		send_return(pending->client, pr_json_object(json_object_new()), pending->id);
	pending_end(pending);
}

static void run_async(QmpClient *client, const PrCommand *command, JsonObject *args, JsonNode *id)
{
	Pending *pending = pending_new(client, id);
	g_autoptr(GError) error = NULL;
	PrWait *wait = pr_async_command_start(client->server->monitor, command, args,
					      on_async_answer, pending, &error);

	if (wait)
		pending_start(pending, wait);
	else
		on_async_answer(NULL, error, pending);
}

/* The error texts are QEMU's, which clients know. */
static JsonNode *negotiate(QmpClient *client, JsonObject *args, GError **error)
{
	JsonNode *enable = json_object_get_member(args, "enable");
	JsonArray *array = enable ? json_node_get_array(enable) : NULL;

	if (client->negotiated) {
		g_set_error(error, PR_COMMAND_ERROR, PR_COMMAND_ERROR_NOT_FOUND,
			    "Capabilities negotiation is already complete, command ignored");
		return NULL;
	}
	for (guint i = 0; array && i < json_array_get_length(array); i++) {
		JsonNode *name = json_array_get_element(array, i);

		if (json_node_get_value_type(name) != G_TYPE_STRING) {
			g_set_error(error, PR_COMMAND_ERROR, PR_COMMAND_ERROR_ARGUMENTS,
				    "Invalid parameter type for 'enable', expected: array of "
				    "strings");
			return NULL;
		}
		if (g_strcmp0(json_node_get_string(name), "oob")) {
			g_set_error(error, PR_COMMAND_ERROR, PR_COMMAND_ERROR_ARGUMENTS,
				    "Parameter 'enable' does not accept value '%s'; expected: oob",
				    json_node_get_string(name));
			return NULL;
		}
	}
	client->negotiated = TRUE;
	return pr_json_object(json_object_new());
}

static gboolean check_negotiated(QmpClient *client, const PrCommand *command, GError **error)
{
	if (client->negotiated || command->kind == PR_COMMAND_NEGOTIATE)
		return TRUE;
	g_set_error(error, PR_COMMAND_ERROR, PR_COMMAND_ERROR_NOT_FOUND,
		    "Expecting capabilities negotiation with 'qmp_capabilities'");
	return FALSE;
}

static void run_command(QmpClient *client, const char *name, JsonObject *args, JsonNode *id)
{
	PrMonitor *monitor = client->server->monitor;
	g_autoptr(GError) error = NULL;
	const PrCommand *command = pr_command_find_qmp(name, &error);
	JsonNode *result = NULL;

	if (!command || !check_negotiated(client, command, &error) ||
	    !pr_command_check(command, args, &error)) {
		send_error(client, error, id);
		return;
	}
	switch (command->kind) {
	case PR_COMMAND_PLAIN:
		if (command->listen) {
			run_async(client, command, args, id);
			return;
		}
		result = pr_command_run(monitor, command, args, &error);
		break;
	case PR_COMMAND_NEGOTIATE:
		result = negotiate(client, args, &error);
		break;
	case PR_COMMAND_HMP_TEXT:
	case PR_COMMAND_HMP_STRICT:
		run_hmp_line(client, args, command->kind == PR_COMMAND_HMP_STRICT, id);
		return;
	}
	if (result)
		send_return(client, result, id);
	else
		send_error(client, error, id);
}

/* A request has the known members only, each of its type. */
static gboolean check_request(JsonObject *request, const char **ret_name, JsonNode **ret_args,
			      GError **error)
{
	g_autoptr(GList) names = json_object_get_members(request);
	JsonNode *execute = json_object_get_member(request, "execute");
	JsonNode *oob = json_object_get_member(request, "exec-oob");
	JsonNode *args = json_object_get_member(request, "arguments");
	const char *wrong = NULL;

	for (GList *i = names; i; i = i->next)
		if (strcmp(i->data, "execute") && strcmp(i->data, "exec-oob") &&
		    strcmp(i->data, "arguments") && strcmp(i->data, "id"))
			wrong = i->data;
	if (wrong || (execute && oob))
		g_set_error(error, PR_COMMAND_ERROR, PR_COMMAND_ERROR_ARGUMENTS,
			    "QMP input member '%s' is unexpected", wrong ? wrong : "exec-oob");
	else if (!execute && !oob)
		g_set_error(error, PR_COMMAND_ERROR, PR_COMMAND_ERROR_ARGUMENTS,
			    "QMP input lacks member 'execute'");
	else if (json_node_get_value_type(execute ? execute : oob) != G_TYPE_STRING)
		g_set_error(error, PR_COMMAND_ERROR, PR_COMMAND_ERROR_ARGUMENTS,
			    "QMP input member '%s' must be a string",
			    execute ? "execute" : "exec-oob");
	else if (args && !JSON_NODE_HOLDS_OBJECT(args))
		g_set_error(error, PR_COMMAND_ERROR, PR_COMMAND_ERROR_ARGUMENTS,
			    "QMP input member 'arguments' must be an object");
	else
		*ret_name = json_node_get_string(execute ? execute : oob);
	*ret_args = args;
	return *ret_name != NULL;
}

static void serve_request(QmpClient *client, JsonObject *request)
{
	JsonNode *id = json_object_get_member(request, "id");
	g_autoptr(JsonObject) no_args = json_object_new();
	g_autoptr(GError) error = NULL;
	const char *name = NULL;
	JsonNode *args;

	if (!check_request(request, &name, &args, &error))
		send_error(client, error, id);
	else
		run_command(client, name, args ? json_node_get_object(args) : no_args, id);
}

/* An escape may name half of a surrogate pair. The parser turns it into invalid UTF-8, which must
 * not be sent back in an answer. */
static gboolean is_utf8(JsonNode *root)
{
	g_autofree char *text = json_to_string(root, FALSE);

	return g_utf8_validate(text, -1, NULL);
}

/* json-glib writes some large numbers, such as 1e22, as text that is not JSON. */
static gboolean can_be_echoed(JsonNode *id)
{
	g_autofree char *text = json_to_string(id, FALSE);
	g_autoptr(JsonNode) again = json_from_string(text, NULL);

	return again != NULL;
}

static void on_message(const char *message, gsize len, const char *fault, void *opaque)
{
	QmpClient *client = opaque;
	g_autoptr(JsonParser) parser = json_parser_new();
	g_autoptr(GError) error = NULL, parse_error = NULL;
	JsonNode *root, *id = NULL;

	if (fault)
		error = g_error_new(PR_COMMAND_ERROR, PR_COMMAND_ERROR_ARGUMENTS,
				    "QMP input refused: %s", fault);
	else if (!json_parser_load_from_data(parser, message, len, &parse_error))
		error = g_error_new(PR_COMMAND_ERROR, PR_COMMAND_ERROR_ARGUMENTS,
				    "JSON parse error, %s", parse_error->message);
	root = error ? NULL : json_parser_get_root(parser);
	if (!error && (!root || !JSON_NODE_HOLDS_OBJECT(root)))
		error = g_error_new(PR_COMMAND_ERROR, PR_COMMAND_ERROR_ARGUMENTS,
				    "QMP input must be a JSON object");
	if (!error && !is_utf8(root))
		error = g_error_new(
			PR_COMMAND_ERROR, PR_COMMAND_ERROR_ARGUMENTS,
			"QMP input refused: an escape (\\u…) in it does not encode a character");
	if (!error)
		id = json_object_get_member(json_node_get_object(root), "id");
	if (id && !can_be_echoed(id))
		error = g_error_new(PR_COMMAND_ERROR, PR_COMMAND_ERROR_ARGUMENTS,
				    "QMP input member 'id' can't be sent back: a number in it is "
				    "too large; use a smaller one");
	if (error)
		send_error(client, error, NULL);
	else if (client->blocking)
		g_queue_push_tail(&client->requests, json_object_ref(json_node_get_object(root)));
	else
		serve_request(client, json_node_get_object(root));
}

static void on_input(const char *data, gsize len, void *opaque)
{
	QmpClient *client = opaque;

	pr_framer_feed(&client->framer, data, len, on_message, client);
}

static void on_closed(const char *why, void *opaque)
{
	QmpClient *client = opaque;

	if (why)
		g_warning("QMP: disconnected a client: %s", why);
	g_ptr_array_remove(client->server->clients, client);
}

static void client_free(QmpClient *client)
{
	g_ptr_array_unref(client->pending);
	g_queue_clear_full(&client->requests, (GDestroyNotify)json_object_unref);
	pr_framer_clear(&client->framer);
	pr_stream_free(client->stream);
	g_free(client);
}

/* Takes the descriptor. */
static void add_client(PrQmpServer *server, int fd)
{
	QmpClient *client = g_new0(QmpClient, 1);

	client->server = server;
	client->pending = g_ptr_array_new_with_free_func((GDestroyNotify)pending_free);
	g_queue_init(&client->requests);
	pr_framer_init(&client->framer, PR_FRAMER_LINES);
	client->stream =
		pr_stream_new(server->monitor->context, fd, fd, on_input, on_closed, client);
	g_ptr_array_add(server->clients, client);
	send_greeting(client);
}

/* Returns why this client is refused; NULL: it is accepted. The socket file's mode normally
 * keeps other users out. This check catches a mode that was widened and descriptors that were
 * passed on. */
static char *check_client(PrQmpServer *server, int fd)
{
	struct ucred peer;
	socklen_t length = sizeof(peer);

	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) < 0)
		return g_strdup_printf("its user can't be determined: %s", g_strerror(errno));
	if (peer.uid != 0 && peer.uid != geteuid())
		return g_strdup_printf("it runs as user %u; this monitor serves root and user %u "
				       "only",
				       peer.uid, geteuid());
	if (server->clients->len >= MAX_CLIENTS)
		return g_strdup_printf("there are %u clients already; close one of them",
				       server->clients->len);
	return NULL;
}

/* Takes the descriptor. The error fits into the buffer of a new socket. */
static void refuse_client(int fd, const char *why)
{
	JsonObject *object = json_object_new(), *body = json_object_new();
	g_autoptr(JsonNode) node = pr_json_object(object);
	g_autofree char *desc = g_strdup_printf("connection refused: %s", why);
	g_autofree char *text = NULL, *line = NULL;

	json_object_set_string_member(body, "class", "GenericError");
	json_object_set_string_member(body, "desc", desc);
	json_object_set_object_member(object, "error", body);
	text = json_to_string(node, FALSE);
	line = g_strconcat(text, "\r\n", NULL);
	(void)send(fd, line, strlen(line), MSG_NOSIGNAL | MSG_DONTWAIT);
	close(fd);
	g_warning("QMP: refused a client: %s", why);
}

static void start_accepting(PrQmpServer *server);

static gboolean on_retry(gpointer opaque)
{
	PrQmpServer *server = opaque;

	g_clear_pointer(&server->retry, g_source_unref);
	start_accepting(server);
	return G_SOURCE_REMOVE;
}

/* There is no free descriptor. The pending client would make the main loop spin, so accepting
 * pauses. */
static void pause_accepting(PrQmpServer *server)
{
	if (!server->short_of_files)
		g_warning("QMP: can't accept a client: %s; raise the engine's limit of open files "
			  "(ulimit -n)",
			  g_strerror(errno));
	server->short_of_files = TRUE;
	g_source_destroy(server->source);
	g_clear_pointer(&server->source, g_source_unref);
	server->retry = g_timeout_source_new(ACCEPT_RETRY_MS);
	g_source_set_callback(server->retry, on_retry, server, NULL);
	g_source_attach(server->retry, server->monitor->context);
}

static gboolean on_connection(GSocket *socket, GIOCondition condition, gpointer opaque)
{
	PrQmpServer *server = opaque;
	int fd = accept4(g_socket_get_fd(socket), NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	g_autofree char *refusal = NULL;

	if (fd < 0) {
		if (errno == EMFILE || errno == ENFILE)
			pause_accepting(server);
		return G_SOURCE_CONTINUE;
	}
	server->short_of_files = FALSE;
	refusal = check_client(server, fd);
	if (refusal)
		refuse_client(fd, refusal);
	else
		add_client(server, fd);
	return G_SOURCE_CONTINUE;
}

static void start_accepting(PrQmpServer *server)
{
	server->source = g_socket_create_source(server->socket, G_IO_IN, NULL);
	g_source_set_callback(server->source, G_SOURCE_FUNC(on_connection), server, NULL);
	g_source_attach(server->source, server->monitor->context);
}

static void set_socket_error(const char *path, const char *what, GError **error)
{
	g_set_error(error, PR_MONITOR_ERROR, PR_MONITOR_ERROR_SOCKET, "QMP socket '%s': %s", path,
		    what);
}

/* Removes the socket file of a process that has ended. */
static gboolean remove_stale_socket(const char *path, GSocketAddress *address, GError **error)
{
	g_autoptr(GSocket) probe = NULL;
	g_autoptr(GError) local = NULL;
	GStatBuf st;

	if (g_lstat(path, &st) < 0)
		return TRUE;
	if (!S_ISSOCK(st.st_mode)) {
		set_socket_error(path,
				 "the path names a file that is not a socket; give another path",
				 error);
		return FALSE;
	}
	probe = g_socket_new(G_SOCKET_FAMILY_UNIX, G_SOCKET_TYPE_STREAM, 0, error);
	if (!probe)
		return FALSE;
	g_socket_set_blocking(probe, FALSE);
	if (g_socket_connect(probe, address, NULL, &local) ||
	    !g_error_matches(local, G_IO_ERROR, G_IO_ERROR_CONNECTION_REFUSED)) {
		set_socket_error(path,
				 "another process serves it; end that process or give another path",
				 error);
		return FALSE;
	}
	g_unlink(path);
	return TRUE;
}

/* bind() creates the file with the socket's mode, so no other user can open it at any time. */
static GSocket *open_socket(const char *path, GError **error)
{
	g_autoptr(GSocketAddress) address = NULL;
	g_autoptr(GSocket) socket = NULL;

	if (strlen(path) >= sizeof(((struct sockaddr_un *)NULL)->sun_path)) {
		set_socket_error(path, "the path is too long for a unix socket (at most 107 bytes)",
				 error);
		return NULL;
	}
	address = g_unix_socket_address_new(path);
	if (!remove_stale_socket(path, address, error))
		return NULL;
	socket = g_socket_new(G_SOCKET_FAMILY_UNIX, G_SOCKET_TYPE_STREAM, 0, error);
	if (!socket)
		return NULL;
	g_socket_set_blocking(socket, FALSE);
	g_socket_set_listen_backlog(socket, BACKLOG);
	if (fchmod(g_socket_get_fd(socket), 0600) < 0) {
		set_socket_error(path, g_strerror(errno), error);
		return NULL;
	}
	if (!g_socket_bind(socket, address, FALSE, error))
		return NULL;
	return g_socket_listen(socket, error) ? g_steal_pointer(&socket) : NULL;
}

PrQmpServer *pr_qmp_server_new(PrMonitor *monitor, const char *path, GError **error)
{
	g_autoptr(GError) local = NULL;
	g_autoptr(GSocket) socket = open_socket(path, &local);
	PrQmpServer *server;
	GStatBuf st = {0};

	if (!socket) {
		if (local->domain != PR_MONITOR_ERROR)
			g_prefix_error(&local, "QMP socket '%s': ", path);
		g_propagate_error(error, g_steal_pointer(&local));
		return NULL;
	}
	g_lstat(path, &st);
	server = g_new0(PrQmpServer, 1);
	server->monitor = monitor;
	server->path = g_strdup(path);
	server->device = st.st_dev;
	server->inode = st.st_ino;
	server->clients = g_ptr_array_new_with_free_func((GDestroyNotify)client_free);
	server->socket = g_steal_pointer(&socket);
	start_accepting(server);
	return server;
}

void pr_qmp_server_event(PrQmpServer *server, JsonObject *event)
{
	for (guint i = 0; i < server->clients->len; i++) {
		QmpClient *client = g_ptr_array_index(server->clients, i);

		if (client->negotiated)
			send_object(client, json_object_ref(event));
	}
	json_object_unref(event);
}

void pr_qmp_server_free(PrQmpServer *server)
{
	GStatBuf st;

	GSource *source = server->source ? server->source : server->retry;
	g_source_destroy(source);
	g_source_unref(source);
	g_ptr_array_unref(server->clients);
	if (g_lstat(server->path, &st) == 0 && st.st_dev == server->device &&
	    st.st_ino == server->inode)
		g_unlink(server->path);
	g_object_unref(server->socket);
	g_free(server->path);
	g_free(server);
}
