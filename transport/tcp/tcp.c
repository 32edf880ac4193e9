/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * tcp: pages over a plain socket, the path of last resort.
 *
 * A lane is one connection, to the control port. The destination sends a REQ_PAGES frame for each
 * READ and does not wait for answers in between; the requests of one round leave by one system
 * call. The source answers in order: a PAGES header, then the raw bytes. So the destination knows
 * what comes next. One system call receives headers and bytes of several answers into a buffer,
 * and pr_region_store() stores each whole answer. Into regions of huge pages the bytes are
 * received directly.
 *
 * Requests never fill the socket buffer: at most READS_MAX of them, 24 bytes each, are
 * unanswered. If a send blocks for SEND_TIMEOUT_MS all the same, the peer's host is gone.
 *
 * Fence: after shutdown() this side receives nothing any more, whatever the kernel has already
 * buffered.
 */
#include "transport/tcp/tcp.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "transport/backends.h"
#include "util/try-alloc.h"

#define READS_MAX	64
#define BATCH		8	     /* answers that one system call may receive */
#define BUFFER_BYTES	(256 * 1024) /* for several answers; one alone may take PR_READ_MAX */
#define SEND_TIMEOUT_MS 1000	     /* see above */

typedef struct TcpRead {
	uint64_t token;
	const PrRegion *region;
	uint64_t offset;
	uint32_t length;
	uint8_t *at;			      /* where its bytes are received; NULL: undecided */
	uint8_t header[PR_WIRE_HEADER_BYTES]; /* of the answer, as far as received */
} TcpRead;

/* Owned by the thread that uses the lane, except as noted. */
typedef struct TcpLane {
	GSocketConnection *connection; /* owns fd */
	int fd;			       /* constant, -1: none; any thread calls shutdown(2) */
	/* destination */
	PrPollSet poll_set;	  /* any thread wakes */
	TcpRead reads[READS_MAX]; /* outstanding READs, a ring in the order of the answers */
	guint head, n;
	uint8_t requests[READS_MAX * PR_TCP_REQUEST_BYTES]; /* not sent yet */
	gsize queued;					    /* bytes in `requests` */
	gsize done;	 /* bytes received of the head's answer, header included */
	uint8_t *buffer; /* PR_READ_MAX bytes */
	gsize used;	 /* bytes in `buffer` of answers that are not stored yet */
	/* source */
	struct TcpPath *path;
	GThread *server;
} TcpLane;

typedef struct TcpPath {
	PrDataPath base;
	PrPathLife life;	 /* thread-safe */
	const PrRegion *regions; /* constant, as is n_regions */
	guint n_regions;
	gboolean *storable; /* constant; for each region whether to use pr_region_store() */
	TcpLane lanes[PR_LANES_MAX]; /* base.n_lanes of them */
} TcpPath;

static void stop_lanes(PrDataPath *base)
{
	TcpPath *path = (TcpPath *)base;

	for (guint i = 0; i < base->n_lanes; i++) {
		shutdown(path->lanes[i].fd, SHUT_RDWR);
		pr_poll_set_wake(&path->lanes[i].poll_set);
	}
}

static TcpPath *path_new(const PrPathSetup *setup)
{
	TcpPath *path = g_new0(TcpPath, 1);

	path->base.ops = &pr_transport_tcp;
	path->base.n_lanes = pr_backend_n_lanes(setup);
	path->regions = setup->regions;
	path->n_regions = setup->n_regions;
	path->storable = pr_regions_storable(setup->regions, setup->n_regions);
	pr_path_life_init(&path->life, setup, &path->base, stop_lanes);
	for (guint i = 0; i < path->base.n_lanes; i++) {
		path->lanes[i].path = path;
		path->lanes[i].fd = -1;
		path->lanes[i].poll_set = PR_POLL_SET_INIT;
	}
	return path;
}

/* Also ends the path, if it is up. */
static void path_free(TcpPath *path)
{
	pr_path_life_shut(&path->life);
	/* All servers end before the first lane is closed: each may stop the others' lanes. */
	for (guint i = 0; i < path->base.n_lanes; i++)
		if (path->lanes[i].server)
			g_thread_join(path->lanes[i].server);
	for (guint i = 0; i < path->base.n_lanes; i++) {
		TcpLane *lane = &path->lanes[i];

		pr_poll_set_clear(&lane->poll_set);
		g_clear_object(&lane->connection);
		g_free(lane->buffer);
	}
	pr_path_life_clear(&path->life);
	g_free(path->storable);
	g_free(path);
}
G_DEFINE_AUTOPTR_CLEANUP_FUNC(TcpPath, path_free)

static gpointer server_thread(gpointer opaque)
{
	TcpLane *lane = opaque;
	TcpPath *path = lane->path;
	guint spin_us = pr_lane_is_urgent((PrLaneId)(lane - path->lanes)) ? PR_BACKEND_SPIN_US : 0;
	g_autofree char *reason = pr_tcp_serve(lane->fd, path->regions, path->n_regions, spin_us);

	if (reason)
		pr_path_life_fail(&path->life, "%s", reason);
	else
		pr_path_life_fail_closed(&path->life);
	return NULL;
}

static uint16_t tcp_listener_port(PrDataListener *listener)
{
	return 0;
}

static gboolean has_lane(const PrDataPath *base, PrLaneId lane)
{
	return ((const TcpPath *)base)->lanes[lane].connection != NULL;
}

static gboolean accept_lane(PrDataPath *base, PrDataListener *listener, PrLaneId id,
			    gpointer connection, const PrPathSetup *setup, gint64 deadline,
			    GError **error)
{
	TcpLane *lane = &((TcpPath *)base)->lanes[id];

	lane->connection = connection;
	pr_tcp_acknowledge(connection);
	lane->fd = pr_tcp_configure(connection, id);
	lane->buffer = pr_try_alloc(PR_READ_MAX, "a data lane", error);
	return lane->buffer && pr_poll_set_init(&lane->poll_set, error) &&
	       pr_poll_set_add(&lane->poll_set, lane->fd, error);
}

static PrDataPath *tcp_accept(PrDataListener *listener, const PrPathSetup *setup, GError **error)
{
	static const PrLaneAcceptor acceptor = {has_lane, accept_lane};
	g_autoptr(TcpPath) path = path_new(setup);

	if (!pr_backend_accept_lanes(&path->base, listener, setup, &acceptor, error))
		return NULL;
	return &g_steal_pointer(&path)->base;
}

static PrDataPath *tcp_connect(const PrPathSetup *setup, GError **error)
{
	gint64 deadline = pr_backend_deadline(setup->timeout_ms);
	g_autoptr(TcpPath) path = NULL;

	if (!pr_backend_check_options(setup->uri, (const char *const[]){NULL}, error))
		return NULL;
	path = path_new(setup);
	for (guint i = 0; i < path->base.n_lanes; i++) {
		TcpLane *lane = &path->lanes[i];

		lane->connection = pr_tcp_connect_lane(setup, i, deadline, error);
		if (!lane->connection)
			return NULL;
		lane->fd = g_socket_get_fd(g_socket_connection_get_socket(lane->connection));
	}
	for (guint i = 0; i < path->base.n_lanes; i++) {
		TcpLane *lane = &path->lanes[i];

		lane->server = pr_thread_try("pr-tcp-serve", server_thread, lane, error);
		if (!lane->server)
			return NULL;
	}
	return &g_steal_pointer(&path)->base;
}

/* Requests name block and offset, and the source checks them against its regions: no keys
 * needed. */
static GArray *tcp_grants(PrDataPath *path)
{
	return g_array_new(FALSE, FALSE, sizeof(PrGrant));
}

static void tcp_set_grants(PrDataPath *path, const PrGrant *grants, guint n)
{
}

static guint tcp_max_reads(PrDataPath *path, PrLaneId lane)
{
	return READS_MAX;
}

static void queue_request(TcpLane *lane, const PrReqPages *req)
{
	uint8_t *frame = lane->requests + lane->queued;

	pr_header_encode(frame, PR_RP_REQ_PAGES, PR_REQ_PAGES_BYTES);
	pr_req_pages_encode(frame + PR_WIRE_HEADER_BYTES, req);
	lane->queued += PR_TCP_REQUEST_BYTES;
}

/* Sends the queued requests. FALSE: the path has failed. */
static gboolean send_requests(TcpPath *path, TcpLane *lane)
{
	gint64 deadline = pr_backend_deadline(SEND_TIMEOUT_MS);
	gsize sent = 0;

	while (sent < lane->queued) {
		gssize n = send(lane->fd, lane->requests + sent, lane->queued - sent,
				MSG_DONTWAIT | MSG_NOSIGNAL);

		if (n >= 0) {
			sent += n;
		} else if (errno == EAGAIN) {
			if (!pr_backend_wait(lane->fd, POLLOUT, deadline, NULL, NULL)) {
				pr_path_life_fail(&path->life, "the socket takes no more requests");
				return FALSE;
			}
		} else if (errno != EINTR) {
			pr_path_life_fail(&path->life, "%s", g_strerror(errno));
			return FALSE;
		}
	}
	lane->queued = 0;
	return TRUE;
}

static gboolean post(TcpPath *path, PrLaneId id, uint32_t block, uint64_t offset, uint32_t length,
		     uint64_t token)
{
	TcpLane *lane = &path->lanes[id];
	PrReqPages req = {.block = block, .start = offset, .length = length};

	g_assert(lane->n < READS_MAX);
	if (!pr_path_life_is_up(&path->life) ||
	    (lane->queued == sizeof(lane->requests) && !send_requests(path, lane)))
		return FALSE;
	queue_request(lane, &req);
	lane->reads[(lane->head + lane->n) % READS_MAX] = (TcpRead){
		.token = token,
		.region = &path->regions[block],
		.offset = offset,
		.length = length,
	};
	lane->n++;
	return TRUE;
}

static gboolean tcp_post_read(PrDataPath *base, PrLaneId id, uint32_t block, uint64_t offset,
			      uint32_t length, uint64_t token)
{
	TcpPath *path = (TcpPath *)base;

	g_assert(length <= PR_READ_MAX && block < path->n_regions &&
		 offset + length <= path->regions[block].size);
	return post(path, id, block, offset, length, token);
}

/* The source answers a request for no bytes with a header alone. */
static gboolean tcp_post_probe(PrDataPath *base, PrLaneId id, uint64_t token)
{
	return post((TcpPath *)base, id, 0, 0, 0, token);
}

/* Decides where an answer is received. FALSE: the buffer is full. */
static gboolean place(TcpPath *path, TcpLane *lane, TcpRead *read, gboolean first)
{
	if (read->at)
		return TRUE;
	if (!path->storable[read->region - path->regions]) {
		read->at = (uint8_t *)read->region->addr + read->offset;
		return TRUE;
	}
	/* Answers are placed in order: no later one uses the buffer yet. */
	if (first)
		lane->used = 0;
	else if (lane->used + read->length > BUFFER_BYTES)
		return FALSE;
	read->at = lane->buffer + lane->used;
	lane->used += read->length;
	return TRUE;
}

/* Points iov at the next headers and data, of up to `max` outstanding READs. */
static guint place_answers(TcpPath *path, TcpLane *lane, struct iovec iov[2 * BATCH], guint max,
			   gsize *ret_bytes)
{
	gsize skip = lane->done;
	guint n_iov = 0;

	*ret_bytes = 0;
	for (guint i = 0; i < MIN(max, lane->n); i++) {
		TcpRead *read = &lane->reads[(lane->head + i) % READS_MAX];

		if (!place(path, lane, read, i == 0))
			break;
		struct iovec parts[2] = {{read->header, sizeof(read->header)},
					 {read->at, read->length}};

		for (guint j = 0; j < G_N_ELEMENTS(parts); j++) {
			gsize cut = MIN(skip, parts[j].iov_len);

			skip -= cut;
			if (cut == parts[j].iov_len)
				continue;
			iov[n_iov++] = (struct iovec){(uint8_t *)parts[j].iov_base + cut,
						      parts[j].iov_len - cut};
			*ret_bytes += parts[j].iov_len - cut;
		}
	}
	return n_iov;
}

static gboolean is_answer_to(const TcpRead *read)
{
	PrMsgHeader header;

	return pr_header_decode(read->header, &header, NULL) && header.type == PR_RP_PAGES &&
	       header.length == read->length;
}

/* Stores a whole answer. FALSE: the path has failed. */
static gboolean store(TcpPath *path, const TcpRead *read)
{
	if (!path->storable[read->region - path->regions] ||
	    pr_region_store(read->region, read->offset, read->at, read->length))
		return TRUE;
	pr_path_life_fail(&path->life, "cannot store pages in guest RAM: %s", g_strerror(errno));
	return FALSE;
}

/* Accounts for n received bytes. Returns how many READs they completed, -1 if the path has
 * failed. */
static int account_answers(TcpPath *path, TcpLane *lane, gsize n, PrCompletion *ret)
{
	guint completed = 0;

	while (n) {
		TcpRead *read = &lane->reads[lane->head];
		gsize whole = sizeof(read->header) + read->length;
		gsize take = MIN(n, whole - lane->done);

		n -= take;
		lane->done += take;
		if (lane->done >= sizeof(read->header) && !is_answer_to(read)) {
			pr_path_life_fail(&path->life,
					  "the source did not send the pages that were asked for");
			return -1;
		}
		if (lane->done < whole)
			break;
		if (!store(path, read))
			return -1;
		ret[completed++] = (PrCompletion){.token = read->token, .ok = TRUE};
		lane->head = (lane->head + 1) % READS_MAX;
		lane->n--;
		lane->done = 0;
	}
	return completed;
}

/* Notices the end of an idle connection, and a peer that sends without having been asked. */
static void check_idle(TcpPath *path, TcpLane *lane)
{
	uint8_t byte;
	gssize n = recv(lane->fd, &byte, 1, MSG_DONTWAIT | MSG_PEEK);

	if (n == 0)
		pr_path_life_fail_closed(&path->life);
	else if (n > 0)
		pr_path_life_fail(&path->life, "the source sent pages that were not asked for");
	else if (errno != EAGAIN && errno != EINTR)
		pr_path_life_fail(&path->life, "%s", g_strerror(errno));
}

/* Receives answers by one system call. FALSE: no more bytes can be received now. */
static gboolean receive_answers(TcpPath *path, TcpLane *lane, PrCompletion *ret, guint max,
				guint *n_stored)
{
	struct iovec iov[2 * BATCH];
	gsize wanted;
	struct msghdr msg = {.msg_iov = iov};
	gssize n;
	int completed;

	msg.msg_iovlen = place_answers(path, lane, iov, MIN(max - *n_stored, BATCH), &wanted);
	n = recvmsg(lane->fd, &msg, MSG_DONTWAIT);
	if (n <= 0) {
		if (n == 0)
			pr_path_life_fail_closed(&path->life);
		else if (errno != EAGAIN && errno != EINTR)
			pr_path_life_fail(&path->life, "%s", g_strerror(errno));
		return FALSE;
	}
	completed = account_answers(path, lane, n, ret + *n_stored);
	if (completed < 0)
		return FALSE;
	*n_stored += completed;
	return (gsize)n == wanted;
}

/* Completes the outstanding READs of a path that has ended, as failed. */
static guint flush_reads(TcpLane *lane, PrCompletion *ret, guint max)
{
	guint n = 0;

	lane->done = 0;
	for (; n < max && lane->n; lane->n--) {
		ret[n++] = (PrCompletion){.token = lane->reads[lane->head].token, .ok = FALSE};
		lane->head = (lane->head + 1) % READS_MAX;
	}
	return n;
}

static guint tcp_poll(PrDataPath *base, PrLaneId id, PrCompletion *ret, guint max)
{
	TcpPath *path = (TcpPath *)base;
	TcpLane *lane = &path->lanes[id];
	guint n = 0;

	if (!lane->n && pr_path_life_is_up(&path->life))
		check_idle(path, lane);
	if (lane->queued)
		send_requests(path, lane);
	while (n < max && lane->n && pr_path_life_is_up(&path->life))
		if (!receive_answers(path, lane, ret, max, &n))
			break;
	if (!pr_path_life_is_up(&path->life))
		n += flush_reads(lane, ret + n, max - n);
	return n;
}

static int tcp_wait_fd(PrDataPath *base, PrLaneId id)
{
	return ((TcpPath *)base)->lanes[id].poll_set.epoll_fd;
}

/* The epoll fd is level-triggered: unread bytes keep it readable. */
static gboolean tcp_arm(PrDataPath *base, PrLaneId id)
{
	TcpPath *path = (TcpPath *)base;
	TcpLane *lane = &path->lanes[id];

	if (pr_path_life_is_up(&path->life) && lane->queued)
		send_requests(path, lane);
	return pr_path_life_is_up(&path->life);
}

static const char *tcp_device(PrDataPath *path)
{
	return NULL;
}

static void tcp_shutdown(PrDataPath *base)
{
	pr_path_life_shut(&((TcpPath *)base)->life);
}

static gboolean tcp_drain(PrDataPath *base, guint timeout_ms)
{
	TcpPath *path = (TcpPath *)base;

	tcp_shutdown(base);
	for (guint i = 0; i < path->base.n_lanes; i++)
		path->lanes[i].n = path->lanes[i].queued = 0;
	return TRUE;
}

static void tcp_destroy(PrDataPath *base)
{
	path_free((TcpPath *)base);
}

static void tcp_describe(GString *out)
{
	pr_backend_describe(out, "tcp:HOST:PORT",
			    "pages over a plain socket: the path of last resort");
}

const PrTransportOps pr_transport_tcp = {
	.scheme = "tcp",
	.describe = tcp_describe,
	.listen = pr_tcp_listen,
	.listener_port = tcp_listener_port,
	.offer = pr_tcp_offer,
	.listener_close = pr_tcp_listener_close,
	.expect = pr_backend_expect,
	.forget = pr_backend_forget,
	.accept = tcp_accept,
	.connect = tcp_connect,
	.grants = tcp_grants,
	.set_grants = tcp_set_grants,
	.max_reads = tcp_max_reads,
	.post_read = tcp_post_read,
	.post_probe = tcp_post_probe,
	.poll = tcp_poll,
	.wait_fd = tcp_wait_fd,
	.arm = tcp_arm,
	.device = tcp_device,
	.shutdown = tcp_shutdown,
	.drain = tcp_drain,
	.destroy = tcp_destroy,
	.admit_message = pr_backend_admit_message,
};
