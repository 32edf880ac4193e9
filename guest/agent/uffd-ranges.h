/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The userfaultfd ioctls of the fault mode and of the fence, for the agent and for the attach
 * helper (guest/attach/). They act on the address space of the process that made the descriptor,
 * whichever process issues them.
 */
#pragma once

#include "guest/agent/reply.h"

typedef enum AgentUffdKind {
	AGENT_UFFD_FAULTS, /* MISSING and MINOR faults: the engine places the pages */
	AGENT_UFFD_FENCE,  /* write protection: a writer waits */
} AgentUffdKind;

/* The features that are needed; hugetlb: a region has huge pages. */
uint64_t agent_uffd_needed(AgentUffdKind kind, bool hugetlb);
/* The features that this kernel supports. fd: a userfaultfd that was not opened yet (UFFDIO_API),
 * and can't be used for anything else afterwards. */
bool agent_uffd_supported(int fd, uint64_t *ret_features, AgentResult *result);
/* Refuses a kernel that lacks a needed feature, and names it. */
bool agent_uffd_check(uint64_t supported, uint64_t needed, AgentResult *result);
/* Opens a userfaultfd for use, with these features. */
bool agent_uffd_api(int fd, uint64_t features, AgentResult *result);

bool agent_uffd_register(int uffd, const PrAgentWireRegion *region, AgentUffdKind kind,
			 AgentResult *result);
/* Wakes all waiting threads: unregistering by itself wakes those that wait for a missing page, but
 * no writers. Harmless for a range that is not registered. */
void agent_uffd_unregister(int uffd, uint64_t base, uint64_t size);
/* The fence: write-protects a registered region. */
bool agent_uffd_protect(int uffd, const PrAgentWireRegion *region, AgentResult *result);
