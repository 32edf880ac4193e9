/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* One call to an agent: agent-client.c has the connection, agent-calls.c what is asked over it. */
#pragma once

#include "guest/agent-client.h"

typedef struct PrAgentAnswer {
	PrAgentReply *head;	       /* PR_AGENT_REPLY_MAX bytes, with the regions behind it */
	int fds[PR_AGENT_REGIONS_MAX]; /* owned, -1: taken */
	guint n_fds;
	gboolean truncated; /* we had no room for all descriptors */
} PrAgentAnswer;

void pr_agent_answer_free(PrAgentAnswer *answer);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrAgentAnswer, pr_agent_answer_free)
/* The caller's from then on; -1: there is none. */
int pr_agent_answer_take_fd(PrAgentAnswer *answer, guint i);

/* What goes with a request. */
typedef struct PrAgentLoad {
	int fd; /* -1: none */
	const uint64_t *bases;
	guint n_bases;
} PrAgentLoad;

/* The whole round trip. NULL: no answer, or a refusal. fd may be -1. */
PrAgentAnswer *pr_agent_call(PrAgentClient *client, PrAgentOp op, int fd, guint timeouts,
			     GCancellable *cancel, GError **error);
PrAgentAnswer *pr_agent_call_with(PrAgentClient *client, PrAgentOp op, const PrAgentLoad *load,
				  guint timeouts, GCancellable *cancel, GError **error);

/* For messages. */
const char *pr_agent_client_name(PrAgentClient *client);
const char *pr_agent_op_name(guint32 op);
