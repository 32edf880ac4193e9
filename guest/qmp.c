/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "guest/qmp.h"

#include <gio/gunixfdmessage.h>
#include <gio/gunixsocketaddress.h>
#include <string.h>

#include "guest/death.h"
#include "guest/json.h"
#include "util/json-framer.h"

#define READ_CHUNK 16384 /* bytes */

/* A command that waits for its answer; on the stack of its caller. */
typedef struct Call {
	JsonNode *answer; /* an object, owned; NULL: not yet */
} Call;

struct PrQmp {
	char *path;	       /* constant */
	guint timeout_ms;      /* constant */
	GSocket *socket;       /* constant, non-blocking */
	PrQmpEvent on_event;   /* constant */
	void *event_opaque;    /* constant */
	GMainContext *context; /* constant; the reader's */
	GMainLoop *loop;       /* constant; the reader's */
	GThread *reader;       /* the owner's */
	PrFramer framer;       /* the reader's */
	gboolean broken;       /* the reader's; something came that is not QMP */

	GMutex send_lock; /* held while one command is sent */
	PrDeath death;	  /* has its own lock */

	GMutex lock;
	GCond cond;	   /* lock; an answer, the greeting, or the end */
	GHashTable *calls; /* lock; id -> Call */
	guint32 last_id;   /* lock */
	gboolean greeted;  /* lock */
	GError *failure;   /* lock; set once: the connection is gone */
	char *shutdown;	   /* lock; the reason in QEMU's SHUTDOWN event, or NULL */
};

/* The reader thread */

/* Takes failure. Only the first one counts. */
static void fail(PrQmp *qmp, GError *failure)
{
	gboolean first;

	g_mutex_lock(&qmp->lock);
	first = !qmp->failure;
	if (first)
		qmp->failure = failure;
	g_cond_broadcast(&qmp->cond);
	g_mutex_unlock(&qmp->lock);
	if (first)
		pr_death_report(&qmp->death, failure->message);
	else
		g_error_free(failure);
}

static void fail_closed(PrQmp *qmp, const char *detail)
{
	g_autofree char *why = NULL;

	g_mutex_lock(&qmp->lock);
	why = g_strdup(qmp->shutdown);
	g_mutex_unlock(&qmp->lock);
	if (why)
		fail(qmp, g_error_new(PR_GUEST_ERROR, PR_GUEST_ERROR_DIED,
				      "QMP %s: QEMU has shut down (%s)", qmp->path, why));
	else
		fail(qmp, g_error_new(PR_GUEST_ERROR, PR_GUEST_ERROR_DIED,
				      "QMP %s: QEMU is gone: %s", qmp->path, detail));
}

static void fail_garbage(PrQmp *qmp, const char *what)
{
	fail(qmp, g_error_new(PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL,
			      "QMP %s: %s; is this the socket of a QEMU's -qmp?", qmp->path, what));
}

static void deliver_event(PrQmp *qmp, JsonObject *object)
{
	const char *name = pr_json_string(object, "event");
	JsonObject *data = pr_json_object(object, "data");
	const char *reason;

	if (!name)
		return;
	reason = data && g_str_equal(name, "SHUTDOWN") ? pr_json_string(data, "reason") : NULL;
	if (reason) {
		g_mutex_lock(&qmp->lock);
		g_free(qmp->shutdown);
		qmp->shutdown = g_strdup(reason);
		g_mutex_unlock(&qmp->lock);
	}
	if (qmp->on_event)
		qmp->on_event(name, data, qmp->event_opaque);
}

/* Takes root, as only one thread at a time may use it. */
static void deliver_answer(PrQmp *qmp, JsonNode *root)
{
	gint64 id = pr_json_int(json_node_get_object(root), "id");
	Call *call;

	g_mutex_lock(&qmp->lock);
	call = g_hash_table_lookup(qmp->calls, GSIZE_TO_POINTER((gsize)id));
	if (call && !call->answer) {
		call->answer = g_steal_pointer(&root);
		g_cond_broadcast(&qmp->cond);
	}
	g_mutex_unlock(&qmp->lock);
	/* No call: its caller has given up. */
	g_clear_pointer(&root, json_node_unref);
}

/* The parser turns an escaped half of a surrogate pair into bytes that are not UTF-8. QEMU's texts
 * become part of errors, and with them of the JSON that Postroad's own monitor sends. */
static gboolean is_utf8(JsonNode *root)
{
	g_autofree char *text = json_to_string(root, FALSE);

	return g_utf8_validate(text, -1, NULL);
}

static JsonNode *parse(const char *message, gsize len)
{
	g_autoptr(JsonParser) parser = json_parser_new();

	if (!json_parser_load_from_data(parser, message, len, NULL) ||
	    !JSON_NODE_HOLDS_OBJECT(json_parser_get_root(parser)) ||
	    !is_utf8(json_parser_get_root(parser)))
		return NULL;
	return json_parser_steal_root(parser);
}

static void set_greeted(PrQmp *qmp)
{
	g_mutex_lock(&qmp->lock);
	qmp->greeted = TRUE;
	g_cond_broadcast(&qmp->cond);
	g_mutex_unlock(&qmp->lock);
}

/* PrFrameSink */
static void on_message(const char *message, gsize len, const char *fault, void *opaque)
{
	PrQmp *qmp = opaque;
	g_autoptr(JsonNode) root = fault || qmp->broken ? NULL : parse(message, len);
	JsonObject *object;

	if (qmp->broken)
		return;
	if (!root) {
		qmp->broken = TRUE;
		fail_garbage(qmp, fault ? "what came is not QMP" : "what came is not JSON");
		return;
	}
	object = json_node_get_object(root);
	if (json_object_has_member(object, "event"))
		deliver_event(qmp, object);
	else if (json_object_has_member(object, "QMP"))
		set_greeted(qmp);
	else
		deliver_answer(qmp, g_steal_pointer(&root));
}

/* FALSE: these bytes were not QMP. */
static gboolean receive_bytes(PrQmp *qmp, const char *bytes, gsize len)
{
	pr_framer_feed(&qmp->framer, bytes, len, on_message, qmp);
	return !qmp->broken;
}

static gboolean on_readable(GSocket *socket, GIOCondition condition, gpointer data)
{
	PrQmp *qmp = data;
	char chunk[READ_CHUNK];
	g_autoptr(GError) error = NULL;
	gssize n = g_socket_receive(socket, chunk, sizeof(chunk), NULL, &error);

	if (g_error_matches(error, G_IO_ERROR, G_IO_ERROR_WOULD_BLOCK))
		return G_SOURCE_CONTINUE;
	if (n <= 0) {
		fail_closed(qmp, error ? error->message : "it closed the connection");
		return G_SOURCE_REMOVE;
	}
	return receive_bytes(qmp, chunk, n) ? G_SOURCE_CONTINUE : G_SOURCE_REMOVE;
}

static gpointer reader_thread(gpointer data)
{
	PrQmp *qmp = data;
	g_autoptr(GSource) source = g_socket_create_source(qmp->socket, G_IO_IN, NULL);

	g_main_context_push_thread_default(qmp->context);
	g_source_set_callback(source, G_SOURCE_FUNC(on_readable), qmp, NULL);
	g_source_attach(source, qmp->context);
	g_main_loop_run(qmp->loop);
	g_source_destroy(source);
	g_main_context_pop_thread_default(qmp->context);
	return NULL;
}

/* Calls */

static gboolean timed_out(PrQmp *qmp, const char *command, GError **error)
{
	g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_TIMEOUT,
		    "QMP %s: no answer to '%s' within %u ms", qmp->path, command, qmp->timeout_ms);
	return FALSE;
}

static gint64 deadline_of(PrQmp *qmp)
{
	return g_get_monotonic_time() + (gint64)qmp->timeout_ms * G_TIME_SPAN_MILLISECOND;
}

static gssize send_some(PrQmp *qmp, const char *bytes, gsize len, int fd, GError **error)
{
	GOutputVector vector = {.buffer = bytes, .size = len};
	g_autoptr(GSocketControlMessage) message = NULL;

	if (fd >= 0) {
		message = g_unix_fd_message_new();
		if (!g_unix_fd_message_append_fd(G_UNIX_FD_MESSAGE(message), fd, error))
			return -1;
	}
	return g_socket_send_message(qmp->socket, NULL, &vector, 1, message ? &message : NULL,
				     message ? 1 : 0, G_SOCKET_MSG_NONE, NULL, error);
}

/* fd is sent with the first bytes. */
static gboolean send_text(PrQmp *qmp, const char *command, const char *text, int fd, GError **error)
{
	g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&qmp->send_lock);
	gint64 deadline = deadline_of(qmp);
	gsize len = strlen(text);

	for (gsize at = 0; at < len;) {
		g_autoptr(GError) cause = NULL;
		gssize n = send_some(qmp, text + at, len - at, at ? -1 : fd, &cause);
		gint64 left = deadline - g_get_monotonic_time();

		if (n > 0) {
			at += n;
		} else if (!g_error_matches(cause, G_IO_ERROR, G_IO_ERROR_WOULD_BLOCK)) {
			g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_DIED,
				    "QMP %s: cannot send '%s': %s", qmp->path, command,
				    cause->message);
			return FALSE;
		} else if (left <= 0 || !g_socket_condition_timed_wait(qmp->socket, G_IO_OUT, left,
								       NULL, NULL)) {
			return timed_out(qmp, command, error);
		}
	}
	return TRUE;
}

/* With the lock held. */
static gboolean failed_already(PrQmp *qmp, GError **error)
{
	if (qmp->failure && error)
		*error = g_error_copy(qmp->failure);
	return qmp->failure != NULL;
}

static gboolean wait_for_answer(PrQmp *qmp, Call *call, const char *command, GError **error)
{
	gint64 deadline = deadline_of(qmp);

	while (!call->answer) {
		if (failed_already(qmp, error))
			return FALSE;
		if (!g_cond_wait_until(&qmp->cond, &qmp->lock, deadline) && !call->answer)
			return timed_out(qmp, command, error);
	}
	return TRUE;
}

static char *command_text(const char *command, JsonObject *arguments, guint32 id)
{
	g_autoptr(JsonNode) root = json_node_new(JSON_NODE_OBJECT);
	JsonObject *object = json_object_new();
	g_autofree char *json = NULL;

	json_object_set_string_member(object, "execute", command);
	if (arguments)
		json_object_set_object_member(object, "arguments", arguments);
	json_object_set_int_member(object, "id", id);
	json_node_take_object(root, object);
	json = json_to_string(root, FALSE);
	return g_strconcat(json, "\n", NULL);
}

static JsonNode *result_of(PrQmp *qmp, const char *command, JsonObject *answer, GError **error)
{
	JsonObject *failure = pr_json_object(answer, "error");
	const char *desc;

	if (json_object_has_member(answer, "return"))
		return json_node_copy(json_object_get_member(answer, "return"));
	if (!failure) {
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL,
			    "QMP %s: the answer to '%s' has neither return nor error", qmp->path,
			    command);
		return NULL;
	}
	desc = pr_json_string(failure, "desc");
	g_set_error(error, PR_GUEST_ERROR,
		    g_strcmp0(pr_json_string(failure, "class"), "CommandNotFound") == 0
			    ? PR_GUEST_ERROR_UNSUPPORTED
			    : PR_GUEST_ERROR_REFUSED,
		    "QMP %s: %s: %s", qmp->path, command, desc ? desc : "no description");
	return NULL;
}

static JsonNode *exchange(PrQmp *qmp, const char *command, JsonObject *arguments, int fd,
			  GError **error)
{
	g_autofree char *text = NULL;
	Call call = {0};
	guint32 id;
	gboolean sent;

	g_mutex_lock(&qmp->lock);
	id = ++qmp->last_id;
	g_hash_table_insert(qmp->calls, GSIZE_TO_POINTER((gsize)id), &call);
	g_mutex_unlock(&qmp->lock);
	text = command_text(command, arguments, id);
	sent = send_text(qmp, command, text, fd, error);
	g_mutex_lock(&qmp->lock);
	if (sent)
		wait_for_answer(qmp, &call, command, error);
	g_hash_table_remove(qmp->calls, GSIZE_TO_POINTER((gsize)id));
	g_mutex_unlock(&qmp->lock);
	return call.answer;
}

JsonNode *pr_qmp_execute(PrQmp *qmp, const char *command, JsonObject *arguments, int fd,
			 GError **error)
{
	g_autoptr(GError) cause = NULL;
	g_autoptr(JsonNode) answer = exchange(qmp, command, arguments, fd, &cause);

	/* An answer that arrives at the moment of the timeout counts. */
	if (answer)
		return result_of(qmp, command, json_node_get_object(answer), error);
	g_propagate_error(error, g_steal_pointer(&cause));
	return NULL;
}

gboolean pr_qmp_command(PrQmp *qmp, const char *command, JsonObject *arguments, int fd,
			GError **error)
{
	g_autoptr(JsonNode) result = pr_qmp_execute(qmp, command, arguments, fd, error);

	return result != NULL;
}

JsonObject *pr_qmp_query(PrQmp *qmp, const char *command, GError **error)
{
	g_autoptr(JsonNode) result = pr_qmp_execute(qmp, command, NULL, -1, error);

	if (!result)
		return NULL;
	if (JSON_NODE_HOLDS_OBJECT(result))
		return json_node_dup_object(result);
	g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL,
		    "QMP %s: the answer to '%s' is not an object", qmp->path, command);
	return NULL;
}

char *pr_qmp_human(PrQmp *qmp, const char *line, GError **error)
{
	JsonObject *arguments = json_object_new();
	g_autoptr(JsonNode) result = NULL;

	json_object_set_string_member(arguments, "command-line", line);
	result = pr_qmp_execute(qmp, "human-monitor-command", arguments, -1, error);
	if (!result)
		return NULL;
	if (json_node_get_value_type(result) == G_TYPE_STRING)
		return g_strdup(json_node_get_string(result));
	g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL,
		    "QMP %s: the answer to '%s' is not text", qmp->path, line);
	return NULL;
}

/* Opening */

GSocket *pr_qmp_connect(const char *path, GError **error)
{
	g_autoptr(GSocketAddress) address = g_unix_socket_address_new(path);
	g_autoptr(GSocket) socket = NULL;
	g_autoptr(GError) cause = NULL;

	socket = g_socket_new(G_SOCKET_FAMILY_UNIX, G_SOCKET_TYPE_STREAM, G_SOCKET_PROTOCOL_DEFAULT,
			      &cause);
	if (socket)
		g_socket_set_blocking(socket, FALSE);
	if (socket && g_socket_connect(socket, address, NULL, &cause))
		return g_steal_pointer(&socket);
	g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_UNREACHABLE,
		    "QMP %s: %s; start QEMU with -qmp unix:%s,server=on,wait=off", path,
		    cause->message, path);
	return NULL;
}

static gboolean wait_for_greeting(PrQmp *qmp, GError **error)
{
	g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&qmp->lock);
	gint64 deadline = deadline_of(qmp);

	while (!qmp->greeted) {
		if (failed_already(qmp, error))
			return FALSE;
		if (g_cond_wait_until(&qmp->cond, &qmp->lock, deadline) || qmp->greeted)
			continue;
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_TIMEOUT,
			    "QMP %s: no greeting within %u ms; a QMP socket serves one client at a "
			    "time: give QEMU another -qmp for Postroad",
			    qmp->path, qmp->timeout_ms);
		return FALSE;
	}
	return TRUE;
}

PrQmp *pr_qmp_open(const char *path, guint timeout_ms, PrQmpEvent on_event, void *opaque,
		   GError **error)
{
	GSocket *socket = pr_qmp_connect(path, error);

	return socket ? pr_qmp_open_over(socket, path, timeout_ms, on_event, opaque, error) : NULL;
}

PrQmp *pr_qmp_open_over(GSocket *socket, const char *path, guint timeout_ms, PrQmpEvent on_event,
			void *opaque, GError **error)
{
	g_autoptr(PrQmp) qmp = g_new0(PrQmp, 1);

	qmp->path = g_strdup(path);
	qmp->timeout_ms = timeout_ms;
	qmp->socket = socket;
	qmp->on_event = on_event;
	qmp->event_opaque = opaque;
	qmp->context = g_main_context_new();
	qmp->loop = g_main_loop_new(qmp->context, FALSE);
	qmp->calls = g_hash_table_new(NULL, NULL);
	pr_framer_init(&qmp->framer, PR_FRAMER_OBJECTS);
	pr_death_init(&qmp->death);
	g_mutex_init(&qmp->lock);
	g_mutex_init(&qmp->send_lock);
	g_cond_init(&qmp->cond);
	qmp->reader = g_thread_try_new("qmp", reader_thread, qmp, error);
	if (!qmp->reader || !wait_for_greeting(qmp, error) ||
	    !pr_qmp_command(qmp, "qmp_capabilities", NULL, -1, error))
		return NULL;
	return g_steal_pointer(&qmp);
}

static gboolean quit_loop(gpointer data)
{
	g_main_loop_quit(data);
	return G_SOURCE_REMOVE;
}

void pr_qmp_free(PrQmp *qmp)
{
	g_autoptr(GSource) quit = g_idle_source_new();

	/* Quits by a source: if the loop does not run yet, g_main_loop_quit() would have no
	 * effect. */
	g_source_set_callback(quit, quit_loop, qmp->loop, NULL);
	g_source_attach(quit, qmp->context);
	if (qmp->reader)
		g_thread_join(qmp->reader);
	g_socket_close(qmp->socket, NULL);
	g_object_unref(qmp->socket);
	g_main_loop_unref(qmp->loop);
	g_main_context_unref(qmp->context);
	g_hash_table_unref(qmp->calls);
	pr_framer_clear(&qmp->framer);
	pr_death_clear(&qmp->death);
	g_clear_error(&qmp->failure);
	g_free(qmp->shutdown);
	g_mutex_clear(&qmp->lock);
	g_mutex_clear(&qmp->send_lock);
	g_cond_clear(&qmp->cond);
	g_free(qmp->path);
	g_free(qmp);
}

void pr_qmp_on_death(PrQmp *qmp, PrGuestDied died, void *opaque)
{
	pr_death_observe(&qmp->death, died, opaque);
}
