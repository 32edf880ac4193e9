/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Which peers may connect with TLS, and the reason that each side gets for a refusal. */
#include "tests/rigs/control-rig.h"
#include "tests/rigs/flood.h"

#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "tests/rigs/certs.h"

static Certs *good; /* constant once made; read by all tests */

/* What was logged since clear_log(), so that tests can also check the destination's log. */
static GMutex log_lock;
static GString *log_text; /* log_lock */

static void capture_log(const char *domain, GLogLevelFlags level, const char *message,
			gpointer opaque)
{
	g_mutex_lock(&log_lock);
	g_string_append_printf(log_text, "%s\n", message);
	g_mutex_unlock(&log_lock);
}

static gboolean was_logged(const char *text)
{
	g_autoptr(GMutexLocker) locker G_GNUC_UNUSED = g_mutex_locker_new(&log_lock);

	return strstr(log_text->str, text) != NULL;
}

static void clear_log(void)
{
	g_autoptr(GMutexLocker) locker G_GNUC_UNUSED = g_mutex_locker_new(&log_lock);

	g_string_truncate(log_text, 0);
}

/* Waits for the text, as another thread of the destination logs it. */
static void assert_logged(const char *text)
{
	gint64 deadline = g_get_monotonic_time() + LONG_MS * 1000;

	while (!was_logged(text)) {
		if (g_get_monotonic_time() > deadline)
			fail_msg("not logged: \"%s\"; but: %s", text, log_text->str);
		g_usleep(1000); /* between two checks of the condition */
	}
}

static PrTls *tls_of(const char *dir, const char *const *allow)
{
	g_autoptr(GError) error = NULL;
	PrTls *tls = pr_tls_new(dir, allow, &error);

	if (!tls)
		fail_msg("%s", error->message);
	return tls;
}

/* Connects with these certificates, at another name of this host if one is given. */
static PrControl *connect_with_tls(Destination *destination, const PrTls *tls, const char *host,
				   guint handshake_ms, GError **error)
{
	g_autofree char *text = g_strdup_printf("tcp:%s:%u", host ? host : "127.0.0.1",
						destination_port(destination));
	g_autoptr(PrUri) uri = pr_uri_parse(text, FALSE, NULL);
	PrHello hello = hello_of(PR_WIRE_VERSION);
	PrHelloAck ack;

	return pr_control_connect(uri, tls, &hello, LONG_MS, handshake_ms, NULL, &ack, error);
}

/* Owns the source's end from now on. */
static void assert_works(PrControl *owned, Destination *destination)
{
	g_auto(Failure) failure = {0}, sink_failure = {0};
	g_autoptr(PrControl) source = owned;
	g_autoptr(PrControl) sink = destination_control(destination);
	g_autofree char *host = pr_control_local_host(sink);

	assert_string_equal(host, "127.0.0.1");
	assert_true(g_str_has_prefix(pr_control_peer(sink), "127.0.0.1:"));
	start(source, &failure);
	start(sink, &sink_failure);
	assert_true(pr_control_send(source, PR_CMD_PING, "\1\2\3\4", 4, NULL));
	assert_receives(sink, PR_CMD_PING, "\1\2\3\4", 4);
	assert_true(pr_control_send(sink, PR_RP_PONG, "\5\6\7\10", 4, NULL));
	assert_receives(source, PR_RP_PONG, "\5\6\7\10", 4);
}

static void a_source_with_a_certificate_can_connect_repeatedly(void **state)
{
	g_autoptr(PrTls) tls = tls_of(good, NULL);
	g_autoptr(Destination) destination = destination_new_tls("tcp:127.0.0.1:0", tls);

	clear_log();
	/* The second time there is a TLS session to resume. */
	for (guint i = 0; i < 3; i++) {
		assert_works(connect_destination(destination), destination);
	}
	assert_logged("TLS 1.3 with 127.0.0.1");
}

static void a_name_in_the_uri_is_checked_as_a_name(void **state)
{
	g_autoptr(PrTls) tls = tls_of(good, NULL);
	g_autoptr(Destination) destination = destination_new_tls("tcp:127.0.0.1:0", tls);
	g_autoptr(GError) error = NULL;
	g_autoptr(PrControl) source =
		connect_with_tls(destination, tls, "localhost", LONG_MS, &error);

	if (!source)
		fail_msg("%s", error->message);
}

static void no_sent_text_is_readable_on_the_network(void **state)
{
	g_autoptr(PrTls) tls = tls_of(good, NULL);
	g_autoptr(PrUri) uri = NULL;
	int listening = raw_listen(&uri);
	PrHello hello = hello_of(PR_WIRE_VERSION);
	PrHelloAck ack;
	uint8_t head[3];
	ssize_t received = 0;

	/*
	 * The peer does not answer, so the source sends only the start of a handshake. A source
	 * that gets no CPU has sent nothing by then, so the time is doubled until it has.
	 */
	for (guint ms = 300; received == 0; ms *= 2) {
		g_autoptr(GError) error = NULL;

		assert_true(ms < LONG_MS);
		assert_null(pr_control_connect(uri, tls, &hello, LONG_MS, ms, NULL, &ack, &error));
		assert_true(g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_TIMEOUT));
		assert_non_null(strstr(error->message, "did not finish the TLS handshake in time"));
		int fd = accept(listening, NULL, NULL);
		received = recv(fd, head, sizeof head, MSG_WAITALL);
		close(fd);
	}
	assert_int_equal(received, sizeof head);
	assert_memory_equal(head, "\x16\x03", 2);
	close(listening);
}

/* The source does not accept the destination's certificate: checks the texts of both sides. */
static void assert_source_refuses(const char *server_dir, const char *client_dir,
				  const char *const *words)
{
	g_autoptr(PrTls) server = tls_of(server_dir, NULL);
	g_autoptr(PrTls) client = tls_of(client_dir, NULL);
	g_autoptr(Destination) destination = destination_new_tls("tcp:127.0.0.1:0", server);
	g_autoptr(GError) error = NULL;

	clear_log();
	assert_null(connect_with_tls(destination, client, NULL, LONG_MS, &error));
	assert_true(g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT));
	for (; *words; words++)
		if (!strstr(error->message, *words))
			fail_msg("\"%s\" lacks \"%s\"", error->message, *words);
	assert_logged("turned 127.0.0.1");
	assert_logged("does the source trust the CA");
	assert_int_equal(destination->hellos, 0);
}

static void a_server_of_another_ca_is_refused(void **state)
{
	g_autoptr(Certs) other = certs_new();

	assert_source_refuses(other, good,
			      (const char *const[]){"the destination's certificate", "CN=127.0.0.1",
						    "not signed by the CA", NULL});
}

static void an_expired_server_is_refused(void **state)
{
	g_autoptr(Certs) old = certs_new_beside(good);

	certs_add(old, -1, "server 127.0.0.1");
	assert_source_refuses(old, good,
			      (const char *const[]){"it has expired at 20", "renew it", NULL});
}

static void a_server_of_another_name_is_refused(void **state)
{
	g_autoptr(Certs) elsewhere = certs_new_beside(good);

	certs_add(elsewhere, 30, "server b.example 192.0.2.7");
	assert_source_refuses(
		elsewhere, good,
		(const char *const[]){"it is not for 127.0.0.1 but for b.example, 192.0.2.7",
				      NULL});
}

/* The destination refuses a client, while a channel of another one is in use. */
static void assert_client_is_refused(const char *client_dir, const char *const *allow,
				     const char *words)
{
	g_autoptr(PrTls) server = tls_of(good, allow);
	g_autoptr(PrTls) client = tls_of(client_dir, NULL);
	g_autoptr(PrTls) welcome = tls_of(good, NULL);
	g_autoptr(Destination) destination = destination_new_tls("tcp:127.0.0.1:0", server);
	g_autoptr(GError) error = NULL;

	clear_log();
	assert_null(connect_with_tls(destination, client, NULL, LONG_MS, &error));
	if (!g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_REFUSED) ||
	    !strstr(error->message, words))
		fail_msg("failed with %d, \"%s\", not \"%s\"", error->code, error->message, words);
	assert_logged(words);
	assert_int_equal(destination->hellos, 0);
	if (!allow) {
		PrControl *source = connect_with_tls(destination, welcome, NULL, LONG_MS, NULL);

		assert_non_null(source);
		assert_works(source, destination);
	}
}

static void clients_without_a_valid_certificate_get_the_reason(void **state)
{
	g_autoptr(Certs) other = certs_new();
	g_autoptr(Certs) old = certs_new_beside(good);
	g_autoptr(Certs) none = certs_new_beside(good);
	g_autofree char *command = g_strdup_printf("cp %s/ca-cert.pem %s/ca-cert.pem", good, other);

	certs_add(old, -1, "client source");
	certs_add(none, 30, "server 127.0.0.1");
	/* It trusts the destination's CA, but another CA has signed its own certificate. */
	assert_true(g_spawn_command_line_sync(command, NULL, NULL, NULL, NULL));
	assert_client_is_refused(other, NULL, "not signed by the CA");
	assert_client_is_refused(old, NULL, "it has expired at 20");
	assert_client_is_refused(none, NULL, "wants a client certificate and was shown none");
}

static void only_clients_named_by_tls_allow_may_connect(void **state)
{
	static const char *const others[] = {"source2", "sourc", "O=Postroad", "CN=source", NULL};
	static const char *const lists[][3] = {{"source2", "source"}, {"O=Postroad,CN=source"}};

	assert_client_is_refused(good, others, "not one of those that --tls-allow names");
	for (gsize i = 0; i < G_N_ELEMENTS(lists); i++) {
		g_autoptr(PrTls) tls = tls_of(good, lists[i]);
		g_autoptr(Destination) destination = destination_new_tls("tcp:127.0.0.1:0", tls);

		assert_works(connect_destination(destination), destination);
	}
}

/* A comma in a name is part of it. */
static void a_comma_in_a_name_does_not_make_two_names(void **state)
{
	static const char *const allow[] = {"source", "O=Postroad,CN=source", NULL};
	static const char *const names[] = {"client x,CN=source", "client O=Postroad,CN=source"};
	g_autoptr(Certs) forged = certs_new_beside(good);

	for (gsize i = 0; i < G_N_ELEMENTS(names); i++) {
		certs_add(forged, 30, names[i]);
		assert_client_is_refused(forged, allow, "not one of those that --tls-allow names");
	}
}

static void a_plain_source_is_told_to_use_tls(void **state)
{
	g_autoptr(PrTls) tls = tls_of(good, NULL);
	g_autoptr(Destination) destination = destination_new_tls("tcp:127.0.0.1:0", tls);
	g_autoptr(GError) error = NULL;

	clear_log();
	assert_null(connect_with_tls(destination, NULL, NULL, LONG_MS, &error));
	assert_true(g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_REFUSED));
	assert_non_null(strstr(error->message, "wants TLS: start the source with --tls-dir"));
	assert_logged("wants TLS");
	assert_int_equal(destination->hellos, 0);
}

static void a_plain_lane_is_refused(void **state)
{
	g_autoptr(PrTls) tls = tls_of(good, NULL);
	g_autoptr(Destination) destination = destination_new_tls("tcp:127.0.0.1:0", tls);
	g_autoptr(GByteArray) body = g_byte_array_new();
	PrLaneHello lane = {.epoch = 1};
	int fd = raw_connect(destination_port(destination));

	pr_lane_hello_encode(body, &lane);
	raw_send(fd, PR_MSG_LANE, body->data, body->len);
	assert_true(raw_reaches_end(fd));
	close(fd);
}

static void a_source_with_tls_says_that_the_destination_has_none(void **state)
{
	g_autoptr(PrTls) tls = tls_of(good, NULL);
	g_autoptr(Destination) destination = destination_new("tcp:127.0.0.1:0");
	g_autoptr(GError) error = NULL;

	clear_log();
	assert_null(connect_with_tls(destination, tls, NULL, LONG_MS, &error));
	assert_true(g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT));
	assert_non_null(strstr(error->message, "was the destination started with --tls-dir, too?"));
	assert_logged("it begins with TLS, which this side does not use");
}

/* The beginning of a ClientHello, and no more. */
static const char half[] = "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03";

static void peers_that_stall_in_the_handshake_do_not_keep_others_out(void **state)
{
	g_autoptr(PrTls) tls = tls_of(good, NULL);
	g_autoptr(Destination) destination = destination_new_tls("tcp:127.0.0.1:0", tls);
	gint64 began = g_get_monotonic_time();
	int silent[4], halfway[30];

	for (guint i = 0; i < G_N_ELEMENTS(silent); i++)
		silent[i] = raw_connect(destination_port(destination));
	for (guint i = 0; i < G_N_ELEMENTS(halfway); i++) {
		halfway[i] = raw_connect(destination_port(destination));
		raw_write(halfway[i], half, sizeof half - 1);
	}
	for (guint i = 0; i < 3; i++)
		assert_works(connect_destination(destination), destination);
	/* The oldest connection was evicted, and the peer did not wait for the others. */
	assert_true(raw_reaches_end(halfway[0]));
	if (g_get_monotonic_time() - began > 3 * LONG_MS * 1000)
		fail_msg("the peer had to wait for those that stall");
	for (guint i = 0; i < G_N_ELEMENTS(silent); i++)
		close(silent[i]);
	for (guint i = 0; i < G_N_ELEMENTS(halfway); i++)
		close(halfway[i]);
}

/*
 * Hosts get turns to shake hands (PrTokenBucket). Otherwise each handshake of the flood would
 * cancel the peer's before it is done.
 */
static void a_flood_of_handshakes_from_another_host_does_not_keep_the_peer_out(void **state)
{
	g_autoptr(PrTls) tls = tls_of(good, NULL);
	g_autoptr(Destination) destination = destination_new_tls("tcp:127.0.0.1:0", tls);
	g_autoptr(Flood) flood =
		flood_new("127.0.0.2", destination_port(destination), half, sizeof half - 1);

	assert_true(flood_wait(flood, 500));
	for (guint i = 0; i < 3; i++)
		assert_works(connect_destination(destination), destination);
}

static void peers_that_stall_are_closed_at_their_deadline(void **state)
{
	g_autoptr(PrTls) tls = tls_of(good, NULL);
	g_autoptr(Destination) destination = destination_new_hasty("tcp:127.0.0.1:0", tls);
	int silent = raw_connect(destination_port(destination));
	int halfway = raw_connect(destination_port(destination));

	clear_log();
	raw_write(halfway, half, sizeof half - 1);
	assert_true(raw_reaches_end(silent));
	assert_true(raw_reaches_end(halfway));
	assert_logged("it began no TLS handshake in time");
	assert_logged("did not finish the TLS handshake in time");
	close(silent);
	close(halfway);
}

static void a_listener_can_be_freed_in_the_middle_of_handshakes(void **state)
{
	g_autoptr(PrTls) tls = tls_of(good, NULL);
	g_autoptr(Destination) destination = destination_new_tls("tcp:127.0.0.1:0", tls);
	gint64 began = g_get_monotonic_time();
	int fds[4];

	for (guint i = 0; i < G_N_ELEMENTS(fds); i++) {
		fds[i] = raw_connect(destination_port(destination));
		raw_write(fds[i], half, sizeof half - 1);
	}
	g_clear_pointer(&destination->listener, pr_listener_free);
	assert_true(g_get_monotonic_time() - began < LONG_MS * 1000);
	for (guint i = 0; i < G_N_ELEMENTS(fds); i++) {
		assert_true(raw_reaches_end(fds[i]));
		close(fds[i]);
	}
}

static gpointer cancel_main(gpointer cancel)
{
	g_usleep(50000); /* more often than not the handshake has begun by then */
	g_cancellable_cancel(cancel);
	return NULL;
}

static void a_handshake_can_be_cancelled(void **state)
{
	g_autoptr(PrTls) tls = tls_of(good, NULL);
	g_autoptr(GCancellable) cancel = g_cancellable_new();
	g_autoptr(GError) error = NULL;
	g_autoptr(PrUri) uri = NULL;
	PrHello hello = hello_of(PR_WIRE_VERSION);
	int listening = raw_listen(&uri);
	GThread *thread = g_thread_new("cancel", cancel_main, cancel);
	gint64 began = g_get_monotonic_time();
	PrHelloAck ack;

	assert_null(pr_control_connect(uri, tls, &hello, LONG_MS, LONG_MS, cancel, &ack, &error));
	assert_true(g_error_matches(error, G_IO_ERROR, G_IO_ERROR_CANCELLED));
	assert_true(g_get_monotonic_time() - began < LONG_MS * 1000);
	g_thread_join(thread);
	close(listening);
}

/* Certificates may expire during a migration, and be renewed. */
static void renewed_certificates_are_used_by_the_next_connection(void **state)
{
	g_autoptr(Certs) dir = certs_new_beside(good);
	g_autoptr(PrTls) server = tls_of(good, NULL);
	g_autoptr(PrTls) client = NULL;
	g_autoptr(Destination) destination = destination_new_tls("tcp:127.0.0.1:0", server);
	PrControl *source;

	certs_add(dir, -1, "client source");
	client = tls_of(dir, NULL);
	assert_null(connect_with_tls(destination, client, NULL, LONG_MS, NULL));
	certs_add(dir, 30, "client source");
	source = connect_with_tls(destination, client, NULL, LONG_MS, NULL);
	assert_non_null(source);
	assert_works(source, destination);
}

static void assert_bad_dir(const char *dir, const char *words)
{
	g_autoptr(GError) error = NULL;

	assert_null(pr_tls_new(dir, NULL, &error));
	if (!strstr(error->message, words))
		fail_msg("\"%s\" lacks \"%s\"", error->message, words);
}

static void a_directory_that_lacks_a_file_is_refused_by_name(void **state)
{
	g_autoptr(Certs) dir = certs_new_beside(good);
	g_autofree char *crl = g_build_filename(dir, "ca-crl.pem", NULL);
	g_autofree char *key = g_build_filename(dir, "client-key.pem", NULL);
	g_autoptr(PrTls) client = NULL;
	g_autoptr(PrUri) uri = pr_uri_parse("tcp:127.0.0.1:0", TRUE, NULL);
	g_autoptr(GError) error = NULL;
	PrSecurity security = {0};

	assert_bad_dir("/nonexistent", "/nonexistent/ca-cert.pem");
	assert_bad_dir(dir, "neither client-cert.pem");
	certs_add(dir, 30, "client source");
	client = tls_of(dir, NULL);
	security.tls = client;
	assert_null(pr_listener_new(uri, &security, PATIENT_MS, on_hello, NULL, NULL, &error));
	assert_non_null(strstr(error->message, "server-cert.pem"));
	assert_true(g_file_set_contents(crl, "", 0, NULL));
	assert_bad_dir(dir, "ca-crl.pem: certificate revocation lists are not supported");
	assert_int_equal(unlink(crl), 0);
	assert_int_equal(unlink(key), 0);
	assert_bad_dir(dir, "client-key.pem");
}

static void without_tls_the_destination_listens_on_this_host_only(void **state)
{
	static const char *const open[] = {"tcp:0.0.0.0:0", "tcp:[::]:0"};
	static const PrSecurity insecure = {.plain_net = TRUE};

	for (gsize i = 0; i < G_N_ELEMENTS(open); i++) {
		g_autoptr(PrUri) uri = pr_uri_parse(open[i], TRUE, NULL);
		g_autoptr(GError) error = NULL;

		assert_null(pr_listener_new(uri, NULL, PATIENT_MS, on_hello, NULL, NULL, &error));
		assert_true(g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT));
		assert_non_null(strstr(error->message, "--tls-dir DIR"));
		assert_non_null(strstr(error->message, "--insecure"));
	}
	{
		g_autoptr(PrUri) uri = pr_uri_parse(open[0], TRUE, NULL);
		g_autoptr(PrListener) listener =
			pr_listener_new(uri, &insecure, PATIENT_MS, on_hello, NULL, NULL, NULL);

		assert_non_null(listener);
	}
}

static int make_certs(void **state)
{
	log_text = g_string_new(NULL);
	g_log_set_default_handler(capture_log, NULL);
	good = certs_new();
	return 0;
}

static int remove_certs(void **state)
{
	certs_free(good);
	g_log_set_default_handler(g_log_default_handler, NULL);
	g_string_free(log_text, TRUE);
	return 0;
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_source_with_a_certificate_can_connect_repeatedly),
		cmocka_unit_test(a_name_in_the_uri_is_checked_as_a_name),
		cmocka_unit_test(no_sent_text_is_readable_on_the_network),
		cmocka_unit_test(a_server_of_another_ca_is_refused),
		cmocka_unit_test(an_expired_server_is_refused),
		cmocka_unit_test(a_server_of_another_name_is_refused),
		cmocka_unit_test(clients_without_a_valid_certificate_get_the_reason),
		cmocka_unit_test(only_clients_named_by_tls_allow_may_connect),
		cmocka_unit_test(a_comma_in_a_name_does_not_make_two_names),
		cmocka_unit_test(a_plain_source_is_told_to_use_tls),
		cmocka_unit_test(a_plain_lane_is_refused),
		cmocka_unit_test(a_source_with_tls_says_that_the_destination_has_none),
		cmocka_unit_test(peers_that_stall_in_the_handshake_do_not_keep_others_out),
		cmocka_unit_test(
			a_flood_of_handshakes_from_another_host_does_not_keep_the_peer_out),
		cmocka_unit_test(peers_that_stall_are_closed_at_their_deadline),
		cmocka_unit_test(a_listener_can_be_freed_in_the_middle_of_handshakes),
		cmocka_unit_test(a_handshake_can_be_cancelled),
		cmocka_unit_test(renewed_certificates_are_used_by_the_next_connection),
		cmocka_unit_test(a_directory_that_lacks_a_file_is_refused_by_name),
		cmocka_unit_test(without_tls_the_destination_listens_on_this_host_only),
	};

	return cmocka_run_group_tests(tests, make_certs, remove_certs);
}
