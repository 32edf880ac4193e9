/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Plays several engines at once for the agent's server. An input is a list of packets. Each starts
 * with a byte that has the connection, the number of descriptors, and the kind: a request whose
 * operation is the next byte, or arbitrary bytes. Jobs for the server's second thread run at once.
 */
#include <sys/socket.h>
#include <unistd.h>

#include "tests/fuzz/fuzz.h"

#include "guest/agent/server.c"
#include "guest/agent/worker.c"

#define ENGINES	    3
#define PACKETS_MAX 64

static int vmm_stop(void *opaque, bool *ret_was_running)
{
	*ret_was_running = true;
	return 0;
}

static int vmm_run(void *opaque)
{
	return 0;
}

static int vmm_save(void *opaque, int fd)
{
	return write(fd, "state", 5) == 5 ? 0 : -EIO;
}

static int vmm_load(void *opaque, int fd)
{
	char first;

	return read(fd, &first, 1) == 1 ? 0 : -EINVAL;
}

/* These replace uffd.c and fence.c. */
bool agent_uffd_probe(PrAgent *agent, AgentResult *result)
{
	return true;
}

bool agent_uffd_enable(PrAgent *agent, AgentResult *result)
{
	if (agent->uffd < 0)
		agent->uffd = dup(STDERR_FILENO);
	return true;
}

void agent_uffd_disable(PrAgent *agent)
{
	agent_close_fd(&agent->uffd);
}

bool agent_fence_on(PrAgent *agent, AgentResult *result)
{
	if (agent->fence_fd < 0)
		agent->fence_fd = dup(STDERR_FILENO);
	return true;
}

void agent_fence_off(PrAgent *agent)
{
	agent_close_fd(&agent->fence_fd);
}

static void close_all(const int *fds, unsigned n)
{
	for (unsigned i = 0; i < n; i++)
		close(fds[i]);
}

/* Checks that all replies follow the protocol. */
static void read_replies(int fd)
{
	static union {
		PrAgentReply head;
		uint8_t bytes[PR_AGENT_REPLY_MAX];
	} reply;
	const struct iovec piece = {&reply, sizeof(reply)};

	for (;;) {
		int fds[PR_PACKET_FDS_MAX];
		PrPacket packet = {
			.pieces = &piece, .n_pieces = 1, .fds = fds, .n_fds = PR_PACKET_FDS_MAX};
		ssize_t n = pr_packet_receive(fd, &packet, MSG_DONTWAIT);

		if (n <= 0)
			return;
		close_all(fds, packet.n_fds);
		g_assert(n == (ssize_t)(sizeof(reply.head) +
					reply.head.n_regions * sizeof(PrAgentWireRegion)));
		g_assert(reply.head.magic == PR_AGENT_MAGIC);
		g_assert(reply.head.op > 0 && reply.head.op < PR_AGENT_N_OPS);
		g_assert(reply.head.status < PR_AGENT_N_STATUS);
		g_assert(!reply.head.text[PR_AGENT_TEXT_MAX]);
	}
}

static void send_to_agent(int fd, const void *bytes, gsize len, const int *fds, unsigned n_fds)
{
	const struct iovec piece = {(void *)bytes, len};
	PrPacket packet = {.pieces = &piece, .n_pieces = 1, .fds = (int *)fds, .n_fds = n_fds};

	pr_packet_send(fd, &packet, MSG_DONTWAIT);
}

/* Sends the next packet of the input. */
static void send_next(FuzzInput *input, int fd, uint8_t how, uint32_t id)
{
	PrAgentRequest request = {PR_AGENT_MAGIC, PR_AGENT_VERSION, 0, id};
	int fds[6]; /* one is legal */
	unsigned n_fds = how >> 4 & 7;
	gsize n;

	n_fds = MIN(n_fds, G_N_ELEMENTS(fds));
	for (unsigned i = 0; i < n_fds; i++)
		fds[i] = memfd_create("fuzz", MFD_CLOEXEC);
	if (how & 4) {
		const uint8_t *bytes = fuzz_take(input, fuzz_u8(input), &n);

		send_to_agent(fd, bytes, n, fds, n_fds);
	} else {
		request.op = fuzz_u8(input);
		send_to_agent(fd, &request, sizeof(request), fds, n_fds);
	}
	close_all(fds, n_fds);
}

static void do_jobs(PrAgent *agent)
{
	while (agent->job.op) {
		AgentJob job = agent->job;

		run_job(agent, &job);
	}
}

/* Connects this engine unless it is connected. */
static void connect_engine(PrAgent *agent, int *engine_fd, unsigned index)
{
	AgentConn *conn = &agent->conns[index];
	int fds[2];

	if (conn->fd >= 0)
		return;
	agent_close_fd(engine_fd);
	g_assert(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds) == 0);
	*engine_fd = fds[0];
	conn->fd = fds[1];
	conn->serial = ++agent->last_serial;
}

static void run_engines(PrAgent *agent, FuzzInput *input)
{
	int engine_fds[ENGINES] = {-1, -1, -1};

	for (unsigned i = 0; input->left && i < PACKETS_MAX; i++) {
		uint8_t how = fuzz_u8(input);
		unsigned index = (how & 3) % ENGINES;

		connect_engine(agent, &engine_fds[index], index);
		if (how & 8)
			agent_close_fd(&engine_fds[index]);
		else
			send_next(input, engine_fds[index], how, i);
		serve_conn(agent, &agent->conns[index]);
		/* Otherwise the jobs pile up. */
		if (how & 0x80)
			do_jobs(agent);
		for (unsigned j = 0; j < ENGINES; j++)
			if (engine_fds[j] >= 0)
				read_replies(engine_fds[j]);
	}
	do_jobs(agent);
	for (unsigned i = 0; i < ENGINES; i++) {
		agent_close_fd(&engine_fds[i]);
		if (agent->conns[i].fd >= 0)
			close_conn(agent, &agent->conns[i]);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static const PrAgentOps ops = {vmm_stop, vmm_run, vmm_save, vmm_load};
	FuzzInput input = {data, size};
	int next_fd = fuzz_next_fd();
	PrAgent *agent = pr_agent_new(fuzz_u8(&input) & 1 ? NULL : &ops, NULL);
	int memfd = memfd_create("fuzz", MFD_CLOEXEC);
	PrAgentRegion region = {"mem", (void *)0x100000, 0x10000, 4096, memfd, 0};

	g_assert(agent && memfd >= 0 && pr_agent_add_region(agent, &region) == 0);
	close(memfd);
	run_engines(agent, &input);
	agent_uffd_disable(agent);
	agent_fence_off(agent);
	pr_agent_free(agent);
	g_assert_cmpint(next_fd, ==, fuzz_next_fd());
	return 0;
}
