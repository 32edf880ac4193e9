/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The server thread: accepts engines, reads requests, answers. It never waits for anything but poll(), and works long
 * for nothing but the fence: replies go out without blocking, and an engine that does not read them loses its connection. A
 * connection that breaks the protocol is closed; nothing that arrives here can end the process.
 *
 * The first connection to say HELLO is attached, until it closes. Another HELLO meanwhile is refused:
 * two engines would place pages twice.
 *
 * Whoever is attached has the guest's memory. So it has to be root's, or of the user that this process runs as:
 * the socket file's mode says as much, but modes get widened.
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

#define REQUEST_FDS_MAX 4   /* one is legal; room to see, and close, more */
#define ACCEPT_PAUSE	100 /* ms; before the next try, when the process has no descriptor left */

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
	/* Nobody listens: left behind by a process that is gone. */
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
	/* bind() gives the file the mode of the socket: it is private from its first moment. */
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

static bool send_packet(int conn, struct iovec *iov, unsigned n_iov, const int *fds, unsigned n_fds)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(PR_AGENT_REGIONS_MAX * sizeof(int))];
	} control;
	struct msghdr msg = {.msg_iov = iov, .msg_iovlen = n_iov};
	struct cmsghdr *cmsg;
	ssize_t n;

	if (n_fds) {
		memset(&control, 0, sizeof(control));
		msg.msg_control = control.bytes;
		msg.msg_controllen = CMSG_SPACE(n_fds * sizeof(int));
		cmsg = CMSG_FIRSTHDR(&msg);
		cmsg->cmsg_level = SOL_SOCKET;
		cmsg->cmsg_type = SCM_RIGHTS;
		cmsg->cmsg_len = CMSG_LEN(n_fds * sizeof(int));
		memcpy(CMSG_DATA(cmsg), fds, n_fds * sizeof(int));
	}
	do {
		n = sendmsg(conn, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
	} while (n < 0 && errno == EINTR);
	return n >= 0;
}

static PrAgentReply make_reply(const PrAgentRequest *request, const AgentResult *result)
{
	PrAgentReply reply = {
		.magic = PR_AGENT_MAGIC,
		.version = PR_AGENT_VERSION,
		.op = request->op,
		.id = request->id,
		.status = result->status,
		.flags = result->flags,
		.pid = getpid(),
	};

	memcpy(reply.text, result->text, sizeof(reply.text));
	return reply;
}

bool agent_reply(int conn, const PrAgentRequest *request, const AgentResult *result, const int *fds,
		 unsigned n_fds)
{
	PrAgentReply reply = make_reply(request, result);
	struct iovec iov = {.iov_base = &reply, .iov_len = sizeof(reply)};

	return send_packet(conn, &iov, 1, fds, n_fds);
}

static bool reply_regions(PrAgent *agent, int conn, const PrAgentRequest *request)
{
	PrAgentWireRegion regions[PR_AGENT_REGIONS_MAX];
	int fds[PR_AGENT_REGIONS_MAX];
	AgentResult result = {.status = PR_AGENT_OK};
	PrAgentReply reply = make_reply(request, &result);
	struct iovec iov[2] = {{.iov_base = &reply, .iov_len = sizeof(reply)},
			       {.iov_base = regions}};
	bool ok;

	/* The lock keeps the memfds open until they are sent. */
	pthread_mutex_lock(&agent->lock);
	reply.n_regions = agent->n_regions;
	for (unsigned i = 0; i < agent->n_regions; i++) {
		regions[i] = agent->regions[i].wire;
		fds[i] = agent->regions[i].memfd;
	}
	iov[1].iov_len = agent->n_regions * sizeof(regions[0]);
	ok = send_packet(conn, iov, 2, fds, agent->n_regions);
	pthread_mutex_unlock(&agent->lock);
	return ok;
}

static bool is_allowed(uid_t uid)
{
	return uid == 0 || uid == geteuid();
}

static void refuse_user(PrAgent *agent, uid_t uid, AgentResult *result)
{
	agent_result_fail(
		result, PR_AGENT_PERMISSION,
		"an engine of user %u is not served: run it as root, or as user %u, which "
		"the guest's process runs as",
		uid, geteuid());
	/* Once, however often it comes: this is the VMM's log. */
	if (agent->refused_uid != uid)
		fprintf(stderr, "postroad-agent: %s: %s\n", agent->addr.sun_path, result->text);
	agent->refused_uid = uid;
}

static bool reply_hello(PrAgent *agent, AgentConn *conn, const PrAgentRequest *request)
{
	AgentResult result = {.status = PR_AGENT_OK};

	if (!is_allowed(conn->uid)) {
		refuse_user(agent, conn->uid, &result);
	} else if (request->version != PR_AGENT_VERSION) {
		agent_result_fail(&result, PR_AGENT_UNSUPPORTED,
				  "the agent speaks version %u, the engine %u; use the agent that "
				  "came with the engine",
				  PR_AGENT_VERSION, request->version);
	} else if (agent->attached_fd >= 0) {
		agent_result_fail(&result, PR_AGENT_BUSY, "another engine is attached");
	} else {
		pthread_mutex_lock(&agent->lock);
		agent->attached_fd = conn->fd;
		agent->attached_serial = conn->serial;
		result.flags = PR_AGENT_FLAG_ALLOCATES |
			       (agent->has_ops ? PR_AGENT_FLAG_CALLBACKS : 0) |
			       (agent->uffd >= 0 ? PR_AGENT_FLAG_FAULT_ON : 0) |
			       (agent->fence_fd >= 0 ? PR_AGENT_FLAG_FENCE_ON : 0);
		pthread_mutex_unlock(&agent->lock);
	}
	return agent_reply(conn->fd, request, &result, NULL, 0) && result.status == PR_AGENT_OK;
}

static int open_memory(AgentResult *result)
{
	int fd = open("/proc/self/mem", O_RDWR | O_CLOEXEC);

	if (fd < 0)
		agent_result_fail(result, PR_AGENT_PERMISSION, "/proc/self/mem: %s",
				  strerror(errno));
	return fd;
}

/* -1, and no failure: it is a terminal or a pipe, which nobody else may read. */
static int open_stderr(void)
{
	struct stat st;

	if (fstat(STDERR_FILENO, &st) < 0 || !S_ISREG(st.st_mode))
		return -1;
	return open("/proc/self/fd/2", O_RDONLY | O_CLOEXEC);
}

/* MEMORY and STDERR: a descriptor that is opened for the engine alone. */
static bool reply_opened(int conn, const Incoming *in)
{
	AgentResult result = {.status = PR_AGENT_OK};
	int fd = in->request.op == PR_AGENT_MEMORY ? open_memory(&result) : open_stderr();
	bool ok = agent_reply(conn, &in->request, &result, &fd, fd >= 0);

	agent_close_fd(&fd);
	return ok;
}

static bool reply_allocator(PrAgent *agent, int conn, const Incoming *in)
{
	AgentResult result = {.status = PR_AGENT_OK};
	int fd = agent_allocator_begin(agent, conn, &result);
	bool ok = agent_reply(conn, &in->request, &result, &fd, fd >= 0);

	agent_close_fd(&fd);
	return ok;
}

/* FENCE_ON and FENCE_OFF. To protect many GiB takes long: the engine's other requests and new connections wait
 * meanwhile, in this thread. The VMM does not, as the lock is free. */
static bool reply_fence(PrAgent *agent, int conn, const Incoming *in)
{
	AgentResult result = {.status = PR_AGENT_OK};

	if (in->request.op == PR_AGENT_FENCE_ON)
		agent_fence_on(agent, &result);
	else
		agent_fence_off(agent);
	return agent_reply(conn, &in->request, &result, NULL, 0);
}

/* PROBE, FAULT_ON, FAULT_OFF, KEEP_STATE and FETCH_STATE. */
static bool reply_memory(PrAgent *agent, int conn, Incoming *in)
{
	AgentResult result = {.status = PR_AGENT_OK};
	int fd = -1;
	bool ok;

	pthread_mutex_lock(&agent->lock);
	switch (in->request.op) {
	case PR_AGENT_PROBE:
		agent_uffd_probe(agent, &result);
		break;
	case PR_AGENT_FAULT_ON:
		if (agent_uffd_enable(agent, &result))
			fd = agent->uffd;
		break;
	case PR_AGENT_FAULT_OFF:
		agent_uffd_disable(agent);
		break;
	case PR_AGENT_KEEP_STATE:
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

static bool reply_call(PrAgent *agent, int conn, Incoming *in)
{
	AgentResult result = {.status = PR_AGENT_OK};
	int fd = in->fd;

	in->fd = -1;
	/* The worker answers. */
	if (agent_worker_start(agent, &in->request, fd, &result))
		return true;
	return agent_reply(conn, &in->request, &result, NULL, 0);
}

static bool fds_as_expected(const Incoming *in)
{
	switch (in->request.op) {
	case PR_AGENT_LOAD:
		return in->fd >= 0;
	case PR_AGENT_KEEP_STATE:
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
		return !attached && reply_hello(agent, conn, &in->request);
	if (!attached)
		return false;
	switch (in->request.op) {
	case PR_AGENT_REGIONS:
		return reply_regions(agent, conn->fd, &in->request);
	case PR_AGENT_PROBE:
	case PR_AGENT_FAULT_ON:
	case PR_AGENT_FAULT_OFF:
	case PR_AGENT_KEEP_STATE:
	case PR_AGENT_FETCH_STATE:
		return reply_memory(agent, conn->fd, in);
	case PR_AGENT_MEMORY:
	case PR_AGENT_STDERR:
		return reply_opened(conn->fd, in);
	case PR_AGENT_ALLOCATOR:
		return reply_allocator(agent, conn->fd, in);
	case PR_AGENT_FENCE_ON:
	case PR_AGENT_FENCE_OFF:
		return reply_fence(agent, conn->fd, in);
	case PR_AGENT_STOP:
	case PR_AGENT_RUN:
	case PR_AGENT_SAVE:
	case PR_AGENT_LOAD:
		return reply_call(agent, conn->fd, in);
	default:
		return false;
	}
}

/* Takes the first descriptor, closes the others; returns how many there were. */
static unsigned take_fds(struct msghdr *msg, int *ret_fd)
{
	unsigned n = 0;

	for (struct cmsghdr *cmsg = CMSG_FIRSTHDR(msg); cmsg; cmsg = CMSG_NXTHDR(msg, cmsg)) {
		unsigned count = (cmsg->cmsg_len - CMSG_LEN(0)) / sizeof(int);

		if (cmsg->cmsg_level != SOL_SOCKET || cmsg->cmsg_type != SCM_RIGHTS)
			continue;
		for (unsigned i = 0; i < count; i++, n++) {
			int fd;

			memcpy(&fd, CMSG_DATA(cmsg) + i * sizeof(int), sizeof(fd));
			if (n == 0)
				*ret_fd = fd;
			else
				close(fd);
		}
	}
	return n;
}

/* False: the connection is at its end, or broke the protocol. */
static bool receive(int conn, Incoming *in)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(REQUEST_FDS_MAX * sizeof(int))];
	} control;
	struct iovec iov = {.iov_base = &in->request, .iov_len = sizeof(in->request)};
	struct msghdr msg = {.msg_iov = &iov,
			     .msg_iovlen = 1,
			     .msg_control = control.bytes,
			     .msg_controllen = sizeof(control.bytes)};
	ssize_t n;

	do {
		n = recvmsg(conn, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	} while (n < 0 && errno == EINTR);
	if (n < 0)
		return false;
	return take_fds(&msg, &in->fd) <= 1 && n == sizeof(in->request) &&
	       !(msg.msg_flags & (MSG_TRUNC | MSG_CTRUNC));
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

/* A free slot, or the one of the oldest connection that is not attached. */
static AgentConn *take_slot(PrAgent *agent)
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

/* False: there is no descriptor to be had. */
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
	conn = take_slot(agent);
	conn->fd = fd;
	conn->uid = peer.uid;
	conn->serial = ++agent->last_serial;
	return true;
}

void *agent_server_thread(void *opaque)
{
	PrAgent *agent = opaque;
	struct pollfd polls[2 + PR_AGENT_CONNS];
	bool accepting = true;

	for (;;) {
		polls[0] = (struct pollfd){.fd = agent->wake_fd, .events = POLLIN};
		polls[1] =
			(struct pollfd){.fd = accepting ? agent->listen_fd : -1, .events = POLLIN};
		for (unsigned i = 0; i < PR_AGENT_CONNS; i++)
			polls[2 + i] = (struct pollfd){.fd = agent->conns[i].fd, .events = POLLIN};
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
