/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "tests/fuzz/reach.h"

#include "transport/control/hello-queue.c"
#include "transport/control/listener.c"

#define HANDSHAKE_MS 10000

PrListener *reach_listener_new(const PrUri *uri, const PrTransportOps *ops, PrDataListener *data,
			       PrOnHello on_hello, void *opaque)
{
	PrListener *listener = g_new0(PrListener, 1);

	listener->uri = pr_uri_copy(uri);
	listener->ops = ops;
	listener->data = data;
	listener->handshake_ms = HANDSHAKE_MS;
	listener->on_hello = on_hello;
	listener->opaque = opaque;
	listener->stop = PR_WAKER_INIT;
	g_mutex_init(&listener->log_limit.lock);
	listener->sockets = g_ptr_array_new_with_free_func(g_object_unref);
	listener->pending = g_ptr_array_new_with_free_func((GDestroyNotify)pr_pending_conn_free);
	listener->hellos = g_new0(PrHelloQueue, 1);
	listener->hellos->handler = handle_hello;
	listener->hellos->opaque = listener;
	g_mutex_init(&listener->hellos->lock);
	g_cond_init(&listener->hellos->changed);
	return listener;
}

void reach_listener_free(PrListener *listener)
{
	pr_listener_free(listener);
}

void reach_listener_accept(PrListener *listener, int fd)
{
	/* A connection that arrives while this HELLO is handled waits in its own call of this
	 * function. */
	guint others = listener->pending->len;

	accept_conn(listener, fd);
	while (listener->pending->len > others) {
		/* The connection has sent nothing yet: this sends the next bytes of the script. */
		fuzz_wait_fd(fd, POLLIN, 0, NULL);
		if (!advance(listener, listener->pending->pdata[others]))
			g_ptr_array_remove_index(listener->pending, others);
	}
	if (!g_queue_is_empty(&listener->hellos->pending))
		handle_next(listener->hellos);
}
