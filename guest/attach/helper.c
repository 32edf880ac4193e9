/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The helper's life: requests of one engine about one process, one at a time. A packet that is not exactly a request
 * ends it, and so does the end of the engine or of the process.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "guest/attach/attach.h"
#include "guest/attach/internal.h"

#define REQUEST_FDS_MAX 4  /* one is legal; room to see, and close, more */
#define SETTLE_MS	10 /* between two looks at a thread that has to be let go of */

typedef struct Helper {
	int socket;
	bool greeted;
	AttachTarget target;
	AttachRam ram;
	AttachAllocator allocator;
	char remark[PR_AGENT_TEXT_MAX + 1]; /* for the log, with the next answer; "": none */
} Helper;

typedef struct Incoming {
	PrAgentRequest request;
	uint64_t bases[PR_AGENT_REGIONS_MAX]; /* CHOOSE */
	unsigned n_bases;
	int fd; /* owned; -1: none came */
} Incoming;

/* Replies */

static PrAgentReply make_reply(Helper *helper, const PrAgentRequest *request,
			       const AttachResult *result)
{
	PrAgentReply reply = {
		.magic = PR_AGENT_MAGIC,
		.version = PR_AGENT_VERSION,
		.op = request->op,
		.id = request->id,
		.status = result->status,
		.flags = result->flags,
		.pid = helper->target.pid,
	};

	if (*result->text || result->status != PR_AGENT_OK) {
		memcpy(reply.text, result->text, sizeof(reply.text));
	} else {
		memcpy(reply.text, helper->remark, sizeof(reply.text));
		*helper->remark = '\0';
	}
	return reply;
}

static bool send_packet(int socket, struct iovec *iov, unsigned n_iov, const int *fds,
			unsigned n_fds)
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
		n = sendmsg(socket, &msg, MSG_NOSIGNAL);
	} while (n < 0 && errno == EINTR);
	return n >= 0;
}

/* fd -1: none goes with it. */
static bool reply_fd(Helper *helper, const Incoming *in, const AttachResult *result, int fd)
{
	PrAgentReply reply = make_reply(helper, &in->request, result);
	struct iovec iov = {.iov_base = &reply, .iov_len = sizeof(reply)};

	return send_packet(helper->socket, &iov, 1, &fd, fd >= 0);
}

static bool reply(Helper *helper, const Incoming *in, const AttachResult *result)
{
	return reply_fd(helper, in, result, -1);
}

static bool reply_own_fd(Helper *helper, const Incoming *in, const AttachResult *result, int fd)
{
	bool ok = reply_fd(helper, in, result, fd);

	attach_close_fd(&fd);
	return ok;
}

/* Requests */

static bool do_attach(Helper *helper, Incoming *in)
{
	AttachResult result = {.status = PR_AGENT_OK};
	bool ok = attach_target_open(&helper->target, in->fd, &result);

	in->fd = -1;
	return reply(helper, in, &result) && ok;
}

static bool do_hello(Helper *helper, const Incoming *in)
{
	AttachResult result = {.status = PR_AGENT_OK};

	if (in->request.version != PR_AGENT_VERSION)
		attach_fail(&result, PR_AGENT_UNSUPPORTED,
			    "the helper speaks version %u, the engine %u", PR_AGENT_VERSION,
			    in->request.version);
	else if (attach_target_lock(&helper->target, &result))
		attach_parked(&helper->target, &result.flags, &result);
	result.flags |= PR_AGENT_FLAG_ALLOCATES;
	helper->greeted = result.status == PR_AGENT_OK;
	return reply_fd(helper, in, &result, helper->greeted ? helper->target.lock_fd : -1) &&
	       helper->greeted;
}

static bool do_regions(Helper *helper, const Incoming *in)
{
	AttachResult result = {.status = PR_AGENT_OK};
	PrAgentWireRegion wire[PR_AGENT_REGIONS_MAX];
	int fds[PR_AGENT_REGIONS_MAX];
	struct iovec iov[2];
	PrAgentReply head;

	if (!attach_ram_find(&helper->ram, &helper->target, &result))
		attach_ram_clear(&helper->ram);
	head = make_reply(helper, &in->request, &result);
	head.n_regions = helper->ram.n;
	for (unsigned i = 0; i < helper->ram.n; i++) {
		wire[i] = helper->ram.regions[i].wire;
		fds[i] = helper->ram.regions[i].fd;
	}
	iov[0] = (struct iovec){.iov_base = &head, .iov_len = sizeof(head)};
	iov[1] = (struct iovec){.iov_base = wire, .iov_len = helper->ram.n * sizeof(wire[0])};
	return send_packet(helper->socket, iov, 2, fds, helper->ram.n);
}

/* Where the regions were not asked for: all that there are. */
static bool find_ram(Helper *helper, AttachResult *result)
{
	return helper->ram.n || attach_ram_find(&helper->ram, &helper->target, result);
}

static bool do_choose(Helper *helper, const Incoming *in)
{
	AttachResult result = {.status = PR_AGENT_OK};

	if (find_ram(helper, &result))
		attach_ram_choose(&helper->ram, in->bases, in->n_bases, &result);
	return reply(helper, in, &result);
}

static int open_stderr(const AttachTarget *target)
{
	struct stat st;

	if (fstatat(target->proc_fd, "fd/2", &st, 0) < 0 || !S_ISREG(st.st_mode))
		return -1;
	return openat(target->proc_fd, "fd/2", O_RDONLY | O_CLOEXEC);
}

static int open_memory(const AttachTarget *target, AttachResult *result)
{
	int fd = attach_target_memory(target);

	if (fd < 0)
		attach_fail_access(target, result, "opening the memory");
	return fd;
}

/* Those that are answered with a descriptor, or with none. */
static bool do_fd(Helper *helper, const Incoming *in)
{
	AttachResult result = {.status = PR_AGENT_OK};
	int fd = -1;

	switch (in->request.op) {
	case PR_AGENT_FAULT_ON:
		fd = attach_uffd_enable(&helper->target, &helper->ram, &result);
		break;
	case PR_AGENT_FETCH_STATE:
		fd = attach_fetch_state(&helper->target, &result);
		break;
	case PR_AGENT_MEMORY:
		fd = open_memory(&helper->target, &result);
		break;
	case PR_AGENT_STDERR:
		fd = open_stderr(&helper->target);
		break;
	case PR_AGENT_ALLOCATOR:
		fd = attach_allocator(&helper->allocator, &helper->target, &result);
		break;
	}
	return reply_own_fd(helper, in, &result, fd);
}

/* The guest goes on from the answer on; the descriptors are closed behind it. */
static bool do_off(Helper *helper, const Incoming *in)
{
	AttachResult result = {.status = PR_AGENT_OK};
	AttachResult why = {.status = PR_AGENT_OK};

	if (!find_ram(helper, &result))
		return reply(helper, in, &result);
	if (in->request.op == PR_AGENT_FAULT_OFF)
		attach_uffd_disable(&helper->target, &helper->ram, &result);
	else
		attach_fence_off(&helper->target, &helper->ram, &result);
	if (!reply(helper, in, &result))
		return false;
	attach_close_parked(&helper->target, &why);
	memcpy(helper->remark, why.text, sizeof(helper->remark));
	return true;
}

static bool do_simple(Helper *helper, const Incoming *in)
{
	AttachResult result = {.status = PR_AGENT_OK};
	AttachTarget *target = &helper->target;

	switch (in->request.op) {
	case PR_AGENT_PROBE:
		attach_probe(target, &helper->ram, &result);
		break;
	case PR_AGENT_KEEP_STATE:
		attach_store_state_fd(target, in->fd, &result);
		break;
	case PR_AGENT_FENCE_ON:
		attach_fence_on(target, &helper->ram, &result);
		break;
	}
	return reply(helper, in, &result);
}

static bool do_callback(Helper *helper, const Incoming *in)
{
	AttachResult result = {.status = PR_AGENT_OK};

	attach_fail(&result, PR_AGENT_UNSUPPORTED, "a helper has no callbacks");
	return reply(helper, in, &result);
}

static bool is_expected(const Helper *helper, const Incoming *in)
{
	uint32_t op = in->request.op;

	if (in->request.magic != PR_AGENT_MAGIC)
		return false;
	if (op == PR_AGENT_ATTACH ? in->fd < 0 : op != PR_AGENT_KEEP_STATE && in->fd >= 0)
		return false;
	if (in->n_bases && op != PR_AGENT_CHOOSE)
		return false;
	if (!helper->target.pid)
		return op == PR_AGENT_ATTACH;
	return helper->greeted ? op != PR_AGENT_HELLO && op != PR_AGENT_ATTACH
			       : op == PR_AGENT_HELLO;
}

static bool handle_request(Helper *helper, Incoming *in)
{
	if (!is_expected(helper, in))
		return false;
	switch (in->request.op) {
	case PR_AGENT_ATTACH:
		return do_attach(helper, in);
	case PR_AGENT_HELLO:
		return do_hello(helper, in);
	case PR_AGENT_REGIONS:
		return do_regions(helper, in);
	case PR_AGENT_CHOOSE:
		return do_choose(helper, in);
	case PR_AGENT_FAULT_ON:
	case PR_AGENT_FETCH_STATE:
	case PR_AGENT_MEMORY:
	case PR_AGENT_STDERR:
	case PR_AGENT_ALLOCATOR:
		return do_fd(helper, in);
	case PR_AGENT_FAULT_OFF:
	case PR_AGENT_FENCE_OFF:
		return do_off(helper, in);
	case PR_AGENT_PROBE:
	case PR_AGENT_KEEP_STATE:
	case PR_AGENT_FENCE_ON:
		return do_simple(helper, in);
	case PR_AGENT_STOP:
	case PR_AGENT_RUN:
	case PR_AGENT_SAVE:
		return do_callback(helper, in);
	default:
		return false;
	}
}

/* Receiving */

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

/* False: the engine is gone, or broke the protocol. */
static bool receive(int socket, Incoming *in)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(REQUEST_FDS_MAX * sizeof(int))];
	} control;
	struct iovec iov[2] = {{.iov_base = &in->request, .iov_len = sizeof(in->request)},
			       {.iov_base = in->bases, .iov_len = sizeof(in->bases)}};
	struct msghdr msg = {.msg_iov = iov,
			     .msg_iovlen = 2,
			     .msg_control = control.bytes,
			     .msg_controllen = sizeof(control.bytes)};
	ssize_t n;

	do {
		n = recvmsg(socket, &msg, MSG_CMSG_CLOEXEC);
	} while (n < 0 && errno == EINTR);
	if (n < 0 || take_fds(&msg, &in->fd) > 1 || n < (ssize_t)sizeof(in->request) ||
	    (msg.msg_flags & (MSG_TRUNC | MSG_CTRUNC)))
		return false;
	n -= sizeof(in->request);
	in->n_bases = n / sizeof(in->bases[0]);
	return n % sizeof(in->bases[0]) == 0;
}

static bool serve_request(Helper *helper)
{
	Incoming in = {.fd = -1};
	bool ok = receive(helper->socket, &in) && handle_request(helper, &in);

	attach_close_fd(&in.fd);
	return ok;
}

static void serve(Helper *helper)
{
	for (;;) {
		struct pollfd polls[] = {{.fd = helper->socket, .events = POLLIN},
					 {.fd = helper->target.pidfd, .events = POLLIN}};

		/* Ended by the engine, or by the process. */
		if (poll(polls, 2, helper->target.unsettled ? SETTLE_MS : -1) < 0 && errno != EINTR)
			return;
		if (polls[1].revents)
			return;
		if (polls[0].revents && !serve_request(helper))
			return;
		attach_settle(&helper->target);
	}
}

static void run_helper(int socket, bool filter)
{
	Helper helper = {
		.socket = socket,
		.target = {.pidfd = -1, .proc_fd = -1, .mem_fd = -1, .lock_fd = -1},
	};

	attach_allocator_fork(&helper.allocator, filter);
	if (!attach_confine(socket, helper.allocator.socket, filter))
		_exit(1);
	serve(&helper);
	_exit(0);
}

int pr_attach_fork(bool filter, pid_t *ret_helper)
{
	int pair[2], code;
	pid_t pid;

	if (!attach_has_injector)
		return -ENOSYS;
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
		return -errno;
	pid = fork();
	code = errno;
	if (pid == 0)
		run_helper(pair[1], filter);
	close(pair[1]);
	if (pid < 0) {
		close(pair[0]);
		return -code;
	}
	*ret_helper = pid;
	return pair[0];
}
