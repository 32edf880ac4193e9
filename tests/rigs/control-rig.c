/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "tests/rigs/control-rig.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "transport/control/internal.h"

static gint64 deadline_in(gint64 ms)
{
	return g_get_monotonic_time() + ms * 1000;
}

void failure_clear(Failure *failure)
{
	g_clear_error(&failure->reason);
	g_mutex_clear(&failure->lock);
	g_cond_clear(&failure->changed);
}

void on_failed(const GError *reason, void *opaque)
{
	Failure *failure = opaque;

	g_mutex_lock(&failure->lock);
	failure->calls++;
	g_clear_error(&failure->reason);
	failure->reason = g_error_copy(reason);
	g_cond_broadcast(&failure->changed);
	g_mutex_unlock(&failure->lock);
}

guint failure_calls(Failure *failure)
{
	g_autoptr(GMutexLocker) locker G_GNUC_UNUSED = g_mutex_locker_new(&failure->lock);

	return failure->calls;
}

gboolean failure_wait(Failure *failure, gint64 ms)
{
	g_autoptr(GMutexLocker) locker G_GNUC_UNUSED = g_mutex_locker_new(&failure->lock);
	gint64 deadline = deadline_in(ms);

	while (!failure->calls)
		if (!g_cond_wait_until(&failure->changed, &failure->lock, deadline))
			return FALSE;
	return TRUE;
}

void start(PrControl *control, Failure *failure)
{
	assert_true(pr_control_start(control, INTERVAL_MS, TIMEOUT_MS, on_failed, failure, NULL));
}

void on_hello(PrControl *control, const PrHello *hello, PrListener *listener, void *opaque)
{
	Destination *destination = opaque;

	g_mutex_lock(&destination->lock);
	destination->hellos++;
	g_strlcpy(destination->scheme, hello->scheme, sizeof destination->scheme);
	g_cond_broadcast(&destination->changed);
	while (destination->hold)
		g_cond_wait(&destination->changed, &destination->lock);
	g_mutex_unlock(&destination->lock);
	pr_control_answer(control, &destination->ack, NULL);
	g_mutex_lock(&destination->lock);
	g_queue_push_tail(&destination->controls, control);
	g_cond_broadcast(&destination->changed);
	g_mutex_unlock(&destination->lock);
}

static Destination *new_destination(const char *text, const PrTls *tls, guint handshake_ms)
{
	const PrSecurity security = {.tls = tls};
	Destination *destination = g_new0(Destination, 1);
	g_autoptr(PrUri) uri = pr_uri_parse(text, TRUE, NULL);
	g_autoptr(GError) error = NULL;

	destination->tls = tls;
	destination->ack.data_port = 4445;
	g_mutex_init(&destination->lock);
	g_cond_init(&destination->changed);
	destination->listener =
		pr_listener_new(uri, &security, handshake_ms, on_hello, destination, NULL, &error);
	if (!destination->listener)
		fail_msg("%s", error->message);
	return destination;
}

Destination *destination_new(const char *text)
{
	return destination_new_tls(text, NULL);
}

Destination *destination_new_tls(const char *text, const PrTls *tls)
{
	return new_destination(text, tls, PATIENT_MS);
}

Destination *destination_new_hasty(const char *text, const PrTls *tls)
{
	return new_destination(text, tls, STALL_MS);
}

void destination_block_hello(Destination *destination, gboolean hold)
{
	g_mutex_lock(&destination->lock);
	destination->hold = hold;
	g_cond_broadcast(&destination->changed);
	g_mutex_unlock(&destination->lock);
}

void destination_free(Destination *destination)
{
	destination_block_hello(destination, FALSE);
	pr_listener_free(destination->listener);
	g_queue_clear_full(&destination->controls, (GDestroyNotify)pr_control_free);
	g_mutex_clear(&destination->lock);
	g_cond_clear(&destination->changed);
	g_free(destination);
}

PrControl *destination_control(Destination *destination)
{
	g_autoptr(GMutexLocker) locker G_GNUC_UNUSED = g_mutex_locker_new(&destination->lock);
	gint64 deadline = deadline_in(LONG_MS);

	while (g_queue_is_empty(&destination->controls))
		if (!g_cond_wait_until(&destination->changed, &destination->lock, deadline))
			fail_msg("no connection came in");
	return g_queue_pop_head(&destination->controls);
}

void destination_wait_hellos(Destination *destination, guint n)
{
	g_autoptr(GMutexLocker) locker G_GNUC_UNUSED = g_mutex_locker_new(&destination->lock);
	gint64 deadline = deadline_in(LONG_MS);

	while (destination->hellos < n)
		if (!g_cond_wait_until(&destination->changed, &destination->lock, deadline))
			fail_msg("%u of %u HELLOs came in", destination->hellos, n);
}

uint16_t destination_port(Destination *destination)
{
	return pr_listener_uri(destination->listener)->port;
}

static PrWireBlock one_block = {"mem0", 4096, 4096};

PrHello hello_of(uint16_t version)
{
	return (PrHello){.version = version,
			 .role = PR_HELLO_SOURCE,
			 .epoch = 1,
			 .scheme = "tcp",
			 .n_blocks = 1,
			 .blocks = &one_block};
}

PrControl *connect_to(const PrUri *uri, guint handshake_ms, PrHelloAck *ack, GError **error)
{
	PrHello hello = hello_of(PR_WIRE_VERSION);

	return pr_control_connect(uri, NULL, &hello, LONG_MS, handshake_ms, NULL, ack, error);
}

PrControl *connect_destination(Destination *destination)
{
	g_autoptr(GError) error = NULL;
	PrHelloAck ack;
	PrHello hello = hello_of(PR_WIRE_VERSION);
	PrControl *control =
		pr_control_connect(pr_listener_uri(destination->listener), destination->tls, &hello,
				   LONG_MS, LONG_MS, NULL, &ack, &error);

	if (!control)
		fail_msg("%s", error->message);
	return control;
}

static PrTls *tls_of_environment(void)
{
	g_autoptr(GError) error = NULL;
	const char *dir = g_getenv("CONTROL_RIG_TLS");
	PrTls *tls = dir ? pr_tls_new(dir, NULL, &error) : NULL;

	if (error)
		fail_msg("%s", error->message);
	return tls;
}

Pair *pair_new(void)
{
	Pair *pair = g_new0(Pair, 1);

	pair->tls = tls_of_environment();
	pair->destination = destination_new_tls("tcp:127.0.0.1:0", pair->tls);
	pair->source = connect_destination(pair->destination);
	pair->sink = destination_control(pair->destination);
	start(pair->source, &pair->source_failure);
	start(pair->sink, &pair->sink_failure);
	return pair;
}

void pair_free(Pair *pair)
{
	pr_control_free(pair->source);
	pr_control_free(pair->sink);
	destination_free(pair->destination);
	pr_tls_free(pair->tls);
	failure_clear(&pair->source_failure);
	failure_clear(&pair->sink_failure);
	g_free(pair);
}

/* Raw peers. Reads and writes end after LONG_MS. */

static void raw_configure(int fd)
{
	struct timeval limit = {.tv_sec = LONG_MS / 1000};

	assert_int_equal(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit), 0);
	assert_int_equal(setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit), 0);
}

int raw_connect(uint16_t port)
{
	struct sockaddr_in to = {.sin_family = AF_INET,
				 .sin_port = htons(port),
				 .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	raw_configure(fd);
	assert_int_equal(connect(fd, (struct sockaddr *)&to, sizeof to), 0);
	return fd;
}

int raw_listen(PrUri **ret_uri)
{
	struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t len = sizeof at;
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	g_autofree char *text = NULL;

	raw_configure(fd);
	assert_int_equal(bind(fd, (struct sockaddr *)&at, sizeof at), 0);
	assert_int_equal(listen(fd, 8), 0);
	assert_int_equal(getsockname(fd, (struct sockaddr *)&at, &len), 0);
	text = g_strdup_printf("tcp:127.0.0.1:%u", ntohs(at.sin_port));
	*ret_uri = pr_uri_parse(text, FALSE, NULL);
	return fd;
}

void raw_write(int fd, const void *data, gsize length)
{
	assert_int_equal(send(fd, data, length, MSG_NOSIGNAL), length);
}

void raw_send(int fd, uint16_t type, const void *body, uint32_t length)
{
	uint8_t header[PR_WIRE_HEADER_BYTES];

	pr_header_encode(header, type, length);
	raw_write(fd, header, sizeof header);
	if (length)
		raw_write(fd, body, length);
}

void raw_read(int fd, void *data, gsize length)
{
	for (gsize got = 0; got < length;) {
		ssize_t n = recv(fd, (uint8_t *)data + got, length - got, MSG_WAITALL);

		assert_true(n > 0 || (n < 0 && errno == EINTR));
		got += n > 0 ? (gsize)n : 0;
	}
}

gboolean raw_reaches_end(int fd)
{
	char waste[4096];
	ssize_t n;

	do
		n = recv(fd, waste, sizeof waste, 0);
	while (n > 0 || (n < 0 && errno == EINTR));
	return n == 0 || errno == ECONNRESET;
}

void raw_read_hello(int fd)
{
	uint8_t head[PR_WIRE_HEADER_BYTES];
	PrMsgHeader header;
	g_autofree uint8_t *body = NULL;

	raw_read(fd, head, sizeof head);
	assert_true(pr_header_decode(head, &header, NULL));
	assert_int_equal(header.type, PR_MSG_HELLO);
	body = g_malloc(header.length);
	raw_read(fd, body, header.length);
}

static gpointer raw_main(gpointer opaque)
{
	Raw *raw = opaque;

	do
		raw->fd = accept(raw->listening, NULL, NULL);
	while (raw->fd < 0 && errno == EINTR);
	raw_configure(raw->fd);
	raw->script(raw->fd);
	return NULL;
}

Raw *raw_new(void (*script)(int fd))
{
	Raw *raw = g_new0(Raw, 1);

	raw->script = script;
	raw->listening = raw_listen(&raw->uri);
	raw->thread = g_thread_new("raw", raw_main, raw);
	return raw;
}

int raw_join(Raw *raw)
{
	if (raw->thread)
		g_thread_join(g_steal_pointer(&raw->thread));
	return raw->fd;
}

void raw_free(Raw *raw)
{
	raw_join(raw);
	close(raw->fd);
	close(raw->listening);
	pr_uri_free(raw->uri);
	g_free(raw);
}

void script_answer(int fd)
{
	g_autoptr(GByteArray) ack = g_byte_array_new();
	PrHelloAck ok = {0};

	raw_read_hello(fd);
	pr_hello_ack_encode(ack, &ok);
	raw_send(fd, PR_MSG_HELLO_ACK, ack->data, ack->len);
}

static PrControl *connect_raw_unstarted(Raw *raw)
{
	g_autoptr(GError) error = NULL;
	PrHelloAck ack;
	PrControl *control = connect_to(raw->uri, LONG_MS, &ack, &error);

	if (!control)
		fail_msg("%s", error->message);
	raw_join(raw);
	return control;
}

PrControl *connect_raw(Raw *raw, Failure *failure)
{
	PrControl *control = connect_raw_unstarted(raw);

	start(control, failure);
	return control;
}

PrControl *connect_raw_hasty(Raw *raw, Failure *failure)
{
	PrControl *control = connect_raw_unstarted(raw);

	assert_true(pr_control_start(control, INTERVAL_MS, SILENCE_MS, on_failed, failure, NULL));
	return control;
}

void assert_fails(PrControl *control, Failure *failure, int code, const char *text)
{
	g_autoptr(GError) error = NULL;
	g_autoptr(GError) again = NULL;
	g_autoptr(PrMsg) msg = pr_control_recv(control, LONG_MS, &error);

	assert_null(msg);
	assert_int_equal(failure_calls(failure), 1);
	if (!g_error_matches(error, PR_PATH_ERROR, code) || !strstr(error->message, text))
		fail_msg("failed with %d, \"%s\", not with %d, \"%s\"", error->code, error->message,
			 code, text);
	assert_string_equal(failure->reason->message, error->message);
	assert_false(pr_control_send(control, PR_CMD_POSTCOPY_RUN, NULL, 0, &again));
	assert_string_equal(again->message, error->message);
}

void assert_receives(PrControl *control, uint16_t type, const void *body, gsize length)
{
	g_autoptr(GError) error = NULL;
	g_autoptr(PrMsg) msg = pr_control_recv(control, LONG_MS, &error);

	if (!msg)
		fail_msg("%s", error->message);
	assert_string_equal(pr_msg_name(msg->type), pr_msg_name(type));
	assert_int_equal(msg->length, length);
	if (length)
		assert_memory_equal(msg->body, body, length);
}

int put_socket_pair(PrControl *control)
{
	int pair[2];
	g_autoptr(GSocketConnection) before = pr_control_take_connection(control);
	g_autoptr(GSocket) socket = NULL;

	assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
	socket = g_socket_new_from_fd(pair[0], NULL);
	assert_non_null(socket);
	pr_control_put_connection(control, g_socket_connection_factory_create_connection(socket));
	return pair[1];
}
