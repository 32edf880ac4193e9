/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The thread that allocates pages for the engine (guest/allocator.h). The kernel charges them to
 * the memory cgroup of this process. The attached engine has one such thread, which ends when that
 * engine is gone.
 */
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "guest/agent/internal.h"
#include "guest/allocator.h"

static void *allocator_thread(void *opaque)
{
	PrAgent *agent = opaque;

	pr_allocator_serve(agent->allocator_fd);
	shutdown(agent->allocator_fd, SHUT_RDWR);
	return NULL;
}

void agent_allocator_end(PrAgent *agent)
{
	if (agent->allocator_fd < 0)
		return;
	shutdown(agent->allocator_fd, SHUT_RDWR);
	pthread_join(agent->allocator, NULL);
	agent_close_fd(&agent->allocator_fd);
}

static bool begin(PrAgent *agent, int pair[2], AgentResult *result)
{
	int err;

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0) {
		agent_fail(result, PR_AGENT_FAILED, "socketpair: %s", strerror(errno));
		return false;
	}
	agent->allocator_fd = pair[1];
	err = agent_thread_create(&agent->allocator, allocator_thread, agent, "postroad-pages");
	if (!err)
		return true;
	agent_fail(result, PR_AGENT_FAILED, "no thread to allocate pages: %s", strerror(-err));
	agent_close_fd(&agent->allocator_fd);
	close(pair[0]);
	return false;
}

int agent_allocator_begin(PrAgent *agent, int conn, AgentResult *result)
{
	struct ucred peer = {0};
	socklen_t length = sizeof(peer);
	int pair[2];

	agent_allocator_end(agent);
	(void)getsockopt(conn, SOL_SOCKET, SO_PEERCRED, &peer, &length);
	if (peer.pid > 0 && pr_memory_cgroup_is_shared(peer.pid, getpid()))
		return -1;
	return begin(agent, pair, result) ? pair[0] : -1;
}
