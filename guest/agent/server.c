/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The server thread: accepts engines, reads requests, answers. It waits in poll() only, and the
 * fence is the only request that takes long. Replies are sent without blocking: an engine that does
 * not read them loses its connection. A connection that breaks the protocol is closed. Nothing that
 * arrives here can end the process.
 *
 * The first connection that says HELLO is attached, until it closes. Another HELLO meanwhile is
 * refused, as two engines would place pages twice.
 *
 * The attached engine can read and write the guest's memory. So it has to run as root, or as the
 * user of this process. The mode of the socket file demands the same, but administrators widen
 * modes.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "guest/agent/internal.h"
#include "guest/packet.h"

#define ACCEPT_PAUSE 100 /* ms before the next accept(), where the process has no descriptor left */

typedef struct Incoming {
	PrAgentRequest request;
	int fd; /* owned; -1: none came */
} Incoming;

static int bind_socket(int fd, const struct sockaddr_un *addr)
{
	struct stat st;
	int probe, err;

	if (bind(fd, (const struct sockaddr *)addr, sizeof(*addr)) == 0)
		return 0;
	if (errno != EADDRINUSE)
		return -errno;
	if (stat(addr->sun_path, &st) < 0 || !S_ISSOCK(st.st_mode))
		return -EADDRINUSE;
	probe = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (probe < 0)
		return -errno;
	err = connect(probe, (const struct sockaddr *)addr, sizeof(*addr)) < 0 ? errno : 0;
	close(probe);
	if (err != ECONNREFUSED)
		return -EADDRINUSE;
	/* No process listens: one that is gone has left the file behind. */
	if (unlink(addr->sun_path) < 0)
		return -errno;
	return bind(fd, (const struct sockaddr *)addr, sizeof(*addr)) < 0 ? -errno : 0;
}

int agent_listen(PrAgent *agent, const char *path)
{
	int fd, err;

	if (!*path || strlen(path) >= sizeof(agent->addr.sun_path))
		return -ENAMETOOLONG;
	agent->addr.sun_family = AF_UNIX;
	strcpy(agent->addr.sun_path, path);
	fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return -errno;
	/* bind() gives the file the mode of the socket, so that it is private from the start. */
	err = fchmod(fd, 0600) < 0 ? -errno : bind_socket(fd, &agent->addr);
	if (!err && (listen(fd, PR_AGENT_CONNS) < 0 || stat(path, &agent->socket_stat) < 0)) {
		err = -errno;
		unlink(path);
	}
	if (err) {
		close(fd);
		return err;
	}
	agent->listen_fd = fd;
	return 0;
}

static bool handle_regions(PrAgent *agent, int conn, const PrAgentRequest *request)
{
	PrAgentWireRegion regions[PR_AGENT_REGIONS_MAX];
	int fds[PR_AGENT_REGIONS_MAX];
	AgentResult result = {.status = PR_AGENT_OK};
	PrAgentReply reply = agent_make_reply(request, &result);
	struct iovec pieces[] = {{.iov_base = &reply, .iov_len = sizeof(reply)},
				 {.iov_base = regions}};
	PrPacket packet = {.pieces = pieces, .n_pieces = 2, .fds = fds};
	bool ok;

	/* The lock keeps the memfds open until they are sent. */
	pthread_mutex_lock(&agent->lock);
	reply.n_regions = agent->n_regions;
	for (unsigned i = 0; i < agent->n_regions; i++) {
		regions[i] = agent->regions[i].wire;
		fds[i] = agent->regions[i].memfd;
	}
	pieces[1].iov_len = agent->n_regions * sizeof(regions[0]);
	packet.n_fds = agent->n_regions;
	ok = pr_packet_send(conn, &packet, MSG_DONTWAIT);
	pthread_mutex_unlock(&agent->lock);
	return ok;
}

static bool is_allowed(uid_t uid)
{
	return uid == 0 || uid == geteuid();
}

static void refuse_user(PrAgent *agent, uid_t uid, AgentResult *result)
{
	agent_fail(result, PR_AGENT_PERMISSION,
		   "an engine of user %u is not served: run it as root, or as user %u, which "
		   "the guest's process runs as",
		   uid, geteuid());
	/* This is the VMM's log: one line is enough, however often that user connects. */
	if (agent->refused_uid != uid)
		fprintf(stderr, "postroad-agent: %s: %s\n", agent->addr.sun_path, result->text);
	agent->refused_uid = uid;
}

static bool handle_hello(PrAgent *agent, AgentConn *conn, const PrAgentRequest *request)
{
	AgentResult result = {.status = PR_AGENT_OK};

	if (!is_allowed(conn->uid)) {
		refuse_user(agent, conn->uid, &result);
	} else if (request->version != PR_AGENT_VERSION) {
		agent_fail(&result, PR_AGENT_UNSUPPORTED,
			   "the agent speaks version %u, the engine %u; use the agent that "
			   "came with the engine",
			   PR_AGENT_VERSION, request->version);
	} else if (agent->attached_fd >= 0) {
		agent_fail(&result, PR_AGENT_BUSY, "another engine is attached");
	} else {
		pthread_mutex_lock(&agent->lock);
		agent->attached_fd = conn->fd;
		agent->attached_serial = conn->serial;
		result.flags = PR_AGENT_FLAG_ALLOCATES |
			       (agent->has_ops ? PR_AGENT_FLAG_CALLBACKS : 0) |
			       (agent->uffd >= 0 ? PR_AGENT_FLAG_UFFD_ENABLED : 0) |
			       (agent->fence_fd >= 0 ? PR_AGENT_FLAG_FENCE_ON : 0);
		pthread_mutex_unlock(&agent->lock);
	}
	return agent_reply(conn->fd, request, &result, NULL, 0) && result.status == PR_AGENT_OK;
}

static int open_memory(AgentResult *result)
{
	int fd = open("/proc/self/mem", O_RDWR | O_CLOEXEC);

	if (fd < 0)
		agent_fail(result, PR_AGENT_PERMISSION, "/proc/self/mem: %s", strerror(errno));
	return fd;
}

/* -1 without a failure: standard error is a terminal or a pipe, which another process must not
 * read. */
static int open_stderr(void)
{
	struct stat st;

	if (fstat(STDERR_FILENO, &st) < 0 || !S_ISREG(st.st_mode))
		return -1;
	return open("/proc/self/fd/2", O_RDONLY | O_CLOEXEC);
}

/* MEMORY and STDERR, which open a descriptor for the engine alone. */
static bool handle_open(int conn, const Incoming *in)
{
	AgentResult result = {.status = PR_AGENT_OK};
	int fd = in->request.op == PR_AGENT_MEMORY ? open_memory(&result) : open_stderr();
	bool ok = agent_reply(conn, &in->request, &result, &fd, fd >= 0);

	agent_close_fd(&fd);
	return ok;
}

static bool handle_allocator(PrAgent *agent, int conn, const Incoming *in)
{
	AgentResult result = {.status = PR_AGENT_OK};
	int fd = agent_allocator_begin(agent, conn, &result);
	bool ok = agent_reply(conn, &in->request, &result, &fd, fd >= 0);

	agent_close_fd(&fd);
	return ok;
}

/* FENCE_ON and FENCE_OFF. To protect many GiB takes long. The engine's other requests and new
 * connections wait meanwhile; the VMM does not, as the lock is free. */
static bool handle_fence(PrAgent *agent, int conn, const Incoming *in)
{
	AgentResult result = {.status = PR_AGENT_OK};

	if (in->request.op == PR_AGENT_FENCE_ON)
		agent_fence_on(agent, &result);
	else
		agent_fence_off(agent);
	return agent_reply(conn, &in->request, &result, NULL, 0);
}

/* PROBE, UFFD_ENABLE, UFFD_DISABLE, STORE_STATE and FETCH_STATE. */
static bool handle_memory(PrAgent *agent, int conn, Incoming *in)
{
	AgentResult result = {.status = PR_AGENT_OK};
	int fd = -1;
	bool ok;

	pthread_mutex_lock(&agent->lock);
	switch (in->request.op) {
	case PR_AGENT_PROBE:
		agent_uffd_probe(agent, &result);
		break;
	case PR_AGENT_UFFD_ENABLE:
		if (agent_uffd_enable(agent, &result))
			fd = agent->uffd;
		break;
	case PR_AGENT_UFFD_DISABLE:
		agent_uffd_disable(agent);
		break;
	case PR_AGENT_STORE_STATE:
		agent_close_fd(&agent->state_fd);
		agent->state_fd = in->fd;
		in->fd = -1;
		break;
	case PR_AGENT_FETCH_STATE:
		fd = agent->state_fd;
		break;
	}
	ok = agent_reply(conn, &in->request, &result, &fd, fd >= 0);
	pthread_mutex_unlock(&agent->lock);
	return ok;
}

static bool handle_call(PrAgent *agent, int conn, Incoming *in)
{
	AgentResult result = {.status = PR_AGENT_OK};
	int fd = in->fd;

	in->fd = -1;
	/* The worker sends the answer. */
	if (agent_worker_start(agent, &in->request, fd, &result))
		return true;
	return agent_reply(conn, &in->request, &result, NULL, 0);
}

static bool fds_as_expected(const Incoming *in)
{
	switch (in->request.op) {
	case PR_AGENT_LOAD:
		return in->fd >= 0;
	case PR_AGENT_STORE_STATE:
		return true;
	default:
		return in->fd < 0;
	}
}

static bool handle_request(PrAgent *agent, AgentConn *conn, Incoming *in)
{
	bool attached = conn->fd == agent->attached_fd;

	if (in->request.magic != PR_AGENT_MAGIC || !fds_as_expected(in))
		return false;
	if (in->request.op == PR_AGENT_HELLO)
		return !attached && handle_hello(agent, conn, &in->request);
	if (!attached)
		return false;
	switch (in->request.op) {
	case PR_AGENT_REGIONS:
		return handle_regions(agent, conn->fd, &in->request);
	case PR_AGENT_PROBE:
	case PR_AGENT_UFFD_ENABLE:
	case PR_AGENT_UFFD_DISABLE:
	case PR_AGENT_STORE_STATE:
	case PR_AGENT_FETCH_STATE:
		return handle_memory(agent, conn->fd, in);
	case PR_AGENT_MEMORY:
	case PR_AGENT_STDERR:
		return handle_open(conn->fd, in);
	case PR_AGENT_ALLOCATOR:
		return handle_allocator(agent, conn->fd, in);
	case PR_AGENT_FENCE_ON:
	case PR_AGENT_FENCE_OFF:
		return handle_fence(agent, conn->fd, in);
	case PR_AGENT_STOP:
	case PR_AGENT_RUN:
	case PR_AGENT_SAVE:
	case PR_AGENT_LOAD:
		return handle_call(agent, conn->fd, in);
	default:
		return false;
	}
}

/* False: the connection is at its end, or broke the protocol. */
static bool receive(int conn, Incoming *in)
{
	struct iovec piece = {.iov_base = &in->request, .iov_len = sizeof(in->request)};
	PrPacket packet = {.pieces = &piece, .n_pieces = 1, .fds = &in->fd, .n_fds = 1};

	return pr_packet_receive(conn, &packet, MSG_DONTWAIT) == sizeof(in->request) && !packet.cut;
}

static void close_conn(PrAgent *agent, AgentConn *conn)
{
	pthread_mutex_lock(&agent->lock);
	if (conn->fd == agent->attached_fd)
		agent->attached_fd = -1;
	agent_close_fd(&conn->fd);
	pthread_mutex_unlock(&agent->lock);
}

static void serve_conn(PrAgent *agent, AgentConn *conn)
{
	Incoming in = {.fd = -1};
	bool ok = receive(conn->fd, &in) && handle_request(agent, conn, &in);

	agent_close_fd(&in.fd);
	if (!ok)
		close_conn(agent, conn);
}

/* A free slot. Where there is none, the oldest connection that is not attached loses its own. */
static AgentConn *claim_slot(PrAgent *agent)
{
	AgentConn *oldest = NULL;

	for (unsigned i = 0; i < PR_AGENT_CONNS; i++) {
		AgentConn *conn = &agent->conns[i];

		if (conn->fd < 0)
			return conn;
		if (conn->fd != agent->attached_fd && (!oldest || conn->serial < oldest->serial))
			oldest = conn;
	}
	close_conn(agent, oldest);
	return oldest;
}

/* False: the process has no descriptor left. */
static bool accept_conn(PrAgent *agent)
{
	int fd = accept4(agent->listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	struct ucred peer;
	socklen_t length = sizeof(peer);
	AgentConn *conn;

	if (fd < 0)
		return errno != EMFILE && errno != ENFILE && errno != ENOMEM && errno != ENOBUFS;
	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) < 0) {
		close(fd);
		return true;
	}
	conn = claim_slot(agent);
	conn->fd = fd;
	conn->uid = peer.uid;
	conn->serial = ++agent->last_serial;
	return true;
}

/* polls: wake_fd, the listening socket, and the connections. */
static void fill_polls(const PrAgent *agent, bool accepting, struct pollfd *polls)
{
	polls[0] = (struct pollfd){.fd = agent->wake_fd, .events = POLLIN};
	polls[1] = (struct pollfd){.fd = accepting ? agent->listen_fd : -1, .events = POLLIN};
	for (unsigned i = 0; i < PR_AGENT_CONNS; i++)
		polls[2 + i] = (struct pollfd){.fd = agent->conns[i].fd, .events = POLLIN};
}

void *agent_server_thread(void *opaque)
{
	PrAgent *agent = opaque;
	struct pollfd polls[2 + PR_AGENT_CONNS];
	bool accepting = true;

	for (;;) {
		fill_polls(agent, accepting, polls);
		if (poll(polls, 2 + PR_AGENT_CONNS, accepting ? -1 : ACCEPT_PAUSE) < 0)
			continue;
		accepting = true;
		if (polls[0].revents)
			break;
		for (unsigned i = 0; i < PR_AGENT_CONNS; i++) {
			if (polls[2 + i].revents)
				serve_conn(agent, &agent->conns[i]);
		}
		if (polls[1].revents)
			accepting = accept_conn(agent);
	}
	for (unsigned i = 0; i < PR_AGENT_CONNS; i++) {
		if (agent->conns[i].fd >= 0)
			close_conn(agent, &agent->conns[i]);
	}
	return NULL;
}
