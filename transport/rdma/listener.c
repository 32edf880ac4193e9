/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The destination's listening id. A thread of the listener reads rdma_cm's events, for two
 * reasons:
 *  - Connect requests may come before an accept() waits for them. They are kept in `pending`
 *    until then.
 *  - When the device is removed, the kernel waits until this process has released it. The thread
 *    releases it, and listens again as soon as the address is on an RDMA device again.
 *
 * librdmacm keeps the device open all the same. Most drivers remove it nevertheless; soft-RoCE
 * waits for the end of the process. rdma_get_devices() would make librdmacm look again, but may
 * block for ever: librdmacm 44 takes a lock twice there.
 */
#include <arpa/inet.h>
#include <errno.h>

#include "transport/backends.h"
#include "transport/lane-rendezvous.h"
#include "transport/net/dial.h"
#include "transport/rdma/path.h"
#include "util/try-alloc.h"

#define BACKLOG	    16
#define RELISTEN_MS 250
#define RESOLVE_MS  5000

typedef struct VerbsListener {
	PrBackendListener base; /* pending: PrVerbsRequest* */
	/* constant */
	PrUri *uri;
	PrVerbsOptions options;
	struct sockaddr_storage address; /* with the port that rdma_cm chose, if it was 0 */
	PrPollSet poll_set;		 /* of the thread; any thread wakes */
	GThread *thread;

	gint closing; /* atomic */
	/* Owned by the thread, and by pr_verbs_listen() before it starts: */
	struct rdma_event_channel *channel;
	struct rdma_cm_id *id; /* NULL while the device is removed */
} VerbsListener;

static void refuse(gpointer data, const char *reason, gpointer opaque)
{
	PrVerbsRequest *request = data;

	pr_verbs_reject(request->id, reason);
	g_free(request);
}

static void listener_free(VerbsListener *listener)
{
	if (listener->thread) {
		g_atomic_int_set(&listener->closing, TRUE);
		pr_poll_set_wake(&listener->poll_set);
		g_thread_join(listener->thread);
	}
	pr_pending_lanes_free(listener->base.pending);
	if (listener->id)
		rdma_destroy_id(listener->id);
	if (listener->channel)
		rdma_destroy_event_channel(listener->channel);
	pr_poll_set_clear(&listener->poll_set);
	pr_uri_free(listener->uri);
	g_free(listener);
}
G_DEFINE_AUTOPTR_CLEANUP_FUNC(VerbsListener, listener_free)

/* The port of an address of either family, in network order. */
static in_port_t *port_of(VerbsListener *listener)
{
	if (listener->address.ss_family == AF_INET6)
		return &((struct sockaddr_in6 *)&listener->address)->sin6_port;
	return &((struct sockaddr_in *)&listener->address)->sin_port;
}

static gboolean check_bound(VerbsListener *listener, GError **error)
{
	const char *wanted = listener->options.device;
	const char *name =
		listener->id->verbs ? ibv_get_device_name(listener->id->verbs->device) : NULL;

	if (!wanted || !g_strcmp0(wanted, name))
		return TRUE;
	g_set_error(
		error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT,
		"path %s: option dev=%s, but that address is on %s; listen at the address of %s, "
		"or leave dev out",
		listener->uri->text, wanted, name ? name : "all devices", wanted);
	return FALSE;
}

/* If the address has port 0, rdma_cm chooses one. */
static gboolean open_id(VerbsListener *listener, GError **error)
{
	const PrUri *uri = listener->uri;

	if (rdma_create_id(listener->channel, &listener->id, NULL, RDMA_PS_TCP))
		return pr_verbs_error(uri, "no rdma_cm id", errno, error);
	if (rdma_bind_addr(listener->id, (struct sockaddr *)&listener->address))
		return pr_verbs_error(uri, "cannot listen for RDMA connections at that address",
				      errno, error);
	if (!check_bound(listener, error))
		return FALSE;
	if (rdma_listen(listener->id, BACKLOG))
		return pr_verbs_error(uri, "cannot listen for RDMA connections", errno, error);
	if (!*port_of(listener))
		*port_of(listener) = rdma_get_src_port(listener->id);
	return TRUE;
}

/* ---- the thread ---- */

static void keep_request(VerbsListener *listener, const PrVerbsEvent *event)
{
	/* rdma_cm pads private data. */
	gsize size = MIN(event->n_data, PR_LANE_HELLO_BYTES);
	PrLaneHello hello;
	PrVerbsRequest *request;

	if (!pr_lane_hello_decode(event->data, size, &hello, NULL)) {
		pr_verbs_reject(event->id, "not the Postroad protocol");
		return;
	}
	request = g_new0(PrVerbsRequest, 1);
	request->id = event->id;
	request->depth = event->depth;
	pr_pending_lanes_offer(listener->base.pending, request, &hello);
}

static gboolean has_id(gconstpointer request, gconstpointer id)
{
	return ((const PrVerbsRequest *)request)->id == id;
}

/* Drops a request that ended before an accept() claimed it. */
static void drop_request(VerbsListener *listener, const struct rdma_cm_id *id)
{
	PrVerbsRequest *found = pr_pending_lanes_withdraw(listener->base.pending, has_id, id);

	if (found)
		refuse(found, "the request has ended", NULL);
}

static void handle_event(VerbsListener *listener, const PrVerbsEvent *event)
{
	if (event->type == RDMA_CM_EVENT_CONNECT_REQUEST) {
		keep_request(listener, event);
	} else if (event->id != listener->id) {
		drop_request(listener, event->id);
	} else if (event->type == RDMA_CM_EVENT_DEVICE_REMOVAL) {
		g_message("path %s: the RDMA device was removed; listening again when it is back",
			  listener->uri->text);
		g_clear_pointer(&listener->id, rdma_destroy_id);
	}
}

static void listen_again(VerbsListener *listener)
{
	g_autoptr(GError) error = NULL;

	if (open_id(listener, &error)) {
		g_message("path %s: listening again", listener->uri->text);
		return;
	}
	g_debug("%s", error->message);
	if (listener->id)
		g_clear_pointer(&listener->id, rdma_destroy_id);
}

static gpointer listener_thread(gpointer opaque)
{
	VerbsListener *listener = opaque;
	struct pollfd fd = {.fd = listener->poll_set.epoll_fd, .events = POLLIN};

	while (!g_atomic_int_get(&listener->closing)) {
		PrVerbsEvent event;

		if (!listener->id)
			listen_again(listener);
		while (pr_verbs_next_event(listener->channel, &event))
			handle_event(listener, &event);
		poll(&fd, 1, listener->id ? -1 : RELISTEN_MS);
	}
	return NULL;
}

/* ---- entries of the ops table ---- */

static gboolean find_address(VerbsListener *listener, GError **error)
{
	gint64 deadline = pr_backend_deadline(RESOLVE_MS);
	g_autoptr(GPtrArray) addresses =
		pr_resolve(listener->uri->host, listener->uri->port, deadline, NULL, error);

	if (!addresses) {
		g_prefix_error(error, "path %s: ", listener->uri->text);
		return FALSE;
	}
	return g_socket_address_to_native(addresses->pdata[0], &listener->address,
					  sizeof(listener->address), error);
}

static gboolean open_waker(VerbsListener *listener, GError **error)
{
	return pr_poll_set_init(&listener->poll_set, error) &&
	       pr_poll_set_add(&listener->poll_set, listener->channel->fd, error);
}

PrDataListener *pr_verbs_listen(const PrUri *uri, GError **error)
{
	g_autoptr(VerbsListener) listener = g_new0(VerbsListener, 1);

	listener->base.base.ops = pr_transport_rdma;
	listener->uri = pr_uri_copy(uri);
	listener->poll_set = PR_POLL_SET_INIT;
	if (!pr_verbs_parse_options(listener->uri, &listener->options, error) ||
	    !find_address(listener, error))
		return NULL;
	listener->channel = pr_verbs_open_channel(uri, error);
	if (!listener->channel || !open_waker(listener, error) || !open_id(listener, error))
		return NULL;
	listener->base.pending = pr_pending_lanes_new(refuse, NULL, error);
	if (!listener->base.pending)
		return NULL;
	listener->thread = pr_thread_try("pr-rdma-listen", listener_thread, listener, error);
	return listener->thread ? &g_steal_pointer(&listener)->base.base : NULL;
}

uint16_t pr_verbs_listener_port(PrDataListener *base)
{
	return ntohs(*port_of((VerbsListener *)base));
}

void pr_verbs_listener_close(PrDataListener *listener)
{
	listener_free((VerbsListener *)listener);
}
