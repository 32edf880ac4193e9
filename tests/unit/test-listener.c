/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "tests/rigs/control-rig.h"
#include "tests/rigs/flood.h"
#include "transport/net/dial.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void a_peer_that_stalls_does_not_keep_the_real_peer_out(void **state)
{
	g_autoptr(Destination) destination = destination_new_hasty("tcp:127.0.0.1:0", NULL);
	int silent = raw_connect(destination_port(destination));
	int halfway = raw_connect(destination_port(destination));
	g_autoptr(PrControl) source = NULL;

	raw_write(halfway, "\0\1\0\0\0\0", 6);
	source = connect_destination(destination);
	assert_non_null(source);
	/* The listener closes both at their deadline. */
	assert_true(raw_reaches_end(silent));
	assert_true(raw_reaches_end(halfway));
	close(silent);
	close(halfway);
}

static void a_flood_of_silent_connections_does_not_keep_the_peer_out(void **state)
{
	g_autoptr(Destination) destination = destination_new("tcp:127.0.0.1:0");
	int strangers[100];

	for (guint i = 0; i < G_N_ELEMENTS(strangers); i++)
		strangers[i] = raw_connect(destination_port(destination));
	for (guint round = 0; round < 3; round++) {
		g_autoptr(PrControl) source = connect_destination(destination);

		assert_non_null(source);
	}
	/* The oldest was evicted long before its deadline. */
	assert_true(raw_reaches_end(strangers[0]));
	for (guint i = 0; i < G_N_ELEMENTS(strangers); i++)
		close(strangers[i]);
}

/* The source's HELLO arrives in late pieces. */
static void a_flood_from_another_host_does_not_evict_a_slow_peer(void **state)
{
	g_autoptr(Destination) destination = destination_new("tcp:127.0.0.1:0");
	PrHello hello = hello_of(PR_WIRE_VERSION);
	g_autoptr(GByteArray) body = g_byte_array_new();
	uint8_t header[PR_WIRE_HEADER_BYTES], answer[PR_WIRE_HEADER_BYTES];
	int slow = raw_connect(destination_port(destination));

	pr_hello_encode(body, &hello);
	pr_header_encode(header, PR_MSG_HELLO, body->len);
	raw_write(slow, header, 5);
	g_autoptr(Flood) flood = flood_new("127.0.0.2", destination_port(destination), NULL, 0);
	assert_true(flood_wait(flood, 500));
	raw_write(slow, header + 5, sizeof(header) - 5);
	raw_write(slow, body->data, body->len / 2);
	assert_true(flood_wait(flood, 500));
	raw_write(slow, body->data + body->len / 2, body->len - body->len / 2);
	assert_int_equal(recv(slow, answer, sizeof(answer), MSG_WAITALL), sizeof(answer));
	assert_int_equal(answer[1], PR_MSG_HELLO_ACK & 0xff);
	assert_int_equal(destination->hellos, 1);
	close(slow);
}

static void peers_that_send_garbage_are_closed(void **state)
{
	static const struct {
		uint8_t bytes[16];
		gsize length;
	} table[] = {
		{"GET / HTTP/1.1\r\n", 16},
		{{0x00, 0x01, 0, 0, 0x7f, 0xff, 0xff, 0xff}, 8}, /* a HELLO of 2 GiB */
		{{0x02, 0x05, 0, 0, 0x01, 0, 0, 0}, 8},		 /* a bitmap of 16 MiB */
		{{0x00, 0x02, 0, 0, 0, 0, 0, 0}, 8},		 /* HELLO_ACK */
		{{0x00, 0x03, 0, 0, 0, 0, 0, 1, 0x55}, 9},	 /* a LANE of one byte */
		{{0x0a, 0xbc, 0, 0, 0, 0, 0, 0}, 8},		 /* unknown */
	};
	g_autoptr(Destination) destination = destination_new("tcp:127.0.0.1:0");

	for (gsize i = 0; i < G_N_ELEMENTS(table); i++) {
		gint64 began = g_get_monotonic_time();
		int fd = raw_connect(destination_port(destination));

		raw_write(fd, table[i].bytes, table[i].length);
		assert_true(raw_reaches_end(fd));
		/* At once, that is, long before the deadline of the handshake. */
		assert_true(g_get_monotonic_time() - began < LONG_MS * 1000);
		close(fd);
	}
	assert_int_equal(destination->hellos, 0);
}

/* TcpExt's ListenDrops, of this network namespace. */
static guint64 drops(void)
{
	g_autofree char *text = NULL;
	g_auto(GStrv) lines = NULL, names = NULL, values = NULL;

	assert_true(g_file_get_contents("/proc/net/netstat", &text, NULL, NULL));
	lines = g_strsplit(text, "\n", 3);
	names = g_strsplit(lines[0], " ", -1);
	values = g_strsplit(lines[1], " ", -1);
	for (guint i = 0; names[i] && values[i]; i++)
		if (!strcmp(names[i], "ListenDrops"))
			return g_ascii_strtoull(values[i], NULL, 10);
	fail_msg("there is no ListenDrops");
	return 0;
}

static gpointer dial_main(gpointer uri)
{
	gint64 deadline = g_get_monotonic_time() + LONG_MS * 1000;

	return pr_dial(uri, ((PrUri *)uri)->port, deadline, NULL, NULL);
}

/* Returns how many packets the kernel has sent again on the connection that was made in the end. */
static guint lose_first_packet(void)
{
	PrUri *uri;
	int listening = raw_listen(&uri), full, first;
	guint64 before = drops();
	struct tcp_info info;
	socklen_t size = sizeof(info);

	/* The backlog holds one connection, so the kernel drops the next one's first packet. */
	assert_int_equal(listen(listening, 0), 0);
	full = raw_connect(uri->port);
	GThread *dialing = g_thread_new("dial", dial_main, uri);
	while (drops() == before)
		g_usleep(1000);
	first = accept(listening, NULL, NULL);
	assert_true(first >= 0);

	g_autoptr(GSocketConnection) connection = g_thread_join(dialing);
	assert_non_null(connection);
	assert_int_equal(getsockopt(g_socket_get_fd(g_socket_connection_get_socket(connection)),
				    IPPROTO_TCP, TCP_INFO, &info, &size),
			 0);
	close(first);
	close(full);
	close(listening);
	pr_uri_free(uri);
	return info.tcpi_total_retrans;
}

/*
 * The kernel sends a lost packet again after a second. The source connects anew before that, which
 * this test sees. A source that gets no CPU for a second is too late, so there are five tries.
 */
static void a_lost_first_packet_does_not_delay_the_connection(void **state)
{
	for (guint i = 0; i < 5; i++)
		if (lose_first_packet() == 0)
			return;
	fail_msg("the kernel sent the lost packet again in all five tries");
}

static gpointer connect_main(gpointer opaque)
{
	return connect_destination(opaque);
}

static void a_slow_on_hello_does_not_stop_accepting(void **state)
{
	g_autoptr(Destination) destination = destination_new("tcp:127.0.0.1:0");
	GThread *first, *second;
	gint64 began;
	int fd;

	destination_block_hello(destination, TRUE);
	first = g_thread_new("first", connect_main, destination);
	destination_wait_hellos(destination, 1);
	second = g_thread_new("second", connect_main, destination);
	began = g_get_monotonic_time();
	fd = raw_connect(destination_port(destination));
	raw_write(fd, "nonsense", 8);
	assert_true(raw_reaches_end(fd));
	assert_true(g_get_monotonic_time() - began < LONG_MS * 1000);
	close(fd);
	/* One at a time: the second HELLO waits for the first callback. */
	assert_int_equal(destination->hellos, 1);
	destination_block_hello(destination, FALSE);
	destination_wait_hellos(destination, 2);
	pr_control_free(g_thread_join(first));
	pr_control_free(g_thread_join(second));
}

static void a_port_in_use_is_named_with_the_remedy(void **state)
{
	g_autoptr(Destination) destination = destination_new("tcp:127.0.0.1:0");
	g_autofree char *text = pr_uri_address(pr_listener_uri(destination->listener));
	g_autoptr(PrUri) uri = pr_uri_parse(text, TRUE, NULL);
	g_autoptr(GError) error = NULL;

	assert_null(pr_listener_new(uri, NULL, PATIENT_MS, on_hello, destination, NULL, &error));
	assert_true(g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT));
	assert_non_null(strstr(error->message, text));
	assert_non_null(strstr(error->message, "use another port or stop what listens there"));
}

static void an_address_of_another_host_is_refused(void **state)
{
	g_autoptr(PrUri) uri = pr_uri_parse("tcp:192.0.2.1:4444", TRUE, NULL);
	const PrSecurity plain = {.plain_net = TRUE};
	g_autoptr(GError) error = NULL;

	assert_null(pr_listener_new(uri, &plain, PATIENT_MS, on_hello, NULL, NULL, &error));
	assert_non_null(strstr(error->message, "cannot listen on tcp:192.0.2.1:4444"));
	assert_non_null(strstr(error->message, "use an address of this host"));
}

static void port_zero_is_replaced_by_the_real_one(void **state)
{
	g_autoptr(Destination) destination = destination_new("tcp:127.0.0.1:0?bind=127.0.0.1");
	const PrUri *uri = pr_listener_uri(destination->listener);
	g_autofree char *text = g_strdup_printf("tcp:127.0.0.1:%u?bind=127.0.0.1", uri->port);

	assert_true(uri->port > 0);
	assert_string_equal(uri->text, text);
	assert_string_equal(g_hash_table_lookup(uri->options, "bind"), "127.0.0.1");
	assert_non_null(pr_listener_data(destination->listener));
}

static void names_and_ipv6_work(void **state)
{
	static const char *const hosts[] = {"localhost", "[::1]"};

	for (gsize i = 0; i < G_N_ELEMENTS(hosts); i++) {
		g_autofree char *text = g_strdup_printf("tcp:%s:0", hosts[i]);
		g_autoptr(Destination) destination = NULL;
		g_autoptr(PrControl) source = NULL;
		int probe = socket(AF_INET6, SOCK_STREAM, 0);
		struct sockaddr_in6 at = {.sin6_family = AF_INET6, .sin6_addr = in6addr_loopback};
		gboolean has_ipv6 = bind(probe, (struct sockaddr *)&at, sizeof at) == 0;

		close(probe);
		if (hosts[i][0] == '[' && !has_ipv6) {
			print_message("no IPv6 on this host, [::1] is left out\n");
			continue;
		}
		destination = destination_new(text);
		source = connect_destination(destination);
		assert_non_null(source);
	}
}

static void a_listener_can_be_freed_with_pending_connections(void **state)
{
	g_autoptr(Destination) destination = destination_new("tcp:127.0.0.1:0");
	int silent = raw_connect(destination_port(destination));
	g_autoptr(PrControl) source = connect_destination(destination);

	g_clear_pointer(&destination->listener, pr_listener_free);
	assert_true(raw_reaches_end(silent));
	close(silent);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_peer_that_stalls_does_not_keep_the_real_peer_out),
		cmocka_unit_test(a_flood_of_silent_connections_does_not_keep_the_peer_out),
		cmocka_unit_test(a_flood_from_another_host_does_not_evict_a_slow_peer),
		cmocka_unit_test(a_lost_first_packet_does_not_delay_the_connection),
		cmocka_unit_test(peers_that_send_garbage_are_closed),
		cmocka_unit_test(a_slow_on_hello_does_not_stop_accepting),
		cmocka_unit_test(a_port_in_use_is_named_with_the_remedy),
		cmocka_unit_test(an_address_of_another_host_is_refused),
		cmocka_unit_test(port_zero_is_replaced_by_the_real_one),
		cmocka_unit_test(names_and_ipv6_work),
		cmocka_unit_test(a_listener_can_be_freed_with_pending_connections),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
