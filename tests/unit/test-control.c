/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "tests/rigs/control-rig.h"

#include <netinet/in.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/rigs/certs.h"
#include "transport/control/internal.h"
#include "transport/faulty/faulty.h"

/* The heartbeat */

static void an_idle_channel_stays_open_and_knows_its_round_trip(void **state)
{
	g_autoptr(Pair) pair = pair_new();
	g_autoptr(GError) error = NULL;

	assert_false(failure_wait(&pair->source_failure, TIMEOUT_MS + 1000));
	assert_int_equal(failure_calls(&pair->sink_failure), 0);
	assert_true(pr_control_rtt_us(pair->source) > 0);
	assert_true(pr_control_rtt_us(pair->sink) > 0);
	assert_null(pr_control_recv(pair->source, 1, &error));
	assert_true(g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_TIMEOUT));
	assert_true(pr_control_send(pair->source, PR_CMD_POSTCOPY_RUN, NULL, 0, NULL));
	assert_receives(pair->sink, PR_CMD_POSTCOPY_RUN, NULL, 0);
}

static void a_silent_peer_is_dead_after_the_timeout(void **state)
{
	g_autoptr(Raw) raw = raw_new(script_answer);
	g_auto(Failure) failure = {0};
	gint64 began = g_get_monotonic_time();
	g_autoptr(PrControl) control = connect_raw_hasty(raw, &failure);
	gint64 took;

	assert_fails(control, &failure, PR_PATH_ERROR_SILENT, "nothing heard from 127.0.0.1:");
	took = g_get_monotonic_time() - began;
	assert_true(took >= SILENCE_MS * 1000);
	assert_true(took < LONG_MS * 1000);
}

/* In a process of its own: answers each CMD_PING until RP_SHUT comes. */
static int echo_main(const char *text)
{
	g_autoptr(PrUri) uri = pr_uri_parse(text, FALSE, NULL);
	g_auto(Failure) failure = {0};
	g_autoptr(PrControl) control = NULL;
	g_autoptr(GError) error = NULL;
	PrHelloAck ack;

	control = connect_to(uri, LONG_MS, &ack, &error);
	if (!control)
		g_error("%s", error->message);
	start(control, &failure);
	for (;;) {
		g_autoptr(PrMsg) msg = pr_control_recv(control, LONG_MS, &error);

		if (!msg) {
			g_printerr("%s\n", error->message);
			return 1;
		}
		if (msg->type == PR_RP_SHUT)
			return 0;
		pr_control_send(control, PR_RP_PONG, msg->body, msg->length, NULL);
	}
}

static void raw_expect(int fd, uint16_t type)
{
	PrMsgHeader header = {0};
	uint8_t head[PR_WIRE_HEADER_BYTES], body[64];

	while (header.type != type) {
		raw_read(fd, head, sizeof head);
		assert_true(pr_header_decode(head, &header, NULL));
		assert_true(header.length <= sizeof body);
		raw_read(fd, body, header.length);
	}
}

/* Drops all bytes that have arrived. These are whole frames, as the sender is stopped. */
static void raw_drop_all(int fd)
{
	uint8_t waste[4096];

	while (recv(fd, waste, sizeof waste, MSG_DONTWAIT) > 0)
		;
}

/*
 * The process is stopped for longer than the timeout, and no heartbeat has arrived meanwhile. It
 * must not report the peer as dead, as the peer may have been stopped too.
 */
static void a_stopped_process_does_not_report_its_peer_as_dead(void **state)
{
	g_autoptr(Raw) raw = raw_new(script_answer);
	g_autofree char *text = pr_uri_address(raw->uri);
	char *argv[] = {(char *)"/proc/self/exe", (char *)"--echo", text, NULL};
	g_autoptr(GError) error = NULL;
	GPid pid;
	int status;

	if (!g_spawn_async(NULL, argv, NULL, G_SPAWN_DO_NOT_REAP_CHILD, NULL, NULL, &pid, &error))
		fail_msg("%s", error->message);
	raw_join(raw);
	raw_send(raw->fd, PR_CMD_PING, "\0\0\0\1", 4);
	raw_expect(raw->fd, PR_RP_PONG);
	assert_int_equal(kill(pid, SIGSTOP), 0);
	assert_int_equal(waitpid(pid, &status, WUNTRACED), pid);
	assert_true(WIFSTOPPED(status));
	g_usleep((TIMEOUT_MS + 1000) * 1000);
	raw_drop_all(raw->fd);
	assert_int_equal(kill(pid, SIGCONT), 0);
	/* It checks for silence after each heartbeat: the second one shows that it goes on. */
	raw_expect(raw->fd, PR_MSG_HEARTBEAT);
	raw_expect(raw->fd, PR_MSG_HEARTBEAT);
	raw_send(raw->fd, PR_CMD_PING, "\0\0\0\2", 4);
	raw_expect(raw->fd, PR_RP_PONG);
	raw_send(raw->fd, PR_RP_SHUT, "\0\0\0\0", 4);
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_true(WIFEXITED(status));
	assert_int_equal(WEXITSTATUS(status), 0);
}

static void a_blocked_send_ends_when_the_peer_is_silent(void **state)
{
	g_autoptr(Raw) raw = raw_new(script_answer);
	g_auto(Failure) failure = {0};
	g_autoptr(PrControl) control = connect_raw_hasty(raw, &failure);
	g_autofree uint8_t *body = g_malloc0(MIB);
	g_autoptr(GError) error = NULL;
	guint sent = 0;

	/* More than socket buffers hold. */
	while (sent < 1024 && pr_control_send(control, PR_CMD_PACKAGED, body, MIB, &error))
		sent++;
	assert_true(sent < 1024);
	assert_true(g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_SILENT));
	assert_fails(control, &failure, PR_PATH_ERROR_SILENT, "nothing heard");
}

typedef struct Sender {
	PrControl *control;
	guint n;
	gsize length;
	gint sent; /* atomic */
	GError *error;
} Sender;

/* Message i begins with i and is filled with its low byte. */
static gpointer sender_main(gpointer opaque)
{
	Sender *sender = opaque;
	g_autofree uint8_t *body = g_malloc(sender->length);

	for (guint i = 0; i < sender->n; i++) {
		memset(body, i, sender->length);
		memcpy(body, &i, sizeof i);
		if (!pr_control_send(sender->control, PR_CMD_PACKAGED, body, sender->length,
				     &sender->error))
			break;
		g_atomic_int_inc(&sender->sent);
	}
	return NULL;
}

static void assert_receives_numbered(PrControl *control, guint n, gsize length)
{
	g_autofree uint8_t *body = g_malloc(length);

	for (guint i = 0; i < n; i++) {
		memset(body, i, length);
		memcpy(body, &i, sizeof i);
		assert_receives(control, PR_CMD_PACKAGED, body, length);
	}
}

static void a_busy_consumer_with_a_full_queue_is_not_dead(void **state)
{
	g_autoptr(Pair) pair = pair_new();
	Sender sender = {.control = pair->source, .n = 80, .length = MIB};
	GThread *thread = g_thread_new("sender", sender_main, &sender);
	gint64 deadline = g_get_monotonic_time() + LONG_MS * 1000;

	while (g_atomic_int_get(&sender.sent) < 30 && g_get_monotonic_time() < deadline)
		g_usleep(1000); /* between two checks of the condition */
	assert_false(failure_wait(&pair->sink_failure, TIMEOUT_MS + 1000));
	assert_int_equal(failure_calls(&pair->source_failure), 0);
	/*
	 * The queue is bounded, so the sender still has the messages that neither the queue nor the
	 * sockets can hold.
	 */
	assert_in_range(g_atomic_int_get(&sender.sent), 30, 79);
	assert_receives_numbered(pair->sink, 80, MIB);
	g_thread_join(thread);
	assert_int_equal(sender.sent, 80);
	assert_int_equal(failure_calls(&pair->sink_failure), 0);
}

/* Messages */

static void big_messages_pass_both_ways_at_once(void **state)
{
	g_autoptr(Pair) pair = pair_new();
	Sender there = {.control = pair->source, .n = 48, .length = MIB};
	Sender back = {.control = pair->sink, .n = 48, .length = MIB - 1};
	GThread *thread_there = g_thread_new("there", sender_main, &there);
	GThread *thread_back = g_thread_new("back", sender_main, &back);

	assert_receives_numbered(pair->sink, 48, MIB);
	assert_receives_numbered(pair->source, 48, MIB - 1);
	g_thread_join(thread_there);
	g_thread_join(thread_back);
	assert_int_equal(there.sent, 48);
	assert_int_equal(back.sent, 48);
}

static void frames_of_several_threads_are_not_mixed(void **state)
{
	g_autoptr(Pair) pair = pair_new();
	Sender senders[4];
	GThread *threads[4];
	guint next[4] = {0};

	for (guint i = 0; i < 4; i++) {
		senders[i] = (Sender){.control = pair->source, .n = 200, .length = 1000 + i};
		threads[i] = g_thread_new("sender", sender_main, &senders[i]);
	}
	for (guint i = 0; i < 4 * 200; i++) {
		g_autoptr(PrMsg) msg = pr_control_recv(pair->sink, LONG_MS, NULL);
		guint who, number;

		assert_non_null(msg);
		who = msg->length - 1000;
		assert_true(who < 4);
		memcpy(&number, msg->body, sizeof number);
		assert_int_equal(number, next[who]++);
		assert_int_equal(msg->body[msg->length - 1], number & 0xff);
	}
	for (guint i = 0; i < 4; i++)
		g_thread_join(threads[i]);
}

static void a_frame_larger_than_the_queue_passes_alone(void **state)
{
	g_autoptr(Pair) pair = pair_new();
	const uint64_t n_bits = 33ull * 8 * MIB;
	g_autofree unsigned long *bits = g_malloc0(n_bits / 8);
	g_autoptr(GByteArray) body = g_byte_array_new();
	g_autofree unsigned long *back = NULL;
	g_autoptr(PrMsg) msg = NULL;
	char idstr[PR_IDSTR_MAX + 1];

	bits[0] = bits[n_bits / 64 - 1] = 0x8000000000000001ul;
	pr_recv_bitmap_encode(body, "mem0", bits, n_bits, FALSE);
	assert_true(pr_control_send_bytes(pair->sink, PR_RP_RECV_BITMAP, body, NULL));
	msg = pr_control_recv(pair->source, LONG_MS, NULL);
	assert_non_null(msg);
	assert_true(pr_recv_bitmap_decode(msg->type, msg->body, msg->length, idstr, n_bits, &back,
					  NULL));
	assert_memory_equal(back, bits, n_bits / 8);
}

static void unknown_types_are_skipped(void **state)
{
	g_autoptr(Raw) raw = raw_new(script_answer);
	g_auto(Failure) failure = {0};
	g_autoptr(PrControl) control = connect_raw(raw, &failure);
	g_autofree uint8_t *body = g_malloc0(64 * 1024);

	raw_send(raw->fd, 0x0abc, body, 64 * 1024);
	raw_send(raw->fd, 0x02ff, NULL, 0);
	raw_send(raw->fd, PR_RP_PONG, "\0\0\0\1", 4);
	assert_receives(control, PR_RP_PONG, "\0\0\0\1", 4);
}

static void frames_may_come_byte_by_byte(void **state)
{
	static const uint8_t frame[] = {0x02, 0x02, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0x42};
	g_autoptr(Raw) raw = raw_new(script_answer);
	g_auto(Failure) failure = {0};
	g_autoptr(PrControl) control = connect_raw(raw, &failure);
	int on = 1;

	assert_int_equal(setsockopt(raw->fd, IPPROTO_TCP, 1 /* TCP_NODELAY */, &on, sizeof on), 0);
	for (gsize i = 0; i < sizeof frame; i++)
		raw_write(raw->fd, &frame[i], 1);
	assert_receives(control, PR_RP_PONG, "\0\0\0\x42", 4);
}

/* Ends */

/* Timeouts of reader.c. A try that takes longer, because a thread got no CPU, is repeated. */
#define LINGER_MS     200
#define LAST_WORDS_MS 1000
#define TRIES	      5

static void malformed_messages_end_the_channel(void **state)
{
	static const struct {
		uint8_t bytes[16];
		const char *says;
	} table[] = {
		{{0xde, 0xad, 0xbe, 0xef, 0, 0, 0, 0}, "not zero"},
		{{0x01, 0x02, 0, 0, 0, 0, 0, 5}, "CMD_PING claims 5 bytes"},
		{{0x01, 0x07, 0, 0, 0xff, 0xff, 0xff, 0xff}, "CMD_PACKAGED claims"},
		{{0x0a, 0xbc, 0, 0, 0, 1, 0, 1}, "type 0x0abc claims 65537 bytes"},
		{{0x00, 0x04, 0, 0, 0, 0, 0, 0}, "LANE_ACK on a started channel"},
		{{0x00, 0x05, 0, 0, 0, 0, 0, 0}, "HEARTBEAT is too short"},
	};

	for (gsize i = 0; i < G_N_ELEMENTS(table); i++) {
		g_autoptr(Raw) raw = raw_new(script_answer);
		g_auto(Failure) failure = {0};
		g_autoptr(PrControl) control = connect_raw(raw, &failure);

		raw_write(raw->fd, table[i].bytes, PR_WIRE_HEADER_BYTES);
		assert_fails(control, &failure, PR_PATH_ERROR_LOST, table[i].says);
		assert_true(raw_reaches_end(raw->fd));
	}
}

static void messages_before_the_end_are_returned_first(void **state)
{
	g_autoptr(Raw) raw = raw_new(script_answer);
	g_auto(Failure) failure = {0};
	g_autoptr(PrControl) control = connect_raw(raw, &failure);

	raw_send(raw->fd, PR_RP_PONG, "\0\0\0\1", 4);
	raw_send(raw->fd, PR_RP_SHUT, "\0\0\0\0", 4);
	shutdown(raw->fd, SHUT_WR);
	assert_true(failure_wait(&failure, LONG_MS));
	assert_receives(control, PR_RP_PONG, "\0\0\0\1", 4);
	assert_receives(control, PR_RP_SHUT, "\0\0\0\0", 4);
	assert_fails(control, &failure, PR_PATH_ERROR_LOST, "the peer closed the connection");
}

/*
 * The peer's last messages have arrived here, and the peer has reset the connection. The next write
 * on this side fails.
 */
static void messages_before_the_end_are_read_although_a_write_failed(void **state)
{
	g_autoptr(Raw) raw = raw_new(script_answer);
	g_auto(Failure) failure = {0};
	struct linger reset = {.l_onoff = 1, .l_linger = 0};
	g_autoptr(PrControl) control = NULL;
	g_autoptr(GError) error = NULL;
	PrHelloAck ack;

	control = connect_to(raw->uri, LONG_MS, &ack, &error);
	assert_non_null(control);
	raw_join(raw);
	raw_send(raw->fd, PR_RP_SHUT, "\0\0\0\0", 4);
	assert_int_equal(setsockopt(raw->fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset), 0);
	close(raw->fd);
	raw->fd = -1;
	/* The reader first reads the socket or sends a heartbeat. */
	start(control, &failure);
	pr_control_send(control, PR_CMD_POSTCOPY_RUN, NULL, 0, NULL);
	assert_receives(control, PR_RP_SHUT, "\0\0\0\0", 4);
	assert_fails(control, &failure, PR_PATH_ERROR_LOST, "127.0.0.1:");
}

/*
 * Returns FALSE if it took longer than the channel waits for the last messages. Then it proves
 * nothing.
 */
static gboolean reads_last_messages_after_a_failed_write(void)
{
	static const uint8_t shut[] = {
		PR_RP_SHUT >> 8, PR_RP_SHUT & 0xff, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0};
	g_autoptr(Raw) raw = raw_new(script_answer);
	g_auto(Failure) failure = {0};
	g_autoptr(PrControl) control = NULL;
	g_autoptr(GError) error = NULL;
	g_autoptr(PrMsg) msg = NULL;
	PrHelloAck ack;
	gboolean failed;
	gint64 began;
	int peer;

	control = connect_to(raw->uri, LONG_MS, &ack, &error);
	assert_non_null(control);
	raw_join(raw);
	peer = put_socket_pair(control);
	shutdown(peer, SHUT_RD);
	began = g_get_monotonic_time();
	start(control, &failure);
	/* Several heartbeats: each is a write that fails. */
	failed = failure_wait(&failure, 5 * INTERVAL_MS);
	send(peer, shut, sizeof shut, MSG_NOSIGNAL);
	close(peer);
	msg = pr_control_recv(control, LONG_MS, NULL);
	if (g_get_monotonic_time() - began >= LAST_WORDS_MS * 1000)
		return FALSE;
	assert_false(failed);
	assert_non_null(msg);
	assert_int_equal(msg->type, PR_RP_SHUT);
	assert_int_equal(msg->length, 4);
	assert_fails(control, &failure, PR_PATH_ERROR_LOST, "127.0.0.1:");
	return TRUE;
}

/*
 * With TLS a write may fail on the descriptor while the TLS thread still has messages from the
 * peer.
 */
static void messages_that_come_after_a_failed_write_are_read(void **state)
{
	for (guint i = 0; i < TRIES; i++)
		if (reads_last_messages_after_a_failed_write())
			return;
	fail_msg("no try read the last messages in time");
}

static void an_end_in_the_middle_of_a_message_is_reported_as_such(void **state)
{
	g_autoptr(Raw) raw = raw_new(script_answer);
	g_auto(Failure) failure = {0};
	g_autoptr(PrControl) control = connect_raw(raw, &failure);

	raw_write(raw->fd, "\x02\x02\0\0\0\0\0\x04\0\0", 10);
	shutdown(raw->fd, SHUT_WR);
	assert_fails(control, &failure, PR_PATH_ERROR_LOST, "in the middle of a message");
}

static gpointer receiver_main(gpointer opaque)
{
	Sender *receiver = opaque;
	g_autoptr(PrMsg) msg = pr_control_recv(receiver->control, G_MAXUINT, &receiver->error);

	return NULL;
}

static void shutdown_ends_a_blocked_send_and_a_blocked_receive(void **state)
{
	g_autoptr(Raw) raw = raw_new(script_answer);
	g_auto(Failure) failure = {0};
	g_autoptr(GError) reason =
		g_error_new(PR_PATH_ERROR, PR_PATH_ERROR_LOCAL_REQUEST, "somebody asked");
	g_autoptr(GError) later = g_error_new(PR_PATH_ERROR, PR_PATH_ERROR_LOST, "too late");
	PrHelloAck ack;
	g_autoptr(PrControl) control = connect_to(raw->uri, LONG_MS, &ack, NULL);
	Sender sender = {.control = control, .n = 4096, .length = MIB};
	Sender receiver = {.control = control};
	GThread *sending, *receiving;

	raw_join(raw);
	/* The heartbeat timeout must not expire in this test. */
	assert_true(
		pr_control_start(control, INTERVAL_MS, 10 * LONG_MS, on_failed, &failure, NULL));
	sending = g_thread_new("sender", sender_main, &sender);
	receiving = g_thread_new("receiver", receiver_main, &receiver);
	assert_false(failure_wait(&failure, 300));
	pr_control_shutdown(control, reason);
	pr_control_shutdown(control, later);
	g_thread_join(sending);
	g_thread_join(receiving);
	assert_true(sender.sent < 4096);
	assert_string_equal(sender.error->message, "somebody asked");
	assert_true(g_error_matches(receiver.error, PR_PATH_ERROR, PR_PATH_ERROR_LOCAL_REQUEST));
	assert_int_equal(failure_calls(&failure), 0);
	g_clear_error(&sender.error);
	g_clear_error(&receiver.error);
}

/* Returns FALSE if it took longer than the channel lingers. Then it proves nothing. */
static gboolean delivers_messages_sent_before_a_shutdown(void)
{
	g_autoptr(Pair) pair = pair_new();
	g_autoptr(GError) reason = g_error_new(PR_PATH_ERROR, PR_PATH_ERROR_LOCAL_REQUEST, "done");
	g_autofree uint8_t *body = g_malloc0(MIB);
	g_autoptr(GByteArray) last = g_byte_array_new();
	Sender noise = {.control = pair->source, .n = 3, .length = MIB};
	GThread *thread = g_thread_new("noise", sender_main, &noise);
	gboolean in_time;
	gint64 ended;

	pr_reason_encode(last, "done");
	/* The other side sends while this side does not read. */
	assert_true(pr_control_send(pair->sink, PR_CMD_PACKAGED, body, MIB, NULL));
	ended = g_get_monotonic_time();
	pr_control_send_nowait(pair->sink, PR_MSG_PAUSE, last);
	pr_control_shutdown(pair->sink, reason);
	g_clear_pointer(&pair->sink, pr_control_free);
	in_time = g_get_monotonic_time() - ended < LINGER_MS * 1000;
	if (in_time) {
		assert_receives(pair->source, PR_CMD_PACKAGED, body, MIB);
		assert_receives(pair->source, PR_MSG_PAUSE, "\0\4done", 6);
	}
	g_thread_join(thread);
	g_clear_error(&noise.error);
	return in_time;
}

static void messages_sent_before_a_shutdown_arrive(void **state)
{
	guint arrived = 0;

	for (guint round = 0; round < 20 || (!arrived && round < 20 * TRIES); round++)
		arrived += delivers_messages_sent_before_a_shutdown();
	assert_true(arrived > 0);
}

static void on_failed_is_called_after_the_last_messages(void **state)
{
	g_autoptr(Pair) pair = pair_new();
	g_autoptr(GError) reason = g_error_new(PR_PATH_ERROR, PR_PATH_ERROR_LOCAL_REQUEST, "done");
	g_autoptr(GByteArray) last = g_byte_array_new();
	gint64 deadline = g_get_monotonic_time() + LONG_MS * 1000;

	pr_reason_encode(last, "done");
	pr_control_send_nowait(pair->sink, PR_MSG_PAUSE, last);
	pr_control_shutdown(pair->sink, reason);
	while (!pr_control_has_ended(pair->source)) {
		assert_true(g_get_monotonic_time() < deadline);
		g_usleep(100); /* between two checks of the condition */
	}
	assert_int_equal(failure_calls(&pair->source_failure), 0);
	assert_receives(pair->source, PR_MSG_PAUSE, "\0\4done", 6);
	assert_int_equal(failure_calls(&pair->source_failure), 0);
	assert_null(pr_control_recv(pair->source, LONG_MS, NULL));
	assert_int_equal(failure_calls(&pair->source_failure), 1);
}

static void send_nowait_is_postponed_behind_an_unfinished_message(void **state)
{
	g_autoptr(Pair) pair = pair_new();
	g_autoptr(GByteArray) word = g_byte_array_new();

	pr_reason_encode(word, "word");
	g_mutex_lock(&pair->source->send_lock);
	pr_control_send_nowait(pair->source, PR_MSG_PAUSE, word);
	pr_control_send_nowait(pair->source, PR_MSG_HOLD, word);
	g_mutex_unlock(&pair->source->send_lock);
	assert_receives(pair->sink, PR_MSG_PAUSE, "\0\4word", 6);
	assert_receives(pair->sink, PR_MSG_HOLD, "\0\4word", 6);
}

static void fault_injection_cuts_the_channel_at_a_message(void **state)
{
	g_autoptr(PrFaults) faults = pr_faults_new("test-control");
	g_autoptr(Destination) destination = destination_new("tcp:127.0.0.1:0");
	g_autofree char *text = g_strdup_printf("faulty+tcp:127.0.0.1:%u?fault-id=test-control",
						destination_port(destination));
	g_autoptr(PrUri) uri = pr_uri_parse(text, FALSE, NULL);
	g_auto(Failure) failure = {0}, sink_failure = {0};
	g_autoptr(PrControl) sink = NULL;
	g_autoptr(PrControl) source = NULL;
	g_autoptr(GError) error = NULL;
	PrHelloAck ack;

	pr_faults_cut_next_message(faults);
	assert_null(connect_to(uri, LONG_MS, &ack, &error));
	assert_non_null(strstr(error->message, "cut by fault injection"));
	g_clear_error(&error);
	source = connect_to(uri, LONG_MS, &ack, &error);
	assert_non_null(source);
	sink = destination_control(destination);
	start(source, &failure);
	start(sink, &sink_failure);
	pr_faults_cut_next_message(faults);
	assert_true(pr_control_send(sink, PR_RP_PONG, "\0\0\0\1", 4, NULL));
	assert_fails(source, &failure, PR_PATH_ERROR_LOST, "cut by fault injection");
	assert_fails(sink, &sink_failure, PR_PATH_ERROR_LOST, "");
}

static int use_tls(void **state)
{
	*state = certs_new();
	g_setenv("CONTROL_RIG_TLS", *state, TRUE);
	return 0;
}

static int unset_tls(void **state)
{
	certs_free(*state);
	return 0;
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(an_idle_channel_stays_open_and_knows_its_round_trip),
		cmocka_unit_test(a_silent_peer_is_dead_after_the_timeout),
		cmocka_unit_test(a_stopped_process_does_not_report_its_peer_as_dead),
		cmocka_unit_test(a_blocked_send_ends_when_the_peer_is_silent),
		cmocka_unit_test(a_busy_consumer_with_a_full_queue_is_not_dead),
		cmocka_unit_test(big_messages_pass_both_ways_at_once),
		cmocka_unit_test(frames_of_several_threads_are_not_mixed),
		cmocka_unit_test(a_frame_larger_than_the_queue_passes_alone),
		cmocka_unit_test(unknown_types_are_skipped),
		cmocka_unit_test(frames_may_come_byte_by_byte),
		cmocka_unit_test(malformed_messages_end_the_channel),
		cmocka_unit_test(messages_before_the_end_are_returned_first),
		cmocka_unit_test(messages_before_the_end_are_read_although_a_write_failed),
		cmocka_unit_test(messages_that_come_after_a_failed_write_are_read),
		cmocka_unit_test(an_end_in_the_middle_of_a_message_is_reported_as_such),
		cmocka_unit_test(shutdown_ends_a_blocked_send_and_a_blocked_receive),
		cmocka_unit_test(messages_sent_before_a_shutdown_arrive),
		cmocka_unit_test(on_failed_is_called_after_the_last_messages),
		cmocka_unit_test(send_nowait_is_postponed_behind_an_unfinished_message),
		cmocka_unit_test(fault_injection_cuts_the_channel_at_a_message),
	};

	/* Those with two real ends. */
	const struct CMUnitTest over_tls[] = {
		cmocka_unit_test(an_idle_channel_stays_open_and_knows_its_round_trip),
		cmocka_unit_test(a_busy_consumer_with_a_full_queue_is_not_dead),
		cmocka_unit_test(big_messages_pass_both_ways_at_once),
		cmocka_unit_test(frames_of_several_threads_are_not_mixed),
		cmocka_unit_test(a_frame_larger_than_the_queue_passes_alone),
		cmocka_unit_test(messages_sent_before_a_shutdown_arrive),
		cmocka_unit_test(send_nowait_is_postponed_behind_an_unfinished_message),
	};

	if (argc == 2 && !strcmp(argv[1], "tls"))
		return cmocka_run_group_tests(over_tls, use_tls, unset_tls);
	if (argc == 3 && !strcmp(argv[1], "--echo"))
		return echo_main(argv[2]);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
