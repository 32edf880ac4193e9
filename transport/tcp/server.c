/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Theory of operation: the source's side of tcp:
 *
 * The source connects the lanes one after the other. Then one thread for each lane answers
 * requests, in the order in which they came, straight from the mapping of guest RAM. The thread
 * receives up to BATCH requests by one system call and sends all their answers by another.
 *
 * Invariant: the peer gets bytes of the regions and of nothing else. Each request is checked
 * against the regions before it is answered; one that is malformed or out of range ends the lane,
 * and the path with it.
 *
 * How a lane ends: the destination closes the connection, shutdown(2) by another thread, or data
 * that stay unacknowledged for 5 s (USER_TIMEOUT_MS). The heartbeats of the control channel are
 * faster.
 *
 * Not handled: requests that overtake each other; a lane is answered in order.
 */
#include "transport/tcp/tcp.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/pkt_sched.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "transport/net/dial.h"

#define BATCH		32   /* requests that one system call answers */
#define USER_TIMEOUT_MS 5000 /* unacknowledged data end the connection */

int pr_tcp_configure(GSocketConnection *connection, PrLaneId lane)
{
	GSocket *socket = g_socket_connection_get_socket(connection);
	unsigned int timeout = USER_TIMEOUT_MS;
	int interactive = TC_PRIO_INTERACTIVE;
	int fd = g_socket_get_fd(socket);

	pr_configure_socket(socket);
	/* The option only makes failures show earlier: a socket without it works. */
	(void)setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &timeout, sizeof(timeout));
	/* Urgent packets then overtake bulk in those queues of this host that know priorities. */
	if (pr_lane_is_urgent(lane))
		(void)setsockopt(fd, SOL_SOCKET, SO_PRIORITY, &interactive, sizeof(interactive));
	return fd;
}

static gboolean connect_error(const PrPathSetup *setup, int number, GError **error)
{
	g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT, "path %s: cannot connect: %s",
		    setup->uri->text, g_strerror(number));
	return FALSE;
}

static gboolean send_hello(int fd, const PrPathSetup *setup, PrLaneId lane, GError **error)
{
	uint8_t header[PR_WIRE_HEADER_BYTES];
	g_autoptr(GByteArray) body = g_byte_array_new();
	g_autoptr(GByteArray) frame = g_byte_array_new();
	PrLaneHello hello;

	pr_backend_lane_hello(&hello, &setup->binding, lane);
	pr_lane_hello_encode(body, &hello);
	pr_header_encode(header, PR_MSG_LANE, body->len);
	g_byte_array_append(frame, header, sizeof(header));
	g_byte_array_append(frame, body->data, body->len);
	if (send(fd, frame->data, frame->len, MSG_NOSIGNAL) == (gssize)frame->len)
		return TRUE;
	return connect_error(setup, errno, error);
}

/* Receives `size` bytes before the deadline. */
static gboolean receive_all(int fd, uint8_t *out, gsize size, const PrPathSetup *setup,
			    gint64 deadline, GError **error)
{
	gsize have = 0;

	while (have < size) {
		gssize n;

		if (!pr_backend_wait(fd, POLLIN, deadline, setup->cancel, error)) {
			g_prefix_error(error, "path %s: ", setup->uri->text);
			return FALSE;
		}
		n = recv(fd, out + have, size - have, 0);
		if (n == 0)
			return connect_error(setup, ECONNRESET, error);
		if (n < 0 && errno != EAGAIN && errno != EINTR)
			return connect_error(setup, errno, error);
		have += MAX(n, 0);
	}
	return TRUE;
}

static gboolean await_answer(int fd, const PrPathSetup *setup, gint64 deadline, GError **error)
{
	uint8_t frame[PR_WIRE_HEADER_BYTES + sizeof(uint32_t)];
	PrMsgHeader header;
	uint32_t status;

	if (!receive_all(fd, frame, sizeof(frame), setup, deadline, error))
		return FALSE;
	if (!pr_header_decode(frame, &header, NULL) || header.type != PR_MSG_LANE_ACK ||
	    header.length != sizeof(status) ||
	    !pr_u32_decode(frame + PR_WIRE_HEADER_BYTES, sizeof(status), &status, NULL)) {
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT,
			    "path %s: what answers there is not Postroad; check host and port",
			    setup->uri->text);
		return FALSE;
	}
	if (status == 0)
		return TRUE;
	g_set_error(
		error, PR_PATH_ERROR, PR_PATH_ERROR_REFUSED,
		"path %s: the destination refused the data lane: it waits for no such migration",
		setup->uri->text);
	return FALSE;
}

/* Replaces the connection by one with TLS. On failure the connection is closed. */
static gboolean secure(const PrPathSetup *setup, GSocketConnection **connection, gint64 deadline,
		       GError **error)
{
	*connection = pr_tls_connect(setup->tls, *connection, setup->uri->host, deadline,
				     setup->cancel, error);
	if (!*connection)
		g_prefix_error(error, "path %s: ", setup->uri->text);
	return *connection != NULL;
}

GSocketConnection *pr_tcp_connect_lane(const PrPathSetup *setup, PrLaneId lane, gint64 deadline,
				       GError **error)
{
	guint16 port = setup->data_port ? setup->data_port : setup->uri->port;
	g_autoptr(GSocketConnection) connection =
		pr_dial(setup->uri, port, deadline, setup->cancel, error);
	int fd;

	if (!connection)
		return NULL;
	pr_tcp_configure(connection, lane);
	if (setup->tls && !secure(setup, &connection, deadline, error))
		return NULL;
	fd = g_socket_get_fd(g_socket_connection_get_socket(connection));
	if (!send_hello(fd, setup, lane, error) || !await_answer(fd, setup, deadline, error))
		return NULL;
	/* GSocket has made the fd non-blocking; from here on no code uses it through GIO. */
	if (fcntl(fd, F_SETFL, 0) == 0)
		return g_steal_pointer(&connection);
	connect_error(setup, errno, error);
	return NULL;
}

static gboolean send_vector(int fd, struct iovec *iov, gsize n_iov)
{
	while (n_iov) {
		struct msghdr msg = {.msg_iov = iov, .msg_iovlen = n_iov};
		gssize n = sendmsg(fd, &msg, MSG_NOSIGNAL);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return FALSE;
		while (n_iov && (gsize)n >= iov->iov_len) {
			n -= iov->iov_len;
			iov++;
			n_iov--;
		}
		if (n_iov) {
			iov->iov_base = (uint8_t *)iov->iov_base + n;
			iov->iov_len -= n;
		}
	}
	return TRUE;
}

/* Decodes one request and points iov at its answer. Returns the fault of the request, or NULL. */
static char *prepare_answer(const uint8_t *frame, const PrRegion *regions, guint n_regions,
			    uint8_t *header, struct iovec iov[2])
{
	PrMsgHeader got;
	PrReqPages req;

	if (!pr_header_decode(frame, &got, NULL) || got.type != PR_RP_REQ_PAGES ||
	    got.length != PR_REQ_PAGES_BYTES ||
	    !pr_req_pages_decode(frame + PR_WIRE_HEADER_BYTES, got.length, &req, NULL))
		return g_strdup("the destination sent something that is not a request for pages");
	if (req.block >= n_regions || req.length > regions[req.block].size ||
	    req.start > regions[req.block].size - req.length)
		return g_strdup_printf("the destination asked for %u bytes at %" G_GUINT64_FORMAT
				       " of RAM block %u, which is not there",
				       req.length, req.start, req.block);
	pr_header_encode(header, PR_RP_PAGES, req.length);
	iov[0] = (struct iovec){header, PR_WIRE_HEADER_BYTES};
	iov[1] = (struct iovec){(uint8_t *)regions[req.block].addr + req.start, req.length};
	return NULL;
}

/* Answers the n requests at `frames`. Returns the reason why the lane ends, or NULL. */
static char *answer_requests(int fd, const uint8_t *frames, gsize n, const PrRegion *regions,
			     guint n_regions)
{
	uint8_t headers[BATCH][PR_WIRE_HEADER_BYTES];
	struct iovec iov[2 * BATCH];

	for (gsize i = 0; i < n; i++) {
		char *wrong = prepare_answer(frames + i * PR_TCP_REQUEST_BYTES, regions, n_regions,
					     headers[i], &iov[2 * i]);

		if (wrong)
			return wrong;
	}
	if (!send_vector(fd, iov, 2 * n))
		return g_strdup_printf("cannot send pages: %s", g_strerror(errno));
	return NULL;
}

/* recv(2), which polls for the first spin_us and sleeps after that. */
static gssize receive_requests(int fd, uint8_t *out, gsize size, guint spin_us)
{
	gint64 awake_until = g_get_monotonic_time() + spin_us;

	while (g_get_monotonic_time() < awake_until) {
		gssize n = recv(fd, out, size, MSG_DONTWAIT);

		if (n >= 0 || errno != EAGAIN)
			return n;
		sched_yield();
	}
	return recv(fd, out, size, 0);
}

char *pr_tcp_serve(int fd, const PrRegion *regions, guint n_regions, guint spin_us)
{
	uint8_t buffer[BATCH * PR_TCP_REQUEST_BYTES];
	char *reason = NULL;
	gsize have = 0;

	while (!reason) {
		gssize n = receive_requests(fd, buffer + have, sizeof(buffer) - have, spin_us);
		gsize whole;

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return g_strdup_printf("cannot receive requests: %s", g_strerror(errno));
		if (n == 0)
			return NULL;
		have += n;
		whole = have / PR_TCP_REQUEST_BYTES;
		reason = answer_requests(fd, buffer, whole, regions, n_regions);
		have -= whole * PR_TCP_REQUEST_BYTES;
		memmove(buffer, buffer + whole * PR_TCP_REQUEST_BYTES, have);
	}
	return reason;
}
