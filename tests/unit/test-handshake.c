/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The handshake of a source and a destination, and the error that each side gets where it fails. */
#include "tests/rigs/control-rig.h"

#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void hello_is_answered_and_messages_pass(void **state)
{
	g_autoptr(Destination) destination = destination_new("tcp:127.0.0.1:0");
	g_auto(Failure) source_failure = {0}, sink_failure = {0};
	g_autoptr(PrControl) source = NULL;
	g_autoptr(PrControl) sink = NULL;
	g_autoptr(GError) error = NULL;
	PrHelloAck ack;

	source = connect_to(pr_listener_uri(destination->listener), LONG_MS, &ack, &error);
	assert_non_null(source);
	assert_int_equal(ack.status, PR_HELLO_OK);
	assert_int_equal(ack.data_port, 4445);
	assert_string_equal(destination->scheme, "tcp");
	sink = destination_control(destination);
	assert_true(g_str_has_prefix(pr_control_peer(sink), "127.0.0.1:"));
	start(source, &source_failure);
	start(sink, &sink_failure);
	assert_true(pr_control_send(source, PR_CMD_PING, "\0\0\0\1", 4, NULL));
	assert_receives(sink, PR_CMD_PING, "\0\0\0\1", 4);
	assert_true(pr_control_send_bytes(sink, PR_CMD_POSTCOPY_RUN, NULL, NULL));
	assert_receives(source, PR_CMD_POSTCOPY_RUN, NULL, 0);
}

static void a_refusal_carries_its_reason(void **state)
{
	g_autoptr(Destination) destination = destination_new("tcp:127.0.0.1:0");
	g_autoptr(PrControl) source = NULL;
	g_autoptr(GError) error = NULL;
	PrHelloAck ack = {.status = 77};

	destination->ack.status = PR_HELLO_REFUSED;
	strcpy(destination->ack.reason, "RAM block mem0: 4 GiB here, 8 GiB there");
	source = connect_to(pr_listener_uri(destination->listener), LONG_MS, &ack, &error);
	assert_null(source);
	assert_true(g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_REFUSED));
	assert_non_null(strstr(error->message, "RAM block mem0: 4 GiB here, 8 GiB there"));
	assert_int_equal(ack.status, 77);
}

static void a_completed_migration_is_no_error(void **state)
{
	g_autoptr(Destination) destination = destination_new("tcp:127.0.0.1:0");
	g_autoptr(PrControl) source = NULL;
	g_autoptr(GError) error = NULL;
	PrHelloAck ack;

	destination->ack.status = PR_HELLO_COMPLETED;
	source = connect_to(pr_listener_uri(destination->listener), LONG_MS, &ack, &error);
	assert_non_null(source);
	assert_int_equal(ack.status, PR_HELLO_COMPLETED);
}

static void another_version_is_refused_with_both_numbers(void **state)
{
	g_autoptr(Destination) destination = destination_new("tcp:127.0.0.1:0");
	PrHello hello = hello_of(9);
	g_autoptr(GError) error = NULL;
	PrHelloAck ack;

	assert_null(pr_control_connect(pr_listener_uri(destination->listener), NULL, &hello,
				       LONG_MS, LONG_MS, NULL, &ack, &error));
	assert_true(g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_REFUSED));
	assert_non_null(strstr(error->message, "version 9"));
	assert_non_null(strstr(error->message, "version " G_STRINGIFY(PR_WIRE_VERSION)));
	assert_int_equal(destination->hellos, 0);
}

static void script_speak_http(int fd)
{
	static const char answer[] = "HTTP/1.1 400 Bad Request\r\n\r\n";

	raw_write(fd, answer, strlen(answer));
}

static void script_answer_with_hello(int fd)
{
	g_autoptr(GByteArray) body = g_byte_array_new();
	PrHello hello = hello_of(PR_WIRE_VERSION);

	raw_read_hello(fd);
	pr_hello_encode(body, &hello);
	raw_send(fd, PR_MSG_HELLO, body->data, body->len);
}

static void script_claim_too_much(int fd)
{
	static const uint8_t header[] = {0, 2, 0, 0, 0x7f, 0xff, 0xff, 0xff};

	raw_read_hello(fd);
	raw_write(fd, header, sizeof header);
}

static void script_send_garbled_ack(int fd)
{
	static const uint8_t body[32] = "this is not a HELLO_ACK";

	raw_read_hello(fd);
	raw_send(fd, PR_MSG_HELLO_ACK, body, sizeof body);
}

static void script_close(int fd)
{
	raw_read_hello(fd);
	shutdown(fd, SHUT_RDWR);
}

static void script_stall(int fd)
{
	raw_read_hello(fd);
}

static void each_improper_answer_has_its_own_error(void **state)
{
	static const struct {
		void (*script)(int fd);
		int code;
		const char *says;
	} table[] = {
		{script_speak_http, PR_PATH_ERROR_CONNECT, "does not speak the Postroad protocol"},
		{script_answer_with_hello, PR_PATH_ERROR_CONNECT, "answers HELLO with HELLO"},
		{script_claim_too_much, PR_PATH_ERROR_CONNECT, "HELLO_ACK claims 2147483647"},
		{script_send_garbled_ack, PR_PATH_ERROR_CONNECT, "magic"},
		{script_close, PR_PATH_ERROR_LOST, "closed the connection"},
		{script_stall, PR_PATH_ERROR_TIMEOUT, "does not answer"},
	};

	for (gsize i = 0; i < G_N_ELEMENTS(table); i++) {
		g_autoptr(Raw) raw = raw_new(table[i].script);
		g_autoptr(GError) error = NULL;
		g_autofree char *path = pr_uri_address(raw->uri);
		PrHelloAck ack;

		assert_null(connect_to(raw->uri,
				       table[i].code == PR_PATH_ERROR_TIMEOUT ? 100 : LONG_MS, &ack,
				       &error));
		if (!g_error_matches(error, PR_PATH_ERROR, table[i].code) ||
		    !strstr(error->message, table[i].says) || !strstr(error->message, path))
			fail_msg("case %zu: %s", i, error->message);
	}
}

static void nobody_listening_names_the_path_and_the_cause(void **state)
{
	g_autoptr(PrUri) uri = NULL;
	g_autoptr(GError) error = NULL;
	g_autofree char *path = NULL;
	PrHelloAck ack;

	close(raw_listen(&uri));
	path = pr_uri_address(uri);
	assert_null(connect_to(uri, LONG_MS, &ack, &error));
	assert_true(g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT));
	assert_non_null(strstr(error->message, path));
	assert_non_null(strstr(error->message, "refused; is a destination listening there?"));
}

/* No destination can listen behind a missing route. */
static void an_unreachable_network_has_its_own_error(void **state)
{
	/* The kernel has no route to a multicast group for TCP. */
	g_autoptr(PrUri) uri = pr_uri_parse("tcp:224.0.0.1:4444", FALSE, NULL);
	g_autoptr(GError) error = NULL;
	PrHelloAck ack;

	assert_null(connect_to(uri, LONG_MS, &ack, &error));
	assert_true(g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT));
	assert_non_null(strstr(error->message,
			       "unreachable; check this host's links and routes, or list another "
			       "path"));
}

static void an_unknown_scheme_lists_those_of_this_build(void **state)
{
	g_autoptr(PrUri) uri = pr_uri_parse("pigeon:127.0.0.1:1", FALSE, NULL);
	g_autoptr(GError) error = NULL;
	PrHelloAck ack;

	assert_null(connect_to(uri, LONG_MS, &ack, &error));
	assert_non_null(strstr(error->message, "scheme \"pigeon\" is not known here; use one of"));
	assert_non_null(strstr(error->message, "ofi, tcp, faulty+SCHEME"));
}

static void the_local_address_can_be_chosen(void **state)
{
	g_autoptr(Destination) destination = destination_new("tcp:127.0.0.1:0");
	g_autofree char *good =
		g_strdup_printf("tcp:127.0.0.1:%u?bind=127.0.0.77", destination_port(destination));
	g_autofree char *bad =
		g_strdup_printf("tcp:127.0.0.1:%u?bind=192.0.2.1", destination_port(destination));
	g_autoptr(PrUri) good_uri = pr_uri_parse(good, FALSE, NULL);
	g_autoptr(PrUri) bad_uri = pr_uri_parse(bad, FALSE, NULL);
	g_autoptr(PrControl) source = NULL;
	g_autoptr(PrControl) sink = NULL;
	g_autoptr(GError) error = NULL;
	PrHelloAck ack;

	source = connect_to(good_uri, LONG_MS, &ack, &error);
	assert_non_null(source);
	sink = destination_control(destination);
	assert_true(g_str_has_prefix(pr_control_peer(sink), "127.0.0.77:"));
	assert_null(connect_to(bad_uri, LONG_MS, &ack, &error));
	assert_non_null(strstr(error->message, "bind=192.0.2.1"));
}

static gpointer cancel_main(gpointer cancel)
{
	g_cancellable_cancel(cancel);
	return NULL;
}

/* The kernel accepts the connection, and no process answers. */
static void a_connect_can_be_cancelled(void **state)
{
	g_autoptr(GCancellable) cancel = g_cancellable_new();
	g_autoptr(GError) error = NULL;
	g_autoptr(PrUri) uri = NULL;
	PrHello hello = hello_of(PR_WIRE_VERSION);
	int listening = raw_listen(&uri);
	GThread *thread = g_thread_new("cancel", cancel_main, cancel);
	gint64 began = g_get_monotonic_time();
	PrHelloAck ack;

	assert_null(pr_control_connect(uri, NULL, &hello, LONG_MS, LONG_MS, cancel, &ack, &error));
	assert_true(g_error_matches(error, G_IO_ERROR, G_IO_ERROR_CANCELLED));
	assert_true(g_get_monotonic_time() - began < LONG_MS * 1000);
	g_thread_join(thread);
	close(listening);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(hello_is_answered_and_messages_pass),
		cmocka_unit_test(a_refusal_carries_its_reason),
		cmocka_unit_test(a_completed_migration_is_no_error),
		cmocka_unit_test(another_version_is_refused_with_both_numbers),
		cmocka_unit_test(each_improper_answer_has_its_own_error),
		cmocka_unit_test(nobody_listening_names_the_path_and_the_cause),
		cmocka_unit_test(an_unreachable_network_has_its_own_error),
		cmocka_unit_test(an_unknown_scheme_lists_those_of_this_build),
		cmocka_unit_test(the_local_address_can_be_chosen),
		cmocka_unit_test(a_connect_can_be_cancelled),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
