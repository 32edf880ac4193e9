/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * QEMU's device state, through its own migration stream.
 *
 * Save: x-ignore-shared leaves the shared RAM out, `migrate fd:` writes to one end of a socketpair, we
 * read the other to its end, and the MIGRATION event says how it went. A guest that runs is stopped by that
 * migration itself: its set-up and the private RAM come before, so that they are not downtime. Load: the same with
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
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "guest/json.h"
#include "guest/kinds.h"

#define FD_NAME		  "postroad"
#define SAVE_CHUNK	  (256 * 1024) /* bytes */
#define CANCEL_LOOK_MS	  20
#define NO_BANDWIDTH	  (1ll << 50)	/* bytes/s: a limit that does not limit */
#define DEFAULT_BANDWIDTH (128ll << 20) /* bytes/s: QEMU's own limit */
/* A guest that rewrites its private RAM all the time could keep QEMU from stopping it. */
#define EARLY_MAX     (64 << 20) /* bytes of device state before the stop */
#define STOP_AFTER_US G_USEC_PER_SEC

struct PrQemuStream {
	PrQmp *qmp;	  /* constant */
	guint timeout_ms; /* constant */

	int wake_fd;	    /* constant; eventfd: an event has come, or QEMU is gone */
	GByteArray *early;  /* of who saves: what came before the guest had stopped */
	GThread *migrating; /* of who saves: asks for the migration; NULL: joined */

	GMutex lock;
	GCond cond;	   /* lock; end or dead changed */
	char *end;	   /* lock; how QEMU's migration ended: "completed", "failed", … */
	char *dead;	   /* lock; why QEMU is gone, or NULL */
	int ready_fd;	   /* lock; QEMU has the other end already, -1: no */
	int save_fd;	   /* lock; of a save that has begun, -1: none */
	gboolean answered; /* lock; QEMU has said whether it takes the command */
	GError *refused;   /* lock until then; why it does not, or NULL */
	gboolean
		stopped; /* lock; since the save began QEMU has stopped the guest; or it loads one */
	gboolean ran_again;	   /* lock; and somebody has let it run */
	int load_fd;		   /* lock; -1: no load */
	GCancellable *load_cancel; /* lock; of the load in progress, or NULL */
	JsonArray *old_caps;	   /* lock; what save() found, or NULL: nothing to undo */
	gint64 old_bandwidth;	   /* lock; goes with old_caps */
};

PrQemuStream *pr_qemu_stream_new(PrQmp *qmp, guint timeout_ms)
{
	PrQemuStream *stream = g_new0(PrQemuStream, 1);

	stream->qmp = qmp;
	stream->timeout_ms = timeout_ms;
	stream->ready_fd = stream->save_fd = stream->load_fd = -1;
	stream->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	stream->early = g_byte_array_new();
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
	g_clear_error(&stream->refused);
	close_fd(&stream->ready_fd);
	close_fd(&stream->save_fd);
	close_fd(&stream->load_fd);
	close_fd(&stream->wake_fd);
	g_byte_array_unref(stream->early);
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

/* With the lock held. */
static void tell_locked(PrQemuStream *stream)
{
	g_cond_broadcast(&stream->cond);
	eventfd_write(stream->wake_fd, 1);
}

/* With the lock held. */
static void note_event(PrQemuStream *stream, const char *name, JsonObject *data)
{
	const char *status = data ? pr_json_string(data, "status") : NULL;

	if (g_str_equal(name, "STOP")) {
		stream->stopped = TRUE;
	} else if (g_str_equal(name, "RESUME")) {
		stream->ran_again = stream->stopped;
	} else if (g_str_equal(name, "MIGRATION") && is_end(status)) {
		g_free(stream->end);
		stream->end = g_strdup(status);
	} else {
		return;
	}
	tell_locked(stream);
}

void pr_qemu_stream_event(PrQemuStream *stream, const char *name, JsonObject *data)
{
	g_mutex_lock(&stream->lock);
	note_event(stream, name, data);
	g_mutex_unlock(&stream->lock);
}

void pr_qemu_stream_died(PrQemuStream *stream, const char *reason)
{
	g_mutex_lock(&stream->lock);
	g_free(stream->dead);
	stream->dead = g_strdup(reason);
	tell_locked(stream);
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

/* Prepares QEMU for a stream to or from us, and remembers how it was. */
static gboolean configure(PrQemuStream *stream, GError **error)
{
	g_autoptr(JsonNode) node =
		pr_qmp_execute(stream->qmp, "query-migrate-capabilities", NULL, -1, error);
	g_autoptr(JsonArray) wanted = json_array_new();
	g_autoptr(JsonArray) old = json_array_new();
	gint64 bandwidth;

	if (!node || !pr_qemu_query_bandwidth(stream->qmp, &bandwidth, error))
		return FALSE;
	if (JSON_NODE_HOLDS_ARRAY(node))
		pr_qemu_plan_capabilities(json_node_get_array(node), wanted, old);
	if (!pr_qemu_set_capabilities(stream->qmp, wanted, error))
		return FALSE;
	g_mutex_lock(&stream->lock);
	g_clear_pointer(&stream->old_caps, json_array_unref);
	stream->old_caps = g_steal_pointer(&old);
	stream->old_bandwidth = bandwidth;
	g_mutex_unlock(&stream->lock);
	return pr_qemu_set_bandwidth(stream->qmp, NO_BANDWIDTH, error);
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
	struct pollfd ready = {.fd = fd, .events = events};
	gint64 deadline = g_get_monotonic_time() + (gint64)timeout_ms * G_TIME_SPAN_MILLISECOND;
	int n;

	/* Not by GLib's descriptor of the cancellable: that ends the process where there is none left. */
	do {
		n = poll(&ready, 1, CANCEL_LOOK_MS);
		if (g_cancellable_set_error_if_cancelled(cancel, error))
			return FALSE;
	} while (n <= 0 && g_get_monotonic_time() < deadline);
	if (n <= 0)
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_TIMEOUT,
			    "QEMU's device state does not move on");
	return n > 0;
}

/* Save */

/* `migrate`, asked by a thread of its own: before QEMU's main loop answers, its migration may have the lock that the answer
 * takes, and wait in turn for somebody to read the stream. */
static gpointer migrate_thread(gpointer opaque)
{
	PrQemuStream *stream = opaque;
	g_autoptr(GError) refused = NULL;
	gboolean ok = pr_qmp_command(stream->qmp, "migrate", uri_arguments(), -1, &refused);

	g_mutex_lock(&stream->lock);
	stream->answered = TRUE;
	if (!ok) {
		stream->refused = g_steal_pointer(&refused);
		/* Nothing comes then: whoever reads is to see an end. */
		if (stream->save_fd >= 0)
			shutdown(stream->save_fd, SHUT_RDWR);
	}
	tell_locked(stream);
	g_mutex_unlock(&stream->lock);
	return NULL;
}

/* Has QEMU write its stream; returns where it can be read. It stays open until the save has ended. */
static int begin_save(PrQemuStream *stream, GError **error)
{
	int fd = prepared_socket(stream, error);

	if (fd < 0)
		return -1;
	g_mutex_lock(&stream->lock);
	g_clear_pointer(&stream->end, g_free);
	g_clear_error(&stream->refused);
	stream->stopped = stream->ran_again = stream->answered = FALSE;
	close_fd(&stream->save_fd);
	stream->save_fd = fd;
	g_mutex_unlock(&stream->lock);
	g_byte_array_set_size(stream->early, 0);
	stream->migrating = g_thread_try_new("migrate", migrate_thread, stream, error);
	return stream->migrating ? fd : -1;
}

/* Whether QEMU has taken the command; waits for its answer, which is bounded as all of them are. */
static gboolean was_accepted(PrQemuStream *stream, GError **error)
{
	if (stream->migrating)
		g_thread_join(g_steal_pointer(&stream->migrating));
	if (!stream->refused)
		return TRUE;
	g_propagate_error(error, g_error_copy(stream->refused));
	return FALSE;
}

/* QEMU must not go on waiting for us to read, or it would not answer. */
static void end_save(PrQemuStream *stream)
{
	g_mutex_lock(&stream->lock);
	if (stream->save_fd >= 0)
		shutdown(stream->save_fd, SHUT_RDWR);
	g_mutex_unlock(&stream->lock);
	was_accepted(stream, NULL);
	g_mutex_lock(&stream->lock);
	close_fd(&stream->save_fd);
	g_mutex_unlock(&stream->lock);
	g_byte_array_set_size(stream->early, 0);
}

/* Bytes, 0: the stream has ended, -1: an error, -2: there is nothing now. */
static ssize_t read_some(int fd, void *chunk, GError **error)
{
	ssize_t n = recv(fd, chunk, SAVE_CHUNK, MSG_DONTWAIT);

	if (n >= 0)
		return n;
	if (errno == EINTR || errno == EAGAIN)
		return -2;
	g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_DIED, "QEMU's device state broke off: %s",
		    g_strerror(errno));
	return -1;
}

/* What came before the guest had stopped. */
static ssize_t read_early(PrQemuStream *stream, int fd, GError **error)
{
	guint len = stream->early->len;
	ssize_t n;

	g_byte_array_set_size(stream->early, len + SAVE_CHUNK);
	n = read_some(fd, stream->early->data + len, error);
	g_byte_array_set_size(stream->early, len + MAX(n, 0));
	return n;
}

/* -1: not yet; else whether it has stopped, and the command was accepted. */
static int has_stopped(PrQemuStream *stream, GError **error)
{
	g_autofree char *end = NULL;
	gboolean stopped, answered;

	g_mutex_lock(&stream->lock);
	answered = stream->answered;
	stopped = stream->stopped;
	if (stream->dead)
		g_set_error_literal(error, PR_GUEST_ERROR, PR_GUEST_ERROR_DIED, stream->dead);
	gboolean dead = stream->dead != NULL;
	end = g_strdup(stream->end);
	g_mutex_unlock(&stream->lock);
	if (dead)
		return FALSE;
	if (!answered)
		return -1;
	if (!was_accepted(stream, error))
		return FALSE;
	if (stopped)
		return TRUE;
	if (!end)
		return -1;
	if (check_completed(stream, end, "save", error))
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL,
			    "QEMU says that its device state is saved, and not that the guest has "
			    "stopped");
	return FALSE;
}

static gboolean read_until_stopped(PrQemuStream *stream, int fd, GError **error)
{
	gint64 now = g_get_monotonic_time();
	gint64 force = now + STOP_AFTER_US;
	gint64 deadline = now + STOP_AFTER_US + (gint64)stream->timeout_ms * 1000;
	gboolean forced = FALSE, eof = FALSE;
	int stopped;

	while ((stopped = has_stopped(stream, error)) < 0) {
		struct pollfd fds[] = {{.fd = stream->wake_fd, .events = POLLIN},
				       {.fd = eof ? -1 : fd, .events = POLLIN}};
		eventfd_t ignored;

		now = g_get_monotonic_time();
		if (!forced && (now >= force || stream->early->len >= EARLY_MAX)) {
			forced = TRUE;
			if (!pr_qmp_command(stream->qmp, "stop", NULL, -1, error))
				return FALSE;
		}
		if (now >= deadline) {
			g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_TIMEOUT,
				    "QEMU did not stop the guest in time");
			return FALSE;
		}
		poll(fds, G_N_ELEMENTS(fds), 1 + (int)(((forced ? deadline : force) - now) / 1000));
		eventfd_read(stream->wake_fd, &ignored);
		if (fds[1].revents) {
			ssize_t n = read_early(stream, fd, error);
			if (n == -1)
				return FALSE;
			eof = n == 0;
		}
	}
	return stopped;
}

gboolean pr_qemu_stream_stop(PrQemuStream *stream, GError **error)
{
	int fd = begin_save(stream, error);

	if (fd >= 0 && read_until_stopped(stream, fd, error))
		return TRUE;
	end_save(stream);
	return FALSE;
}

static gboolean read_stream(PrQemuStream *stream, int fd, GCancellable *cancel, PrGuestSink sink,
			    void *opaque, GError **error)
{
	g_autofree char *chunk = g_malloc(SAVE_CHUNK);

	for (;;) {
		ssize_t n;

		if (!wait_for_socket(fd, POLLIN, stream->timeout_ms, cancel, error))
			return FALSE;
		n = read_some(fd, chunk, error);
		if (n == 0)
			return TRUE;
		if (n == -1 || (n > 0 && !sink(chunk, n, opaque, error)))
			return FALSE;
	}
}

/* Of a guest whose memory has gone on changing, what the destination has read is worthless. */
static gboolean check_stopped(PrQemuStream *stream, GError **error)
{
	g_mutex_lock(&stream->lock);
	gboolean ran_again = stream->ran_again;
	g_mutex_unlock(&stream->lock);
	if (ran_again)
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_REFUSED,
			    "somebody let the guest run while its device state was saved");
	return !ran_again;
}

gboolean pr_qemu_stream_save(PrQemuStream *stream, GCancellable *cancel, PrGuestSink sink,
			     void *opaque, GError **error)
{
	g_autofree char *end = NULL;
	gboolean ok;
	int fd;

	g_mutex_lock(&stream->lock);
	fd = stream->save_fd;
	g_mutex_unlock(&stream->lock);
	if (fd < 0)
		fd = begin_save(stream, error);
	ok = fd >= 0 &&
	     (!stream->early->len ||
	      sink(stream->early->data, stream->early->len, opaque, error)) &&
	     read_stream(stream, fd, cancel, sink, opaque, error);
	/* The end of the stream may be that of a command that was refused. */
	ok = ok && was_accepted(stream, error);
	end_save(stream);
	if (!ok)
		return FALSE;
	end = wait_for_end(stream, 1, cancel, error);
	return end && check_completed(stream, end, "save", error) && check_stopped(stream, error);
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

	pr_qemu_add_capability(defaults, "x-ignore-shared", FALSE);
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
	gboolean ok;

	/* QEMU's end of one that was not used goes with the next getfd. */
	g_mutex_lock(&stream->lock);
	close_fd(&stream->ready_fd);
	old = g_steal_pointer(&stream->old_caps);
	bandwidth = stream->old_bandwidth;
	g_mutex_unlock(&stream->lock);
	end_save(stream);
	ok = !old || (cancel_migration(stream, error) &&
		      pr_qemu_set_bandwidth(stream->qmp, bandwidth, error) &&
		      pr_qemu_set_capabilities(stream->qmp, old, error));
	return ok;
}

/* Load */

gboolean pr_qemu_stream_load_begin(PrQemuStream *stream, GError **error)
{
	int fd = prepared_socket(stream, error);

	if (fd < 0)
		return FALSE;
	forget_end(stream);
	g_mutex_lock(&stream->lock);
	stream->stopped = TRUE;
	stream->ran_again = FALSE;
	g_mutex_unlock(&stream->lock);
	/* The state of a guest that ran until it was saved lets it run as soon as it is loaded, unless QEMU has
	 * been told to stop by then. */
	if (!pr_qmp_command(stream->qmp, "stop", NULL, -1, error)) {
		close(fd);
		return FALSE;
	}
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

/* QEMU tells its end when it has decided whether the guest runs. */
static gboolean check_not_running(PrQemuStream *stream, GError **error)
{
	g_mutex_lock(&stream->lock);
	gboolean runs = stream->ran_again;
	g_mutex_unlock(&stream->lock);

	if (runs)
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL,
			    "the guest runs already, before it was told to");
	return !runs;
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
	return end && check_completed(stream, end, "load", error) &&
	       check_not_running(stream, error);
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
