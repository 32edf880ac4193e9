/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The features of userfaultfd that agent and helper need, for messages. */
#pragma once

#include <stdint.h>

typedef struct AgentFeature {
	uint64_t bit;
	const char *name;
	const char *since; /* of Linux */
} AgentFeature;

/* The first one that is needed and not supported; NULL: there is none. */
const AgentFeature *agent_missing_feature(uint64_t supported, uint64_t needed);
