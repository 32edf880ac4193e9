/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * QEMU may touch guest RAM while it loads. Then its main loop waits for a page, and neither reads
 * the state nor answers QMP. So no QMP command is sent between the start of the load and the event
 * at its end. Every wait ends with the deadline, with load_abort(), or with QEMU's death.
 *
 * The state says that the guest ran, so QEMU would let it run as soon as it is loaded. It gets
 * `stop` before, while it waits for its migration, and remembers it. With late-block-activate QEMU
 * locks disk images only when it lets the guest run. Until then the source can still let its guest
 * run again.
 */
#include "guest/qemu-load.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "guest/json.h"
#include "guest/kinds.h"
#include "guest/qemu-blocks.h"
#include "guest/qemu-facts.h"
#include "guest/qemu-private.h"
#include "guest/qemu-query.h"
#include "guest/qemu-section.h"

#define FD_NAME		"postroad"
#define CANCEL_CHECK_MS 20
#define STDERR_MAX	2000 /* the last bytes of QEMU's standard error that go into an error */

struct PrQemuLoad {
	PrQmp *qmp;	      /* constant */
	PrAgentClient *agent; /* constant */
	guint timeout_ms;     /* constant */

	/* The caller's thread; there is one call at a time. */
	PrQemuSectionReader reader;
	GArray *blocks;		     /* PrQemuPrivateBlock; NULL: no FACTS have come */
	PrQemuPrivateBlock *current; /* of blocks: the one of the last BLOCK; NULL: none */
	int memory;		     /* /proc/PID/mem of QEMU; -1: not open */
	gboolean survives_failure;   /* QEMU can be told not to exit when it cannot load */

	GMutex lock;
	GCond cond; /* lock; end or dead changed */
	/* lock; the last status of QEMU's migration: "completed", "failed", …; NULL: it has not
	 * ended */
	char *end;
	char *dead;	       /* lock; why QEMU is gone, or NULL */
	gboolean runs;	       /* lock; QEMU has let the guest run since load_begin() */
	int ready_fd;	       /* lock; a prepared socket, whose other end QEMU has; -1: none */
	int fd;		       /* lock; the socket of the load in progress; -1: none */
	GCancellable *cancel;  /* lock; of the load in progress, or NULL */
	gboolean asked_stderr; /* lock; stderr_fd is final */
	int stderr_fd;	       /* lock; QEMU's standard error; -1: that is not a file */
	off_t stderr_from;     /* lock; its size when the load began, bytes */
};

PrQemuLoad *pr_qemu_load_new(PrQmp *qmp, PrAgentClient *agent, guint timeout_ms)
{
	PrQemuLoad *load = g_new0(PrQemuLoad, 1);

	load->qmp = qmp;
	load->agent = agent;
	load->timeout_ms = timeout_ms;
	load->ready_fd = load->fd = load->memory = load->stderr_fd = -1;
	pr_qemu_section_reader_init(&load->reader);
	g_mutex_init(&load->lock);
	g_cond_init(&load->cond);
	return load;
}

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

void pr_qemu_load_free(PrQemuLoad *load)
{
	close_fd(&load->ready_fd);
	close_fd(&load->fd);
	close_fd(&load->memory);
	close_fd(&load->stderr_fd);
	pr_qemu_section_reader_clear(&load->reader);
	g_clear_pointer(&load->blocks, g_array_unref);
	g_clear_object(&load->cancel);
	g_free(load->end);
	g_free(load->dead);
	g_mutex_clear(&load->lock);
	g_cond_clear(&load->cond);
	g_free(load);
}

/* Events */

static gboolean is_end(const char *status)
{
	static const char *const ends[] = {"completed", "failed", "cancelled", NULL};

	return status && g_strv_contains(ends, status);
}

void pr_qemu_load_event(PrQemuLoad *load, const char *name, JsonObject *data)
{
	const char *status = data ? pr_json_string(data, "status") : NULL;

	g_mutex_lock(&load->lock);
	if (g_str_equal(name, "RESUME")) {
		load->runs = TRUE;
	} else if (g_str_equal(name, "MIGRATION") && is_end(status)) {
		g_free(load->end);
		load->end = g_strdup(status);
		g_cond_broadcast(&load->cond);
	}
	g_mutex_unlock(&load->lock);
}

static void wake_waiters(GCancellable *cancel, gpointer data)
{
	PrQemuLoad *load = data;

	g_mutex_lock(&load->lock);
	g_cond_broadcast(&load->cond);
	g_mutex_unlock(&load->lock);
}

/* With the lock held. Returns the status at the end, or NULL. */
static char *wait_locked(PrQemuLoad *load, gint64 deadline, GCancellable *cancel, GError **error)
{
	while (!load->end) {
		if (load->dead) {
			g_set_error_literal(error, PR_GUEST_ERROR, PR_GUEST_ERROR_DIED, load->dead);
			return NULL;
		}
		if (g_cancellable_set_error_if_cancelled(cancel, error))
			return NULL;
		if (g_cond_wait_until(&load->cond, &load->lock, deadline) || load->end)
			continue;
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_TIMEOUT,
			    "QEMU did not say in time that its device state is loaded");
		return NULL;
	}
	return g_strdup(load->end);
}

static char *wait_for_end(PrQemuLoad *load, guint timeouts, GCancellable *cancel, GError **error)
{
	gint64 deadline = g_get_monotonic_time() +
			  (gint64)load->timeout_ms * timeouts * G_TIME_SPAN_MILLISECOND;
	gulong handler = 0;
	char *end;

	if (cancel)
		handler = g_cancellable_connect(cancel, G_CALLBACK(wake_waiters), load, NULL);
	g_mutex_lock(&load->lock);
	end = wait_locked(load, deadline, cancel, error);
	g_mutex_unlock(&load->lock);
	if (cancel)
		g_cancellable_disconnect(cancel, handler);
	return end;
}

/* What QEMU says of a failure */

/* With the lock held. */
static void note_stderr_size(PrQemuLoad *load)
{
	struct stat st;

	load->stderr_from =
		load->stderr_fd >= 0 && fstat(load->stderr_fd, &st) == 0 ? st.st_size : 0;
}

/* A QEMU older than 9.1 exits when it cannot load, and prints the reason on its standard error
 * only. With the lock held. NULL: standard error is not a file, or has no new text. */
static char *read_stderr(PrQemuLoad *load)
{
	g_autofree char *text = NULL;
	struct stat st;
	off_t from;
	ssize_t n;

	if (load->stderr_fd < 0 || fstat(load->stderr_fd, &st) < 0)
		return NULL;
	from = MAX(load->stderr_from, st.st_size - STDERR_MAX);
	text = g_malloc0(STDERR_MAX + 1);
	n = pread(load->stderr_fd, text, STDERR_MAX, from);
	if (n <= 0)
		return NULL;
	g_strdelimit(g_strchomp(text), "\r\n", ';');
	return g_utf8_make_valid(text, -1);
}

char *pr_qemu_load_died(PrQemuLoad *load, const char *reason)
{
	g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&load->lock);
	g_autofree char *said = load->fd >= 0 ? read_stderr(load) : NULL;

	g_free(load->dead);
	if (load->fd < 0)
		load->dead = g_strdup(reason);
	else
		load->dead =
			g_strdup_printf("QEMU ended while it loaded the device state: %s",
					said		       ? said
					: load->stderr_fd >= 0 ? "it does not say why"
							       : "its standard error says why");
	g_cond_broadcast(&load->cond);
	return g_strdup(load->dead);
}

/* Whether QEMU ends within that time. */
static gboolean has_died(PrQemuLoad *load, guint within_ms, GError **error)
{
	gint64 deadline = g_get_monotonic_time() + (gint64)within_ms * G_TIME_SPAN_MILLISECOND;
	g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&load->lock);

	while (!load->dead && g_cond_wait_until(&load->cond, &load->lock, deadline))
		;
	if (load->dead)
		g_set_error_literal(error, PR_GUEST_ERROR, PR_GUEST_ERROR_DIED, load->dead);
	return load->dead != NULL;
}

/* QEMU has reported a failed load, or has ended. */
static gboolean fail_load(PrQemuLoad *load, GError **error)
{
	g_autoptr(JsonObject) object = NULL;
	const char *desc;

	if (has_died(load, 0, error))
		return FALSE;
	object = pr_qmp_query(load->qmp, "query-migrate", NULL);
	if (!object && has_died(load, load->timeout_ms, error))
		return FALSE;
	desc = object ? pr_json_string(object, "error-desc") : NULL;
	g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_REFUSED,
		    "QEMU could not load the device state: %s",
		    desc ? desc : "it does not say why; its standard error does");
	return FALSE;
}

/* Before the guest is stopped */

static gboolean handle_facts(PrQemuLoad *load, const uint8_t *body, gsize len, GError **error)
{
	g_autoptr(JsonObject) source = pr_qemu_facts_from_text((const char *)body, len, error);
	g_autoptr(JsonObject) here = NULL;

	g_clear_pointer(&load->blocks, g_array_unref);
	load->current = NULL;
	load->blocks = source ? pr_qemu_private_blocks(load->qmp, load->agent, error) : NULL;
	here = load->blocks ? pr_qemu_facts(load->qmp, load->blocks, error) : NULL;
	if (!here || !pr_qemu_facts_check(source, here, error))
		return FALSE;
	close_fd(&load->memory);
	load->memory = pr_agent_client_memory(load->agent, error);
	return load->memory >= 0;
}

static gboolean refuse_section(const char *what, GError **error)
{
	g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL, "the source sends %s", what);
	return FALSE;
}

static gboolean handle_block(PrQemuLoad *load, const uint8_t *name, gsize len, GError **error)
{
	load->current =
		load->blocks ? pr_qemu_private_find(load->blocks, (const char *)name, len) : NULL;
	return load->current ? TRUE : refuse_section("RAM of an unknown block", error);
}

static gboolean handle_pages(PrQemuLoad *load, const uint8_t *body, gsize len, GError **error)
{
	return load->current
		       ? pr_qemu_private_handle_pages(load->current, load->memory, body, len, error)
		       : refuse_section("pages of no RAM block", error);
}

/* PrQemuSectionHandler */
static gboolean handle_early(PrQemuSectionType type, const uint8_t *body, gsize len, void *opaque,
			     GError **error)
{
	PrQemuLoad *load = opaque;

	switch (type) {
	case PR_QEMU_SECTION_FACTS:
		return handle_facts(load, body, len, error);
	case PR_QEMU_SECTION_BLOCK:
		return handle_block(load, body, len, error) &&
		       pr_qemu_private_clear(load->current, load->memory, error);
	case PR_QEMU_SECTION_PAGES:
		return handle_pages(load, body, len, error);
	default:
		return refuse_section("device state before its guest has stopped", error);
	}
}

gboolean pr_qemu_load_early(PrQemuLoad *load, const void *data, gsize len, GError **error)
{
	return pr_qemu_section_read(&load->reader, data, len, handle_early, load, error);
}

static void add_capability(JsonArray *list, const char *name)
{
	JsonObject *object = json_object_new();

	json_object_set_string_member(object, "capability", name);
	json_object_set_boolean_member(object, "state", TRUE);
	json_array_add_object_element(list, object);
}

static gboolean set_capabilities(PrQemuLoad *load, GError **error)
{
	JsonObject *arguments = json_object_new();
	JsonArray *list = json_array_new();

	add_capability(list, "events");
	add_capability(list, "late-block-activate");
	json_object_set_array_member(arguments, "capabilities", list);
	return pr_qmp_command(load->qmp, "migrate-set-capabilities", arguments, -1, error);
}

/* Gives QEMU one end of a socketpair under FD_NAME; returns the other, or -1. */
static int send_socket(PrQemuLoad *load, GError **error)
{
	JsonObject *arguments;
	int pair[2];
	gboolean ok;

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0) {
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL, "socketpair: %s",
			    g_strerror(errno));
		return -1;
	}
	arguments = json_object_new();
	json_object_set_string_member(arguments, "fdname", FD_NAME);
	ok = pr_qmp_command(load->qmp, "getfd", arguments, pair[1], error);
	close(pair[1]);
	if (ok)
		return pair[0];
	close(pair[0]);
	return -1;
}

static int steal_ready_fd(PrQemuLoad *load)
{
	g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&load->lock);
	int fd = load->ready_fd;

	load->ready_fd = -1;
	return fd;
}

/* Since 9.1 QEMU can be told not to exit when it cannot load; then it reports the reason. */
static gboolean query_exit_on_error(PrQemuLoad *load, GError **error)
{
	guint major, minor;

	if (!pr_qemu_version(load->qmp, &major, &minor, error))
		return FALSE;
	load->survives_failure = major > 9 || (major == 9 && minor >= 1);
	return TRUE;
}

/* The socket that pr_qemu_load_prepare() has made, or a new one. */
static int prepared_socket(PrQemuLoad *load, GError **error)
{
	int fd = steal_ready_fd(load);

	if (fd >= 0)
		return fd;
	if (!set_capabilities(load, error) || !query_exit_on_error(load, error))
		return -1;
	return send_socket(load, error);
}

/* Opens QEMU's standard error once, so that errors can quote it. */
static void open_stderr(PrQemuLoad *load)
{
	g_autoptr(GError) error = NULL;
	gboolean asked;
	int fd;

	g_mutex_lock(&load->lock);
	asked = load->asked_stderr;
	load->asked_stderr = TRUE;
	g_mutex_unlock(&load->lock);
	if (asked)
		return;
	fd = pr_agent_client_stderr(load->agent, &error);
	if (error)
		g_debug("%s", error->message);
	g_mutex_lock(&load->lock);
	load->stderr_fd = fd;
	g_mutex_unlock(&load->lock);
}

gboolean pr_qemu_load_prepare(PrQemuLoad *load, GError **error)
{
	int fd = prepared_socket(load, error);

	if (fd < 0)
		return FALSE;
	open_stderr(load);
	pr_qemu_section_reader_reset(&load->reader);
	g_mutex_lock(&load->lock);
	load->ready_fd = fd;
	g_mutex_unlock(&load->lock);
	return TRUE;
}

/* Load */

static gboolean begin_incoming(PrQemuLoad *load, GError **error)
{
	JsonObject *arguments = json_object_new();

	json_object_set_string_member(arguments, "uri", "fd:" FD_NAME);
	if (load->survives_failure)
		json_object_set_boolean_member(arguments, "exit-on-error", FALSE);
	if (pr_qmp_command(load->qmp, "migrate-incoming", arguments, -1, error))
		return TRUE;
	g_prefix_error(error, "start the destination QEMU anew with -incoming defer: ");
	return FALSE;
}

gboolean pr_qemu_load_begin(PrQemuLoad *load, GError **error)
{
	int fd = prepared_socket(load, error);

	if (fd < 0)
		return FALSE;
	pr_qemu_section_reader_reset(&load->reader);
	g_mutex_lock(&load->lock);
	g_clear_pointer(&load->end, g_free);
	load->runs = FALSE;
	note_stderr_size(load);
	g_mutex_unlock(&load->lock);
	if (!pr_qmp_command(load->qmp, "stop", NULL, -1, error) || !begin_incoming(load, error)) {
		close(fd);
		return FALSE;
	}
	g_mutex_lock(&load->lock);
	close_fd(&load->fd);
	load->fd = fd;
	g_clear_object(&load->cancel);
	load->cancel = g_cancellable_new();
	g_mutex_unlock(&load->lock);
	return TRUE;
}

/* load_abort() shuts the socket down and does not close it, so that this thread can use it without
 * the lock. */
static int current_load(PrQemuLoad *load, GCancellable **ret_cancel, GError **error)
{
	g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&load->lock);

	if (load->fd < 0) {
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL,
			    "no device state is being loaded");
		return -1;
	}
	*ret_cancel = g_object_ref(load->cancel);
	return load->fd;
}

/* Waits until the socket can be written to. Ended by a cancellation or the deadline, too. */
static gboolean wait_for_socket(PrQemuLoad *load, int fd, GCancellable *cancel, GError **error)
{
	struct pollfd ready = {.fd = fd, .events = POLLOUT};
	gint64 deadline = g_get_monotonic_time() + (gint64)load->timeout_ms *
							   PR_GUEST_LOAD_TIMEOUTS *
							   G_TIME_SPAN_MILLISECOND;
	int n;

	/* Polls the cancellable, as g_cancellable_get_fd() aborts where no descriptor is left. */
	do {
		n = poll(&ready, 1, CANCEL_CHECK_MS);
		if (g_cancellable_set_error_if_cancelled(cancel, error))
			return FALSE;
	} while (n <= 0 && g_get_monotonic_time() < deadline);
	if (n <= 0)
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_TIMEOUT,
			    "QEMU does not read its device state");
	return n > 0;
}

/* QEMU has closed its end: its load has failed, and it reports that or exits. */
static gboolean fail_send(PrQemuLoad *load, int code, GError **error)
{
	g_autofree char *end = wait_for_end(load, 1, NULL, NULL);

	if (end || code == EPIPE || code == ECONNRESET)
		return fail_load(load, error);
	g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_REFUSED,
		    "QEMU's device state cannot be sent to it: %s", g_strerror(code));
	return FALSE;
}

static gboolean send_state(PrQemuLoad *load, const uint8_t *at, gsize len, GError **error)
{
	g_autoptr(GCancellable) cancel = NULL;
	int fd = current_load(load, &cancel, error);

	if (fd < 0)
		return FALSE;
	while (len > 0) {
		ssize_t n;

		if (!wait_for_socket(load, fd, cancel, error))
			return FALSE;
		n = send(fd, at, len, MSG_DONTWAIT | MSG_NOSIGNAL);
		if (n < 0 && (errno == EINTR || errno == EAGAIN))
			continue;
		if (n < 0)
			return fail_send(load, errno, error);
		at += n;
		len -= n;
	}
	return TRUE;
}

/* PrQemuSectionHandler */
static gboolean handle_late(PrQemuSectionType type, const uint8_t *body, gsize len, void *opaque,
			    GError **error)
{
	PrQemuLoad *load = opaque;

	switch (type) {
	case PR_QEMU_SECTION_BLOCK:
		return handle_block(load, body, len, error);
	case PR_QEMU_SECTION_PAGES:
		return handle_pages(load, body, len, error);
	case PR_QEMU_SECTION_STATE:
		return send_state(load, body, len, error);
	default:
		return refuse_section("facts about its QEMU after its guest has stopped", error);
	}
}

gboolean pr_qemu_load_data(PrQemuLoad *load, const void *data, gsize len, GError **error)
{
	g_autoptr(GCancellable) cancel = NULL;

	return current_load(load, &cancel, error) >= 0 &&
	       pr_qemu_section_read(&load->reader, data, len, handle_late, load, error);
}

/* QEMU sends the event of the end after it has decided whether the guest runs. */
static gboolean check_not_running(PrQemuLoad *load, GError **error)
{
	g_mutex_lock(&load->lock);
	gboolean runs = load->runs;
	g_mutex_unlock(&load->lock);

	if (runs)
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL,
			    "the guest runs already, before it was told to");
	return !runs;
}

static gboolean write_deferred(PrQemuLoad *load, GError **error)
{
	return !load->blocks || !pr_qemu_private_has_deferred(load->blocks) ||
	       pr_qemu_private_write_deferred(load->qmp, load->blocks, load->memory, error);
}

static gboolean await_loaded(PrQemuLoad *load, GCancellable *cancel, GError **error)
{
	g_autoptr(GError) died = NULL;
	g_autofree char *end = wait_for_end(load, PR_GUEST_LOAD_TIMEOUTS, cancel, &died);

	if (end && g_str_equal(end, "completed"))
		return TRUE;
	if (end || g_error_matches(died, PR_GUEST_ERROR, PR_GUEST_ERROR_DIED))
		return fail_load(load, error);
	g_propagate_error(error, g_steal_pointer(&died));
	return FALSE;
}

gboolean pr_qemu_load_end(PrQemuLoad *load, GError **error)
{
	g_autoptr(GCancellable) cancel = NULL;
	int fd = current_load(load, &cancel, error);
	gboolean loaded;

	if (fd < 0)
		return FALSE;
	if (!pr_qemu_section_at_end(&load->reader))
		return refuse_section("a device state that breaks off", error);
	shutdown(fd, SHUT_WR);
	loaded = await_loaded(load, cancel, error);
	g_mutex_lock(&load->lock);
	close_fd(&load->fd);
	g_mutex_unlock(&load->lock);
	return loaded && check_not_running(load, error) && write_deferred(load, error);
}

void pr_qemu_load_abort(PrQemuLoad *load)
{
	g_autoptr(GCancellable) cancel = NULL;

	g_mutex_lock(&load->lock);
	g_set_object(&cancel, load->cancel);
	if (load->fd >= 0)
		shutdown(load->fd, SHUT_RDWR);
	g_mutex_unlock(&load->lock);
	g_cancellable_cancel(cancel);
}
