/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Results of requests and the replies that carry them, for the agent and for the attach helper
 * (guest/attach/). */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "guest/agent-proto.h"

/* The result of a request. With PR_AGENT_OK the text is for the engine's debug log. */
typedef struct AgentResult {
	PrAgentStatus status;
	uint32_t flags; /* PR_AGENT_FLAG_… */
	char text[PR_AGENT_TEXT_MAX + 1];
} AgentResult;

/* Returns false. */
bool agent_fail(AgentResult *result, PrAgentStatus status, const char *format, ...)
	__attribute__((format(printf, 3, 4)));
void agent_close_fd(int *fd);

/* The head of a reply from this process. */
PrAgentReply agent_make_reply(const PrAgentRequest *request, const AgentResult *result);
/* Sends a reply with up to PR_AGENT_REGIONS_MAX descriptors, without blocking. False: the reply is
 * lost, and the connection has to be closed. */
bool agent_reply(int conn, const PrAgentRequest *request, const AgentResult *result, const int *fds,
		 unsigned n_fds);
