/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* One call to an agent: agent-client.c has the connection, agent-calls.c the requests. */
#pragma once

#include "guest/agent-client.h"

typedef struct PrAgentAnswer {
	PrAgentReply *head;	       /* PR_AGENT_REPLY_MAX bytes; the regions follow it */
	int fds[PR_AGENT_REGIONS_MAX]; /* owned; -1: the caller has taken it */
	guint n_fds;
	gboolean truncated; /* this process had no room for all descriptors */
} PrAgentAnswer;

void pr_agent_answer_free(PrAgentAnswer *answer);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrAgentAnswer, pr_agent_answer_free)
/* The caller owns it from then on; -1: there is none. */
int pr_agent_answer_take_fd(PrAgentAnswer *answer, guint i);

/* The data that follow a request. */
typedef struct PrAgentPayload {
	int fd; /* -1: none */
	const uint64_t *bases;
	guint n_bases;
} PrAgentPayload;

/* Sends a request and waits for the reply, for so many timeouts. NULL: no reply, or a refusal. fd
 * may be -1. */
PrAgentAnswer *pr_agent_call(PrAgentClient *client, PrAgentOp op, int fd, guint timeouts,
			     GCancellable *cancel, GError **error);
PrAgentAnswer *pr_agent_call_with(PrAgentClient *client, PrAgentOp op, const PrAgentPayload *load,
				  guint timeouts, GCancellable *cancel, GError **error);

/* For error texts. */
const char *pr_agent_client_name(PrAgentClient *client);
const char *pr_agent_op_name(guint32 op);
