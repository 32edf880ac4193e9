/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The helper serves the requests of one engine about one process, one at a time. It ends with the
 * engine, with the process, or when a packet is not exactly a request.
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
#include "guest/packet.h"

#define DETACH_CHECK_MS 10 /* between two checks of a thread that has to be detached from */

typedef struct Helper {
	int socket;
	bool greeted;
	AttachTarget target;
	AttachRam ram;
	AttachAllocator allocator;
	char remark[PR_AGENT_TEXT_MAX +
		    1]; /* sent with the next reply, for the engine's log; "": none */
} Helper;

typedef struct Incoming {
	PrAgentRequest request;
	uint64_t bases[PR_AGENT_REGIONS_MAX]; /* CHOOSE */
	unsigned n_bases;
	int fd; /* owned; -1: none came */
} Incoming;

/* Replies */

static PrAgentReply make_reply(Helper *helper, const PrAgentRequest *request,
			       const AgentResult *result)
{
	PrAgentReply reply = agent_make_reply(request, result);

	reply.pid = helper->target.pid;
	if (result->status == PR_AGENT_OK && !*result->text) {
		memcpy(reply.text, helper->remark, sizeof(reply.text));
		*helper->remark = '\0';
	}
	return reply;
}

/* fd: sent with the reply, unless it is -1. */
static bool reply_fd(Helper *helper, const Incoming *in, const AgentResult *result, int fd)
{
	PrAgentReply reply = make_reply(helper, &in->request, result);
	struct iovec piece = {.iov_base = &reply, .iov_len = sizeof(reply)};
	PrPacket packet = {.pieces = &piece, .n_pieces = 1, .fds = &fd, .n_fds = fd >= 0};

	return pr_packet_send(helper->socket, &packet, 0);
}

static bool reply(Helper *helper, const Incoming *in, const AgentResult *result)
{
	return reply_fd(helper, in, result, -1);
}

/* Closes fd. */
static bool reply_own_fd(Helper *helper, const Incoming *in, const AgentResult *result, int fd)
{
	bool ok = reply_fd(helper, in, result, fd);

	agent_close_fd(&fd);
	return ok;
}

/* Requests */

static bool handle_attach(Helper *helper, Incoming *in)
{
	AgentResult result = {.status = PR_AGENT_OK};
	bool ok = attach_target_open(&helper->target, in->fd, &result);

	in->fd = -1;
	return reply(helper, in, &result) && ok;
}

static bool handle_hello(Helper *helper, const Incoming *in)
{
	AgentResult result = {.status = PR_AGENT_OK};

	if (in->request.version != PR_AGENT_VERSION)
		agent_fail(&result, PR_AGENT_UNSUPPORTED,
			   "the helper speaks version %u, the engine %u", PR_AGENT_VERSION,
			   in->request.version);
	else if (attach_target_lock(&helper->target, &result))
		attach_parked(&helper->target, &result.flags, &result);
	result.flags |= PR_AGENT_FLAG_ALLOCATES;
	helper->greeted = result.status == PR_AGENT_OK;
	return reply_fd(helper, in, &result, helper->greeted ? helper->target.lock_fd : -1) &&
	       helper->greeted;
}

static bool handle_regions(Helper *helper, const Incoming *in)
{
	AgentResult result = {.status = PR_AGENT_OK};
	PrAgentWireRegion wire[PR_AGENT_REGIONS_MAX];
	int fds[PR_AGENT_REGIONS_MAX];
	struct iovec pieces[2];
	PrAgentReply head;
	PrPacket packet = {.pieces = pieces, .n_pieces = 2, .fds = fds};

	if (!attach_ram_find(&helper->ram, &helper->target, &result))
		attach_ram_clear(&helper->ram);
	head = make_reply(helper, &in->request, &result);
	head.n_regions = helper->ram.n;
	for (unsigned i = 0; i < helper->ram.n; i++) {
		wire[i] = helper->ram.regions[i].wire;
		fds[i] = helper->ram.regions[i].fd;
	}
	pieces[0] = (struct iovec){.iov_base = &head, .iov_len = sizeof(head)};
	pieces[1] = (struct iovec){.iov_base = wire, .iov_len = helper->ram.n * sizeof(wire[0])};
	packet.n_fds = helper->ram.n;
	return pr_packet_send(helper->socket, &packet, 0);
}

/* Where the engine has not asked for the regions, these are all that the process has. */
static bool find_ram(Helper *helper, AgentResult *result)
{
	return helper->ram.n || attach_ram_find(&helper->ram, &helper->target, result);
}

static bool handle_choose(Helper *helper, const Incoming *in)
{
	AgentResult result = {.status = PR_AGENT_OK};

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

static int open_memory(const AttachTarget *target, AgentResult *result)
{
	int fd = attach_target_memory(target);

	if (fd < 0)
		attach_fail_access(target, result, "opening the memory");
	return fd;
}

/* The requests whose reply may carry a descriptor. */
static bool handle_for_fd(Helper *helper, const Incoming *in)
{
	AgentResult result = {.status = PR_AGENT_OK};
	int fd = -1;

	switch (in->request.op) {
	case PR_AGENT_UFFD_ENABLE:
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

/* UFFD_DISABLE and FENCE_OFF. To close the parked descriptors takes a stop of QEMU's main thread.
 * So the reply is sent first, as the engine waits for it. */
static bool handle_off(Helper *helper, const Incoming *in)
{
	AgentResult result = {.status = PR_AGENT_OK};
	AgentResult why = {.status = PR_AGENT_OK};

	if (!find_ram(helper, &result))
		return reply(helper, in, &result);
	if (in->request.op == PR_AGENT_UFFD_DISABLE)
		attach_uffd_disable(&helper->target, &helper->ram, &result);
	else
		attach_fence_off(&helper->target, &helper->ram, &result);
	if (!reply(helper, in, &result))
		return false;
	attach_close_parked(&helper->target, &why);
	memcpy(helper->remark, why.text, sizeof(helper->remark));
	return true;
}

/* The requests whose reply carries a result only. */
static bool handle_simple(Helper *helper, const Incoming *in)
{
	AgentResult result = {.status = PR_AGENT_OK};
	AttachTarget *target = &helper->target;

	switch (in->request.op) {
	case PR_AGENT_PROBE:
		attach_probe(target, &helper->ram, &result);
		break;
	case PR_AGENT_STORE_STATE:
		attach_store_state_fd(target, in->fd, &result);
		break;
	case PR_AGENT_FENCE_ON:
		attach_fence_on(target, &helper->ram, &result);
		break;
	}
	return reply(helper, in, &result);
}

static bool refuse_callback(Helper *helper, const Incoming *in)
{
	AgentResult result = {.status = PR_AGENT_OK};

	agent_fail(&result, PR_AGENT_UNSUPPORTED, "a helper has no callbacks");
	return reply(helper, in, &result);
}

static bool is_expected(const Helper *helper, const Incoming *in)
{
	uint32_t op = in->request.op;

	if (in->request.magic != PR_AGENT_MAGIC)
		return false;
	if (op == PR_AGENT_ATTACH ? in->fd < 0 : op != PR_AGENT_STORE_STATE && in->fd >= 0)
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
		return handle_attach(helper, in);
	case PR_AGENT_HELLO:
		return handle_hello(helper, in);
	case PR_AGENT_REGIONS:
		return handle_regions(helper, in);
	case PR_AGENT_CHOOSE:
		return handle_choose(helper, in);
	case PR_AGENT_UFFD_ENABLE:
	case PR_AGENT_FETCH_STATE:
	case PR_AGENT_MEMORY:
	case PR_AGENT_STDERR:
	case PR_AGENT_ALLOCATOR:
		return handle_for_fd(helper, in);
	case PR_AGENT_UFFD_DISABLE:
	case PR_AGENT_FENCE_OFF:
		return handle_off(helper, in);
	case PR_AGENT_PROBE:
	case PR_AGENT_STORE_STATE:
	case PR_AGENT_FENCE_ON:
		return handle_simple(helper, in);
	case PR_AGENT_STOP:
	case PR_AGENT_RUN:
	case PR_AGENT_SAVE:
		return refuse_callback(helper, in);
	default:
		return false;
	}
}

/* Receiving */

/* False: the engine is gone, or broke the protocol. */
static bool receive(int socket, Incoming *in)
{
	struct iovec pieces[] = {{.iov_base = &in->request, .iov_len = sizeof(in->request)},
				 {.iov_base = in->bases, .iov_len = sizeof(in->bases)}};
	PrPacket packet = {.pieces = pieces, .n_pieces = 2, .fds = &in->fd, .n_fds = 1};
	ssize_t n = pr_packet_receive(socket, &packet, 0);

	if (n < (ssize_t)sizeof(in->request) || packet.cut)
		return false;
	n -= sizeof(in->request);
	in->n_bases = n / sizeof(in->bases[0]);
	return n % sizeof(in->bases[0]) == 0;
}

static bool serve_request(Helper *helper)
{
	Incoming in = {.fd = -1};
	bool ok = receive(helper->socket, &in) && handle_request(helper, &in);

	agent_close_fd(&in.fd);
	return ok;
}

static void serve(Helper *helper)
{
	for (;;) {
		struct pollfd polls[] = {{.fd = helper->socket, .events = POLLIN},
					 {.fd = helper->target.pidfd, .events = POLLIN}};

		/* Ended by the engine, or by the end of the process. */
		if (poll(polls, 2, helper->target.stop_pending ? DETACH_CHECK_MS : -1) < 0 &&
		    errno != EINTR)
			return;
		if (polls[1].revents)
			return;
		if (polls[0].revents && !serve_request(helper))
			return;
		attach_detach_pending(&helper->target);
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
