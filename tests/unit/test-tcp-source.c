/* SPDX-License-Identifier: GPL-2.0-or-later */
/* How the source's side of tcp: treats a destination that violates the protocol. */
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

#include "tests/rigs/transport-rig.h"

/* Acts as a destination: accepts a lane and acknowledges it. */
static GSocketConnection *accept_lane(GSocketListener *listener)
{
	g_autoptr(GByteArray) body = g_byte_array_new();
	uint8_t hello[PR_WIRE_HEADER_BYTES + PR_LANE_HELLO_BYTES], header[PR_WIRE_HEADER_BYTES];
	GSocketConnection *lane = g_socket_listener_accept(listener, NULL, NULL, NULL);
	GIOStream *stream = G_IO_STREAM(lane);

	assert_true(g_input_stream_read_all(g_io_stream_get_input_stream(stream), hello,
					    sizeof(hello), NULL, NULL, NULL));
	pr_u32_encode(body, 0);
	pr_header_encode(header, PR_MSG_LANE_ACK, body->len);
	g_byte_array_prepend(body, header, sizeof(header));
	assert_true(g_output_stream_write_all(g_io_stream_get_output_stream(stream), body->data,
					      body->len, NULL, NULL, NULL));
	return lane;
}

static void request(GSocketConnection *lane, const PrReqPages *req)
{
	uint8_t frame[PR_WIRE_HEADER_BYTES + PR_REQ_PAGES_BYTES];

	pr_header_encode(frame, PR_RP_REQ_PAGES, PR_REQ_PAGES_BYTES);
	pr_req_pages_encode(frame + PR_WIRE_HEADER_BYTES, req);
	assert_true(g_output_stream_write_all(g_io_stream_get_output_stream(G_IO_STREAM(lane)),
					      frame, sizeof(frame), NULL, NULL, NULL));
}

static void a_tcp_source_sends_only_its_regions(void **state)
{
	static const PrReqPages requests[] = {
		{.block = RIG_REGIONS, .start = 0, .length = 4096},
		{.block = 0, .start = RIG_REGION_BYTES, .length = 4096},
		{.block = 0, .start = RIG_REGION_BYTES - 4096, .length = 8192},
		{.block = 1, .start = G_MAXUINT64 - 4095, .length = 4096},
	};

	for (guint i = 0; i < G_N_ELEMENTS(requests); i++) {
		g_autoptr(GSocketListener) listener = g_socket_listener_new();
		GSocketConnection *lanes[RIG_LANES];
		GSocketConnection *bulk;
		g_autoptr(Rig) rig = rig_new("tcp", "");
		GThread *thread;
		uint8_t byte;

		rig->uri->port = g_socket_listener_add_any_inet_port(listener, NULL, NULL);
		rig_fill_source(rig);
		thread = g_thread_new("connect", rig_source_thread, rig);
		for (guint n = 0; n < RIG_LANES; n++)
			lanes[n] = accept_lane(listener);
		bulk = lanes[PR_LANE_BULK];
		g_thread_join(thread);
		request(bulk, &requests[i]);
		rig_await_failure(&rig->source);
		assert_non_null(strstr(rig->source.reason, "destination"));
		assert_true(g_input_stream_read(g_io_stream_get_input_stream(G_IO_STREAM(bulk)),
						&byte, 1, NULL, NULL) <= 0);
		for (guint n = 0; n < RIG_LANES; n++)
			g_object_unref(lanes[n]);
	}
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_tcp_source_sends_only_its_regions),
	};

	rig_main_source(argc, argv);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
