/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "transport/net/dial.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "transport/path-error.h"
#include "util/try-alloc.h"

#define CANCEL_CHECK_MS 20

char *pr_address_text(GSocketAddress *address)
{
	return g_socket_connectable_to_string(G_SOCKET_CONNECTABLE(address));
}

char *pr_peer_text(GSocketConnection *connection)
{
	g_autoptr(GSocketAddress) address =
		g_socket_connection_get_remote_address(connection, NULL);

	return address ? pr_address_text(address) : g_strdup("an unknown address");
}

static int ms_left(gint64 deadline)
{
	gint64 left = deadline - g_get_monotonic_time();

	return left <= 0 ? 0 : MIN((left + 999) / 1000, G_MAXINT);
}

/* Checks the cancellable every CANCEL_CHECK_MS. Its descriptor is not polled, because GLib aborts
 * the process where it cannot open that. */
PrWait pr_wait_fd(int fd, short events, gint64 deadline, GCancellable *cancel)
{
	struct pollfd ready = {.fd = fd, .events = events};

	for (;;) {
		int left = ms_left(deadline);
		int n = poll(&ready, 1, cancel ? MIN(left, CANCEL_CHECK_MS) : left);

		if (g_cancellable_is_cancelled(cancel))
			return PR_WAIT_CANCELLED;
		if (n > 0)
			return PR_WAIT_READY;
		if (n == 0 && ms_left(deadline) == 0)
			return PR_WAIT_TIMEOUT;
	}
}

/*
 * Looking up a name: GResolver's asynchronous call in a main context of our own, because its
 * blocking call has no time limit.
 */
typedef struct Lookup {
	GCancellable *give_up; /* cancelled by the time limit and by the caller's cancellable */
	GList *addresses;
	GError *error;
	gboolean done, timed_out;
} Lookup;

static void lookup_done(GObject *resolver, GAsyncResult *result, gpointer opaque)
{
	Lookup *lookup = opaque;

	lookup->addresses =
		g_resolver_lookup_by_name_finish(G_RESOLVER(resolver), result, &lookup->error);
	lookup->done = TRUE;
}

static gboolean lookup_timed_out(gpointer opaque)
{
	Lookup *lookup = opaque;

	lookup->timed_out = TRUE;
	g_cancellable_cancel(lookup->give_up);
	return G_SOURCE_REMOVE;
}

static void lookup_cancelled(GCancellable *cancel, gpointer give_up)
{
	g_cancellable_cancel(give_up);
}

static void lookup_run(Lookup *lookup, const char *host, int timeout_ms, GCancellable *cancel)
{
	g_autoptr(GMainContext) context = g_main_context_new();
	g_autoptr(GResolver) resolver = g_resolver_get_default();
	g_autoptr(GSource) timer = g_timeout_source_new(timeout_ms);
	gulong chained = 0;

	g_main_context_push_thread_default(context);
	g_source_set_callback(timer, lookup_timed_out, lookup, NULL);
	g_source_attach(timer, context);
	if (cancel)
		chained = g_cancellable_connect(cancel, G_CALLBACK(lookup_cancelled),
						g_object_ref(lookup->give_up), g_object_unref);
	g_resolver_lookup_by_name_async(resolver, host, lookup->give_up, lookup_done, lookup);
	while (!lookup->done)
		g_main_context_iteration(context, TRUE);
	g_cancellable_disconnect(cancel, chained);
	g_source_destroy(timer);
	g_main_context_pop_thread_default(context);
}

static GPtrArray *lookup_addresses(const Lookup *lookup, uint16_t port)
{
	GPtrArray *addresses = g_ptr_array_new_with_free_func(g_object_unref);

	for (GList *l = lookup->addresses; l; l = l->next)
		g_ptr_array_add(addresses, g_inet_socket_address_new(l->data, port));
	return addresses;
}

static GPtrArray *look_up(const char *host, uint16_t port, gint64 deadline, GCancellable *cancel,
			  GError **error)
{
	g_autoptr(GCancellable) give_up = g_cancellable_new();
	g_autoptr(GPtrArray) addresses = NULL;
	Lookup lookup = {.give_up = give_up};

	if (!pr_check_fd_headroom(error) || !pr_probe_thread(error))
		return NULL;
	g_debug("looking up the name %s", host);
	lookup_run(&lookup, host, ms_left(deadline), cancel);
	if (lookup.addresses)
		addresses = lookup_addresses(&lookup, port);
	else if (g_cancellable_set_error_if_cancelled(cancel, error))
		addresses = NULL;
	else if (lookup.timed_out)
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_TIMEOUT,
			    "looking up the name %s took too long; give an address", host);
	else
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT,
			    "the name %s could not be looked up: %s; give an address", host,
			    lookup.error->message);
	g_resolver_free_addresses(lookup.addresses);
	g_clear_error(&lookup.error);
	return g_steal_pointer(&addresses);
}

GPtrArray *pr_resolve(const char *host, uint16_t port, gint64 deadline, GCancellable *cancel,
		      GError **error)
{
	GSocketAddress *address = g_inet_socket_address_new_from_string(host, port);
	GPtrArray *addresses;

	if (!address)
		return look_up(host, port, deadline, cancel, error);
	addresses = g_ptr_array_new_with_free_func(g_object_unref);
	g_ptr_array_add(addresses, address);
	return addresses;
}

void pr_configure_socket(GSocket *socket)
{
	g_autoptr(GError) error = NULL;

	/* The user's end of a TLS connection, whose TCP socket was configured before. */
	if (g_socket_get_family(socket) == G_SOCKET_FAMILY_UNIX)
		return;
	if (!g_socket_set_option(socket, IPPROTO_TCP, TCP_NODELAY, 1, &error))
		g_info("TCP_NODELAY: %s", error->message);
}

static gboolean bind_local(GSocket *socket, const PrUri *uri, GError **error)
{
	const char *local = g_hash_table_lookup(uri->options, "bind");
	g_autoptr(GSocketAddress) address = NULL;

	if (!local)
		return TRUE;
	address = g_inet_socket_address_new_from_string(local, 0);
	if (!address) {
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT,
			    "option bind=%s is not an address", local);
		return FALSE;
	}
	if (g_socket_bind(socket, address, FALSE, error))
		return TRUE;
	g_prefix_error(error, "option bind=%s: ", local);
	return FALSE;
}

/*
 * Connecting. The kernel sends a lost first packet again after a second, which is as long as a
 * whole recovery takes; and the kernel of a flooded listener drops some of them. So every
 * AGAIN_US another try starts, with a port of its own. The first that connects is used, and the
 * others are closed.
 */
#define TRIES_MAX 4
#define AGAIN_US  250000

typedef struct Tries {
	GSocket *sockets[TRIES_MAX];
	guint n;
	int epoll_fd; /* tells which of them have connected or failed */
} Tries;

static void tries_clear(Tries *tries)
{
	for (guint i = 0; i < tries->n; i++)
		g_object_unref(tries->sockets[i]);
	if (tries->epoll_fd >= 0)
		close(tries->epoll_fd);
}
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(Tries, tries_clear)

static gboolean start_try(Tries *tries, const PrUri *uri, GSocketAddress *address, GError **error)
{
	struct epoll_event event = {.events = EPOLLOUT, .data.u32 = tries->n};
	g_autoptr(GError) local = NULL;
	g_autoptr(GSocket) socket =
		g_socket_new(g_socket_address_get_family(address), G_SOCKET_TYPE_STREAM,
			     G_SOCKET_PROTOCOL_TCP, error);

	if (!socket)
		return FALSE;
	g_socket_set_blocking(socket, FALSE);
	if (!bind_local(socket, uri, error))
		return FALSE;
	if (!g_socket_connect(socket, address, NULL, &local) &&
	    !g_error_matches(local, G_IO_ERROR, G_IO_ERROR_PENDING)) {
		g_propagate_error(error, g_steal_pointer(&local));
		return FALSE;
	}
	if (epoll_ctl(tries->epoll_fd, EPOLL_CTL_ADD, g_socket_get_fd(socket), &event) < 0) {
		g_set_error(error, G_IO_ERROR, g_io_error_from_errno(errno), "epoll: %s",
			    g_strerror(errno));
		return FALSE;
	}
	tries->sockets[tries->n++] = g_steal_pointer(&socket);
	return TRUE;
}

/* The try that has connected. */
static GSocket *take_connected(Tries *tries, GError **error)
{
	struct epoll_event event;
	GSocket *socket;

	if (epoll_wait(tries->epoll_fd, &event, 1, 0) != 1) {
		g_set_error_literal(error, G_IO_ERROR, G_IO_ERROR_TIMED_OUT, "no answer in time");
		return NULL;
	}
	socket = tries->sockets[event.data.u32];
	return g_socket_check_connect_result(socket, error) ? socket : NULL;
}

static GSocket *try_all(Tries *tries, const PrUri *uri, GSocketAddress *address, gint64 deadline,
			GCancellable *cancel, GError **error)
{
	for (;;) {
		gint64 until = MIN(deadline, g_get_monotonic_time() + AGAIN_US);

		/* Only the first try has to start: the others are an addition. */
		if (tries->n < TRIES_MAX &&
		    !start_try(tries, uri, address, tries->n ? NULL : error) && !tries->n)
			return NULL;
		switch (pr_wait_fd(tries->epoll_fd, POLLIN, until, cancel)) {
		case PR_WAIT_READY:
			return take_connected(tries, error);
		case PR_WAIT_CANCELLED:
			g_cancellable_set_error_if_cancelled(cancel, error);
			return NULL;
		case PR_WAIT_TIMEOUT:
			break;
		}
		if (g_get_monotonic_time() < deadline)
			continue;
		g_set_error_literal(error, G_IO_ERROR, G_IO_ERROR_TIMED_OUT, "no answer in time");
		return NULL;
	}
}

static GSocketConnection *connect_one(const PrUri *uri, GSocketAddress *address, gint64 deadline,
				      GCancellable *cancel, GError **error)
{
	g_auto(Tries) tries = {.epoll_fd = epoll_create1(EPOLL_CLOEXEC)};
	GSocket *socket;

	if (tries.epoll_fd < 0) {
		g_set_error(error, G_IO_ERROR, g_io_error_from_errno(errno), "epoll: %s",
			    g_strerror(errno));
		return NULL;
	}
	socket = try_all(&tries, uri, address, deadline, cancel, error);
	if (!socket)
		return NULL;
	pr_configure_socket(socket);
	return g_socket_connection_factory_create_connection(socket);
}

/* What the operator can do about it, as the end of a sentence. */
static const char *remedy_for(const GError *cause)
{
	if (g_error_matches(cause, G_IO_ERROR, G_IO_ERROR_CONNECTION_REFUSED))
		return "; is a destination listening there?";
	if (g_error_matches(cause, G_IO_ERROR, G_IO_ERROR_TIMED_OUT))
		return "; is that host up, and is a firewall in between?";
	if (g_error_matches(cause, G_IO_ERROR, G_IO_ERROR_NETWORK_UNREACHABLE) ||
	    g_error_matches(cause, G_IO_ERROR, G_IO_ERROR_HOST_UNREACHABLE))
		return "; check this host's links and routes, or list another path";
	return "";
}

/* Of a path to which no address answered. */
static void set_dial_error(const PrUri *uri, GSocketAddress *address, const GError *cause,
			   GError **error)
{
	g_autofree char *path = pr_uri_address(uri);
	g_autofree char *text = pr_address_text(address);
	gboolean slow = g_error_matches(cause, G_IO_ERROR, G_IO_ERROR_TIMED_OUT);

	g_set_error(error, PR_PATH_ERROR, slow ? PR_PATH_ERROR_TIMEOUT : PR_PATH_ERROR_CONNECT,
		    "path %s: could not connect to %s: %s%s", path, text, cause->message,
		    remedy_for(cause));
}

GSocketConnection *pr_dial(const PrUri *uri, uint16_t port, gint64 deadline, GCancellable *cancel,
			   GError **error)
{
	g_autoptr(GPtrArray) addresses = pr_resolve(uri->host, port, deadline, cancel, error);
	g_autofree char *path = pr_uri_address(uri);

	if (!addresses) {
		g_prefix_error(error, "path %s: ", path);
		return NULL;
	}
	for (guint i = 0; i < addresses->len; i++) {
		GSocketAddress *address = addresses->pdata[i];
		g_autoptr(GError) local = NULL;
		gint64 now = g_get_monotonic_time();
		/* An address that never answers leaves time for the others. */
		gint64 share = MAX(deadline - now, 0) / (addresses->len - i);
		GSocketConnection *connection =
			connect_one(uri, address, now + share, cancel, &local);

		if (connection)
			return connection;
		if (g_cancellable_set_error_if_cancelled(cancel, error))
			return NULL;
		if (i == addresses->len - 1)
			set_dial_error(uri, address, local, error);
	}
	return NULL;
}
