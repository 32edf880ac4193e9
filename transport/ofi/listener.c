/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The destination's passive endpoint. Connect requests carry an encoded PrLaneHello. A thread of its own
 * takes them in; at the desk they meet the accept()s that wait for them.
 *
 * libfabric 1.17 (providers net and tcp) reads a request from the new socket with a blocking recv(2). A
 * stranger that sends half a request would hold the thread for as long as it likes. New sockets inherit
 * SO_RCVTIMEO from the listening one, so that is set, on the one socket of this process that listens
 * at the endpoint's address; endpoints later make their socket non-blocking, where it has no effect.
 * What remains: the provider forgets to close the socket of such a half request.
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
	PrDataListener base;
	struct fi_info *info;
	PrOfiEvents events;  /* the thread's */
	struct fid_pep *pep; /* constant, as is port */
	uint16_t port;
	PrPollSet waker; /* of the thread; wake: anyone */
	GThread *thread;
	gint closing;	      /* atomic */
	PrPendingLanes *desk; /* of struct fi_info*, connect requests */
} OfiListener;

static void listener_free(OfiListener *listener)
{
	if (listener->thread) {
		g_atomic_int_set(&listener->closing, TRUE);
		pr_poll_set_wake(&listener->waker);
		g_thread_join(listener->thread);
	}
	pr_pending_lanes_free(listener->desk);
	if (listener->pep)
		fi_close(&listener->pep->fid);
	pr_poll_set_clear(&listener->waker);
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

void pr_ofi_listener_reject(PrDataListener *listener, struct fi_info *info)
{
	static const uint8_t reason = 1; /* any data: tells us from a host that refuses */

	fi_reject(((OfiListener *)listener)->pep, info->handle, &reason, sizeof(reason));
	fi_freeinfo(info);
}

/* PrLaneRefuse */
static void refuse(gpointer request, const char *reason, gpointer opaque)
{
	pr_ofi_listener_reject(opaque, request);
}

static void take_event(OfiListener *listener, const PrOfiEvent *event)
{
	/* Some providers pad private data. */
	gsize size = MIN(event->n_data, PR_LANE_HELLO_BYTES);
	PrLaneHello hello;

	if (event->error || event->type != FI_CONNREQ)
		return;
	if (pr_lane_hello_decode(event->data, size, &hello, NULL))
		pr_pending_lanes_offer(listener->desk, event->info, &hello);
	else
		pr_ofi_listener_reject(&listener->base, event->info);
}

static gpointer listener_thread(gpointer opaque)
{
	OfiListener *listener = opaque;
	struct pollfd fd = {.fd = listener->waker.epoll_fd, .events = POLLIN};

	while (!g_atomic_int_get(&listener->closing)) {
		PrOfiEvent event = {0};

		if (pr_ofi_events_read(&listener->events, &event))
			take_event(listener, &event);
		else if (pr_ofi_events_may_sleep(&listener->events, NULL))
			/* Ended by a request, or by the waker when it closes. */
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
	listener->base.ops = &pr_transport_ofi;
	listener->waker = PR_POLL_SET_INIT;
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
	if (!pr_poll_set_init(&listener->waker, error) ||
	    !pr_poll_set_add(&listener->waker, pr_ofi_events_fd(&listener->events), error))
		return NULL;
	listener->desk = pr_pending_lanes_new(refuse, listener, error);
	if (!listener->desk)
		return NULL;
	listener->thread = pr_thread_try("pr-ofi-listen", listener_thread, listener, error);
	return listener->thread ? &g_steal_pointer(&listener)->base : NULL;
}

uint16_t pr_ofi_listener_port(PrDataListener *listener)
{
	return ((OfiListener *)listener)->port;
}

/* Data lanes of ofi: never come in on the control port. */
void pr_ofi_offer(PrDataListener *listener, GSocketConnection *connection, const PrLaneHello *hello)
{
	g_object_unref(connection);
}

void pr_ofi_listener_close(PrDataListener *listener)
{
	listener_free((OfiListener *)listener);
}

PrPendingLanes *pr_ofi_listener_desk(PrDataListener *listener)
{
	return ((OfiListener *)listener)->desk;
}
