/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "guest/agent/reply.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "guest/packet.h"

_Static_assert(PR_AGENT_REGIONS_MAX <= PR_PACKET_FDS_MAX, "a descriptor for each region");

bool agent_fail(AgentResult *result, PrAgentStatus status, const char *format, ...)
{
	va_list args;

	result->status = status;
	va_start(args, format);
	vsnprintf(result->text, sizeof(result->text), format, args);
	va_end(args);
	return false;
}

void agent_close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

PrAgentReply agent_make_reply(const PrAgentRequest *request, const AgentResult *result)
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
	PrAgentReply reply = agent_make_reply(request, result);
	struct iovec piece = {.iov_base = &reply, .iov_len = sizeof(reply)};
	PrPacket packet = {.pieces = &piece, .n_pieces = 1, .fds = (int *)fds, .n_fds = n_fds};

	return pr_packet_send(conn, &packet, MSG_DONTWAIT);
}
