/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The destination's listener of ofi:, a passive endpoint. Connect requests carry an encoded
 * PrLaneHello. A thread of the listener receives them; they wait in `pending` for the accept()
 * that expects them.
 *
 * libfabric 1.17 (providers net and tcp) reads a request from the new socket with a blocking
 * recv(2). So a peer that sends half a request would block the thread for as long as it likes.
 * New sockets inherit SO_RCVTIMEO from the listening one. Therefore the listener sets that option
 * (REQUEST_TIMEOUT_MS) on the one socket of this process that listens at the endpoint's address.
 * Later, endpoints make their socket non-blocking, where the option has no effect. Not handled:
 * the provider never closes the socket of such a half request.
 */
#include "transport/ofi/ofi.h"

#include <rdma/fi_errno.h>
#include <string.h>
#include <sys/socket.h>

#include "transport/backends.h"
#include "transport/lane-rendezvous.h"
#include "util/try-alloc.h"

#define REQUEST_TIMEOUT_MS 100

typedef struct OfiListener {
	PrBackendListener base; /* pending: struct fi_info* of connect requests */
	struct fi_info *info;
	PrOfiEvents events;  /* owned by the thread */
	struct fid_pep *pep; /* constant, as is port */
	uint16_t port;
	PrPollSet poll_set; /* of the thread; any thread wakes */
	GThread *thread;
	gint closing; /* atomic */
} OfiListener;

static void listener_free(OfiListener *listener)
{
	if (listener->thread) {
		g_atomic_int_set(&listener->closing, TRUE);
		pr_poll_set_wake(&listener->poll_set);
		g_thread_join(listener->thread);
	}
	pr_pending_lanes_free(listener->base.pending);
	if (listener->pep)
		fi_close(&listener->pep->fid);
	pr_poll_set_clear(&listener->poll_set);
	pr_ofi_events_close(&listener->events);
	if (listener->info)
		fi_freeinfo(listener->info);
	g_free(listener);
}
G_DEFINE_AUTOPTR_CLEANUP_FUNC(OfiListener, listener_free)

static gboolean listens_at(int fd, const struct sockaddr_storage *address, socklen_t size)
{
	struct sockaddr_storage own;
	socklen_t own_size = sizeof(own), flag_size = sizeof(int);
	int listening = 0;

	return getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &flag_size) == 0 &&
	       listening && getsockname(fd, (struct sockaddr *)&own, &own_size) == 0 &&
	       own_size == size && !memcmp(&own, address, size);
}

static void bound_request_time(const struct sockaddr_storage *address, socklen_t size)
{
	struct timeval limit = {.tv_usec = REQUEST_TIMEOUT_MS * 1000};
	g_autoptr(GDir) dir = g_dir_open("/proc/self/fd", 0, NULL);
	const char *name;

	while (dir && (name = g_dir_read_name(dir))) {
		int fd = (int)g_ascii_strtoll(name, NULL, 10);

		if (listens_at(fd, address, size))
			setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
	}
}

static uint16_t port_of(const struct sockaddr_storage *address, socklen_t size)
{
	g_autoptr(GSocketAddress) parsed =
		g_socket_address_new_from_native((gpointer)address, size);

	if (!parsed || !G_IS_INET_SOCKET_ADDRESS(parsed))
		return 0;
	return g_inet_socket_address_get_port(G_INET_SOCKET_ADDRESS(parsed));
}

static int open_pep(OfiListener *listener)
{
	struct sockaddr_storage address;
	size_t size = sizeof(address);
	int err;

	err = fi_passive_ep(listener->events.fabric, listener->info, &listener->pep, NULL);
	if (!err)
		err = fi_pep_bind(listener->pep, &listener->events.eq->fid, 0);
	if (!err)
		err = fi_listen(listener->pep);
	if (!err)
		err = fi_getname(&listener->pep->fid, &address, &size);
	if (err)
		return err;
	listener->port = port_of(&address, size);
	bound_request_time(&address, size);
	return 0;
}

static void reject(OfiListener *listener, struct fi_info *info)
{
	/* Any data do: they show that this engine rejects, and not the host. */
	static const uint8_t reason = 1;

	fi_reject(listener->pep, info->handle, &reason, sizeof(reason));
	fi_freeinfo(info);
}

static void refuse(gpointer request, const char *reason, gpointer listener)
{
	reject(listener, request);
}

static void handle_event(OfiListener *listener, const PrOfiEvent *event)
{
	/* Some providers pad private data. */
	gsize size = MIN(event->n_data, PR_LANE_HELLO_BYTES);
	PrLaneHello hello;

	if (event->error || event->type != FI_CONNREQ)
		return;
	if (pr_lane_hello_decode(event->data, size, &hello, NULL))
		pr_pending_lanes_offer(listener->base.pending, event->info, &hello);
	else
		reject(listener, event->info);
}

static gpointer listener_thread(gpointer opaque)
{
	OfiListener *listener = opaque;
	struct pollfd fd = {.fd = listener->poll_set.epoll_fd, .events = POLLIN};

	while (!g_atomic_int_get(&listener->closing)) {
		PrOfiEvent event = {0};

		if (pr_ofi_events_read(&listener->events, &event))
			handle_event(listener, &event);
		else if (pr_ofi_events_may_sleep(&listener->events, NULL))
			/* Ended by a request, or by the poll set when the listener closes. */
			poll(&fd, 1, -1);
	}
	return NULL;
}

PrDataListener *pr_ofi_listen(const PrUri *uri, GError **error)
{
	g_autoptr(OfiListener) listener = NULL;
	guint64 port;
	int err;

	if (!pr_ofi_check_options(uri, &port, error))
		return NULL;
	listener = g_new0(OfiListener, 1);
	listener->base.base.ops = &pr_transport_ofi;
	listener->poll_set = PR_POLL_SET_INIT;
	listener->info = pr_ofi_getinfo(uri, port, TRUE, error);
	if (!listener->info)
		return NULL;
	if (!pr_ofi_events_open(&listener->events, listener->info, error)) {
		g_prefix_error(error, "path %s: ", uri->text);
		return NULL;
	}
	err = open_pep(listener);
	if (err) {
		pr_ofi_error(uri, "cannot listen for data lanes", err, error);
		return NULL;
	}
	if (!pr_poll_set_init(&listener->poll_set, error) ||
	    !pr_poll_set_add(&listener->poll_set, pr_ofi_events_fd(&listener->events), error))
		return NULL;
	listener->base.pending = pr_pending_lanes_new(refuse, listener, error);
	if (!listener->base.pending)
		return NULL;
	listener->thread = pr_thread_try("pr-ofi-listen", listener_thread, listener, error);
	return listener->thread ? &g_steal_pointer(&listener)->base.base : NULL;
}

uint16_t pr_ofi_listener_port(PrDataListener *listener)
{
	return ((OfiListener *)listener)->port;
}

void pr_ofi_listener_close(PrDataListener *listener)
{
	listener_free((OfiListener *)listener);
}
