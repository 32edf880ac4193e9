/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * QEMU's device state, through its own migration stream.
 *
 * Save: x-ignore-shared leaves the shared RAM out, `migrate fd:` writes to one end of a socketpair, we
 * read the other to its end, and the MIGRATION event says how it went. Load: the same with
 * `migrate-incoming`. QEMU may touch guest RAM while it loads; then its main loop waits for a page,
 * and neither reads our bytes nor answers QMP. So nothing here asks it anything before its event has
 * come, and every wait ends with the deadline, with load_abort(), or with QEMU's death.
 *
 * Whatever save() changes in QEMU (capabilities, bandwidth) undo() puts back: a guest that stays is as
 * its operator left it.
 */
#include "guest/qemu.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "guest/json.h"
#include "guest/kinds.h"

#define FD_NAME		  "postroad"
#define SAVE_CHUNK	  (256 * 1024)	/* bytes */
#define NO_BANDWIDTH	  (1ll << 50)	/* bytes/s: a limit that does not limit */
#define DEFAULT_BANDWIDTH (128ll << 20) /* bytes/s: QEMU's own limit */

struct PrQemuStream {
	PrQmp *qmp;	  /* constant */
	guint timeout_ms; /* constant */

	GMutex lock;
	GCond cond;   /* lock; end or dead changed */
	char *end;    /* lock; how QEMU's migration ended: "completed", "failed", … */
	char *dead;   /* lock; why QEMU is gone, or NULL */
	int ready_fd; /* lock; QEMU has the other end already, -1: no */
	int load_fd;  /* lock; -1: no load */
	GCancellable *load_cancel; /* lock; of the load in progress, or NULL */
	JsonArray *old_caps;	   /* lock; what save() found, or NULL: nothing to undo */
	gint64 old_bandwidth;	   /* lock; goes with old_caps */
};

PrQemuStream *pr_qemu_stream_new(PrQmp *qmp, guint timeout_ms)
{
	PrQemuStream *stream = g_new0(PrQemuStream, 1);

	stream->qmp = qmp;
	stream->timeout_ms = timeout_ms;
	stream->ready_fd = -1;
	stream->load_fd = -1;
	g_mutex_init(&stream->lock);
	g_cond_init(&stream->cond);
	return stream;
}

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

void pr_qemu_stream_free(PrQemuStream *stream)
{
	close_fd(&stream->ready_fd);
	close_fd(&stream->load_fd);
	g_clear_object(&stream->load_cancel);
	g_clear_pointer(&stream->old_caps, json_array_unref);
	g_free(stream->end);
	g_free(stream->dead);
	g_mutex_clear(&stream->lock);
	g_cond_clear(&stream->cond);
	g_free(stream);
}

/* Events */

static gboolean is_end(const char *status)
{
	static const char *const ends[] = {"completed", "failed", "cancelled", NULL};

	return status && g_strv_contains(ends, status);
}

void pr_qemu_stream_event(PrQemuStream *stream, const char *name, JsonObject *data)
{
	const char *status;

	if (!g_str_equal(name, "MIGRATION") || !data)
		return;
	status = pr_json_string(data, "status");
	if (!is_end(status))
		return;
	g_mutex_lock(&stream->lock);
	g_free(stream->end);
	stream->end = g_strdup(status);
	g_cond_broadcast(&stream->cond);
	g_mutex_unlock(&stream->lock);
}

void pr_qemu_stream_died(PrQemuStream *stream, const char *reason)
{
	g_mutex_lock(&stream->lock);
	g_free(stream->dead);
	stream->dead = g_strdup(reason);
	g_cond_broadcast(&stream->cond);
	g_mutex_unlock(&stream->lock);
}

static void forget_end(PrQemuStream *stream)
{
	g_mutex_lock(&stream->lock);
	g_clear_pointer(&stream->end, g_free);
	g_mutex_unlock(&stream->lock);
}

static void wake_waiters(GCancellable *cancel, gpointer data)
{
	PrQemuStream *stream = data;

	g_mutex_lock(&stream->lock);
	g_cond_broadcast(&stream->cond);
	g_mutex_unlock(&stream->lock);
}

/* With the lock held. NULL: nothing ended. */
static char *wait_locked(PrQemuStream *stream, gint64 deadline, GCancellable *cancel,
			 GError **error)
{
	while (!stream->end) {
		if (stream->dead) {
			g_set_error_literal(error, PR_GUEST_ERROR, PR_GUEST_ERROR_DIED,
					    stream->dead);
			return NULL;
		}
		if (g_cancellable_set_error_if_cancelled(cancel, error))
			return NULL;
		if (g_cond_wait_until(&stream->cond, &stream->lock, deadline) || stream->end)
			continue;
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_TIMEOUT,
			    "QEMU did not say in time how its migration ended");
		return NULL;
	}
	return g_strdup(stream->end);
}

static char *wait_for_end(PrQemuStream *stream, guint timeouts, GCancellable *cancel,
			  GError **error)
{
	gint64 deadline = g_get_monotonic_time() +
			  (gint64)stream->timeout_ms * timeouts * G_TIME_SPAN_MILLISECOND;
	gulong handler = 0;
	char *end;

	if (cancel)
		handler = g_cancellable_connect(cancel, G_CALLBACK(wake_waiters), stream, NULL);
	g_mutex_lock(&stream->lock);
	end = wait_locked(stream, deadline, cancel, error);
	g_mutex_unlock(&stream->lock);
	if (cancel)
		g_cancellable_disconnect(cancel, handler);
	return end;
}

/* What QEMU itself says. */
static gboolean migration_status(PrQemuStream *stream, char **ret_status, char **ret_desc,
				 GError **error)
{
	g_autoptr(JsonObject) object = pr_qmp_query(stream->qmp, "query-migrate", error);
	const char *status;

	if (!object)
		return FALSE;
	status = pr_json_string(object, "status");
	*ret_status = g_strdup(status ? status : "none");
	*ret_desc = g_strdup(pr_json_string(object, "error-desc"));
	return TRUE;
}

static gboolean check_completed(PrQemuStream *stream, const char *end, const char *what,
				GError **error)
{
	g_autofree char *status = NULL;
	g_autofree char *desc = NULL;

	if (g_str_equal(end, "completed"))
		return TRUE;
	if (!migration_status(stream, &status, &desc, error))
		return FALSE;
	g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_REFUSED,
		    "QEMU could not %s its device state: %s%s%s", what, end, desc ? ": " : "",
		    desc ? desc : "");
	return FALSE;
}

/* Capabilities */

/* Off: they change the stream, or want more than one connection. */
static gboolean wanted_capability(const char *name, gboolean *ret_on)
{
	static const char *const off[] = {"multifd",
					  "postcopy-ram",
					  "xbzrle",
					  "compress",
					  "x-colo",
					  "dirty-bitmaps",
					  "return-path",
					  "rdma-pin-all",
					  "zero-copy-send",
					  "mapped-ram",
					  "auto-converge",
					  "pause-before-switchover",
					  "postcopy-preempt",
					  "background-snapshot",
					  "block",
					  NULL};

	*ret_on = g_str_equal(name, "x-ignore-shared") || g_str_equal(name, "events");
	return *ret_on || g_strv_contains(off, name);
}

static void add_capability(JsonArray *list, const char *name, gboolean on)
{
	JsonObject *object = json_object_new();

	json_object_set_string_member(object, "capability", name);
	json_object_set_boolean_member(object, "state", on);
	json_array_add_object_element(list, object);
}

/* Two lists: how the capabilities should be, and how those that differ are. */
static void plan_capabilities(JsonArray *found, JsonArray *wanted, JsonArray *old)
{
	for (guint i = 0; i < json_array_get_length(found); i++) {
		JsonNode *node = json_array_get_element(found, i);
		JsonObject *object;
		const char *name;
		gboolean is, on;

		if (!JSON_NODE_HOLDS_OBJECT(node))
			continue;
		object = json_node_get_object(node);
		name = pr_json_string(object, "capability");
		is = pr_json_boolean(object, "state");
		if (!name || !wanted_capability(name, &on) || is == on)
			continue;
		add_capability(wanted, name, on);
		add_capability(old, name, is);
	}
}

static gboolean set_capabilities(PrQemuStream *stream, JsonArray *list, GError **error)
{
	JsonObject *arguments;

	if (!json_array_get_length(list))
		return TRUE;
	arguments = json_object_new();
	json_object_set_array_member(arguments, "capabilities", json_array_ref(list));
	return pr_qmp_command(stream->qmp, "migrate-set-capabilities", arguments, -1, error);
}

static gboolean set_bandwidth(PrQemuStream *stream, gint64 bandwidth, GError **error)
{
	JsonObject *arguments = json_object_new();

	json_object_set_int_member(arguments, "max-bandwidth", bandwidth);
	return pr_qmp_command(stream->qmp, "migrate-set-parameters", arguments, -1, error);
}

static gboolean query_bandwidth(PrQemuStream *stream, gint64 *ret_bandwidth, GError **error)
{
	g_autoptr(JsonObject) object = pr_qmp_query(stream->qmp, "query-migrate-parameters", error);

	if (!object)
		return FALSE;
	*ret_bandwidth = pr_json_int(object, "max-bandwidth");
	return TRUE;
}

/* Prepares QEMU for a stream to or from us, and remembers how it was. */
static gboolean configure(PrQemuStream *stream, GError **error)
{
	g_autoptr(JsonNode) node =
		pr_qmp_execute(stream->qmp, "query-migrate-capabilities", NULL, -1, error);
	g_autoptr(JsonArray) wanted = json_array_new();
	g_autoptr(JsonArray) old = json_array_new();
	gint64 bandwidth;

	if (!node || !query_bandwidth(stream, &bandwidth, error))
		return FALSE;
	if (JSON_NODE_HOLDS_ARRAY(node))
		plan_capabilities(json_node_get_array(node), wanted, old);
	if (!set_capabilities(stream, wanted, error))
		return FALSE;
	g_mutex_lock(&stream->lock);
	g_clear_pointer(&stream->old_caps, json_array_unref);
	stream->old_caps = g_steal_pointer(&old);
	stream->old_bandwidth = bandwidth;
	g_mutex_unlock(&stream->lock);
	return set_bandwidth(stream, NO_BANDWIDTH, error);
}

/* Hands one end of a socketpair to QEMU under FD_NAME; returns the other. */
static int give_socket(PrQemuStream *stream, GError **error)
{
	JsonObject *arguments = json_object_new();
	int pair[2];
	gboolean ok;

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0) {
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL, "socketpair: %s",
			    g_strerror(errno));
		json_object_unref(arguments);
		return -1;
	}
	json_object_set_string_member(arguments, "fdname", FD_NAME);
	ok = pr_qmp_command(stream->qmp, "getfd", arguments, pair[1], error);
	close(pair[1]);
	if (ok)
		return pair[0];
	close(pair[0]);
	return -1;
}

static int take_ready(PrQemuStream *stream)
{
	g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&stream->lock);
	int fd = stream->ready_fd;

	stream->ready_fd = -1;
	return fd;
}

/* What pr_qemu_stream_prepare() has made, or now. */
static int prepared_socket(PrQemuStream *stream, GError **error)
{
	int fd = take_ready(stream);

	if (fd >= 0)
		return fd;
	return configure(stream, error) ? give_socket(stream, error) : -1;
}

gboolean pr_qemu_stream_prepare(PrQemuStream *stream, GError **error)
{
	int fd = prepared_socket(stream, error);

	if (fd < 0)
		return FALSE;
	g_mutex_lock(&stream->lock);
	stream->ready_fd = fd;
	g_mutex_unlock(&stream->lock);
	return TRUE;
}

static JsonObject *uri_arguments(void)
{
	JsonObject *arguments = json_object_new();

	json_object_set_string_member(arguments, "uri", "fd:" FD_NAME);
	return arguments;
}

/* Waits for the socket, a cancellation or the time. */
static gboolean wait_for_socket(int fd, short events, guint64 timeout_ms, GCancellable *cancel,
				GError **error)
{
	GPollFD cancel_poll = {.fd = -1};
	gboolean has_cancel = cancel && g_cancellable_make_pollfd(cancel, &cancel_poll);
	struct pollfd polls[2] = {{.fd = fd, .events = events},
				  {.fd = cancel_poll.fd, .events = POLLIN}};
	int n;

	do {
		n = poll(polls, 2, (int)MIN(timeout_ms, G_MAXINT));
	} while (n < 0 && errno == EINTR);
	if (has_cancel)
		g_cancellable_release_fd(cancel);
	if (g_cancellable_set_error_if_cancelled(cancel, error))
		return FALSE;
	if (n == 0)
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_TIMEOUT,
			    "QEMU's device state does not move on");
	return n != 0;
}

/* Save */

static gboolean read_stream(PrQemuStream *stream, int fd, GCancellable *cancel, PrGuestSink sink,
			    void *opaque, GError **error)
{
	g_autofree char *chunk = g_malloc(SAVE_CHUNK);

	for (;;) {
		ssize_t n;

		if (!wait_for_socket(fd, POLLIN, stream->timeout_ms, cancel, error))
			return FALSE;
		n = recv(fd, chunk, SAVE_CHUNK, MSG_DONTWAIT);
		if (n == 0)
			return TRUE;
		if (n < 0 && (errno == EINTR || errno == EAGAIN))
			continue;
		if (n < 0) {
			g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_DIED,
				    "QEMU's device state broke off: %s", g_strerror(errno));
			return FALSE;
		}
		if (!sink(chunk, n, opaque, error))
			return FALSE;
	}
}

gboolean pr_qemu_stream_save(PrQemuStream *stream, GCancellable *cancel, PrGuestSink sink,
			     void *opaque, GError **error)
{
	g_autofree char *end = NULL;
	gboolean ok;
	int fd = prepared_socket(stream, error);

	if (fd < 0)
		return FALSE;
	forget_end(stream);
	ok = pr_qmp_command(stream->qmp, "migrate", uri_arguments(), -1, error) &&
	     read_stream(stream, fd, cancel, sink, opaque, error);
	close(fd);
	if (!ok)
		return FALSE;
	end = wait_for_end(stream, 1, cancel, error);
	return end && check_completed(stream, end, "save", error);
}

static gboolean at_rest(const char *status)
{
	return is_end(status) || g_str_equal(status, "none");
}

/* Cancels what runs, and waits for its end. */
static gboolean cancel_migration(PrQemuStream *stream, GError **error)
{
	g_autofree char *status = NULL;
	g_autofree char *desc = NULL;
	g_autofree char *end = NULL;

	forget_end(stream);
	if (!migration_status(stream, &status, &desc, error))
		return FALSE;
	if (at_rest(status))
		return TRUE;
	if (!pr_qmp_command(stream->qmp, "migrate_cancel", NULL, -1, error))
		return FALSE;
	end = wait_for_end(stream, 1, NULL, error);
	return end != NULL;
}

void pr_qemu_stream_follow(PrQemuStream *stream)
{
	g_autoptr(JsonArray) defaults = json_array_new();

	add_capability(defaults, "x-ignore-shared", FALSE);
	g_mutex_lock(&stream->lock);
	g_clear_pointer(&stream->old_caps, json_array_unref);
	stream->old_caps = g_steal_pointer(&defaults);
	stream->old_bandwidth = DEFAULT_BANDWIDTH;
	g_mutex_unlock(&stream->lock);
}

gboolean pr_qemu_stream_undo(PrQemuStream *stream, GError **error)
{
	g_autoptr(JsonArray) old = NULL;
	gint64 bandwidth;

	/* QEMU's end of one that was not used goes with the next getfd. */
	g_mutex_lock(&stream->lock);
	close_fd(&stream->ready_fd);
	old = g_steal_pointer(&stream->old_caps);
	bandwidth = stream->old_bandwidth;
	g_mutex_unlock(&stream->lock);
	if (!old)
		return TRUE;
	return cancel_migration(stream, error) && set_bandwidth(stream, bandwidth, error) &&
	       set_capabilities(stream, old, error);
}

/* Load */

gboolean pr_qemu_stream_load_begin(PrQemuStream *stream, GError **error)
{
	int fd = prepared_socket(stream, error);

	if (fd < 0)
		return FALSE;
	forget_end(stream);
	if (!pr_qmp_command(stream->qmp, "migrate-incoming", uri_arguments(), -1, error)) {
		close(fd);
		g_prefix_error(error, "start the destination QEMU anew with -incoming defer: ");
		return FALSE;
	}
	g_mutex_lock(&stream->lock);
	close_fd(&stream->load_fd);
	stream->load_fd = fd;
	g_clear_object(&stream->load_cancel);
	stream->load_cancel = g_cancellable_new();
	g_mutex_unlock(&stream->lock);
	return TRUE;
}

/* The socket stays open while another thread uses it: load_abort() only shuts it down. */
static int current_load(PrQemuStream *stream, GCancellable **ret_cancel, GError **error)
{
	g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&stream->lock);

	if (stream->load_fd < 0) {
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL,
			    "no device state is being loaded");
		return -1;
	}
	*ret_cancel = g_object_ref(stream->load_cancel);
	return stream->load_fd;
}

static gboolean load_failed(PrQemuStream *stream, int err, GError **error)
{
	g_autofree char *end = wait_for_end(stream, 1, NULL, NULL);
	g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&stream->lock);

	g_set_error(error, PR_GUEST_ERROR,
		    stream->dead ? PR_GUEST_ERROR_DIED : PR_GUEST_ERROR_REFUSED,
		    "QEMU stopped reading its device state (%s): %s; its own log says why",
		    g_strerror(err),
		    stream->dead ? stream->dead
		    : end	 ? end
				 : "no reason given");
	return FALSE;
}

gboolean pr_qemu_stream_load_data(PrQemuStream *stream, const void *data, gsize len, GError **error)
{
	guint64 timeout_ms = (guint64)stream->timeout_ms * PR_GUEST_LOAD_TIMEOUTS;
	g_autoptr(GCancellable) cancel = NULL;
	int fd = current_load(stream, &cancel, error);

	if (fd < 0)
		return FALSE;
	for (const char *at = data; len > 0;) {
		ssize_t n;

		if (!wait_for_socket(fd, POLLOUT, timeout_ms, cancel, error))
			return FALSE;
		n = send(fd, at, len, MSG_DONTWAIT | MSG_NOSIGNAL);
		if (n < 0 && (errno == EINTR || errno == EAGAIN))
			continue;
		if (n < 0)
			return load_failed(stream, errno, error);
		at += n;
		len -= n;
	}
	return TRUE;
}

static gboolean left_inmigrate(PrQemuStream *stream, GError **error)
{
	g_autoptr(JsonObject) object = pr_qmp_query(stream->qmp, "query-status", error);

	if (!object)
		return FALSE;
	if (g_strcmp0(pr_json_string(object, "status"), "inmigrate") != 0)
		return TRUE;
	g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL,
		    "QEMU says its device state is loaded, and still waits for it");
	return FALSE;
}

gboolean pr_qemu_stream_load_end(PrQemuStream *stream, GError **error)
{
	g_autoptr(GCancellable) cancel = NULL;
	g_autofree char *end = NULL;
	int fd = current_load(stream, &cancel, error);

	if (fd < 0)
		return FALSE;
	shutdown(fd, SHUT_WR);
	end = wait_for_end(stream, PR_GUEST_LOAD_TIMEOUTS, cancel, error);
	g_mutex_lock(&stream->lock);
	close_fd(&stream->load_fd);
	g_mutex_unlock(&stream->lock);
	return end && check_completed(stream, end, "load", error) && left_inmigrate(stream, error);
}

void pr_qemu_stream_load_abort(PrQemuStream *stream)
{
	g_autoptr(GCancellable) cancel = NULL;

	g_mutex_lock(&stream->lock);
	g_set_object(&cancel, stream->load_cancel);
	if (stream->load_fd >= 0)
		shutdown(stream->load_fd, SHUT_RDWR);
	g_mutex_unlock(&stream->lock);
	g_cancellable_cancel(cancel);
}
