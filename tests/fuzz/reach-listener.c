/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "tests/fuzz/reach.h"

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
	listener->stop_fd = -1;
	listener->sockets = g_ptr_array_new_with_free_func(g_object_unref);
	listener->strangers = g_ptr_array_new_with_free_func((GDestroyNotify)stranger_free);
	g_mutex_init(&listener->quiet.lock);
	g_mutex_init(&listener->lock);
	g_cond_init(&listener->changed);
	g_queue_init(&listener->visitors);
	return listener;
}

void reach_listener_free(PrListener *listener)
{
	pr_listener_free(listener);
}

/* As hello_main() does it. */
static void receive_visitor(PrListener *listener)
{
	g_autoptr(Visitor) visitor = g_queue_pop_head(&listener->visitors);

	if (!visitor)
		return;
	pr_control_set_handshake(visitor->control,
				 g_get_monotonic_time() + (gint64)HANDSHAKE_MS * 1000, NULL);
	listener->on_hello(g_steal_pointer(&visitor->control), &visitor->hello, listener,
			   listener->opaque);
}

void reach_listener_accept(PrListener *listener, int fd)
{
	/* The peers before this one; their code waits further up the stack. */
	guint others = listener->strangers->len;

	let_in(listener, fd);
	while (listener->strangers->len > others) {
		/* The peer has sent nothing yet: its script continues here. */
		fuzz_wait_fd(fd, POLLIN, 0, NULL);
		if (hear(listener, listener->strangers->pdata[others]))
			g_ptr_array_remove_index(listener->strangers, others);
	}
	receive_visitor(listener);
}
