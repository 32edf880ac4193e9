/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The fence: every region is write-protected in the kernel, by a userfaultfd that is never
 * read. A thread of this process that writes waits there, be it a vCPU's, a device's or the VMM's
 * main loop; reads pass. So the memory of a guest that has been handed over does not change,
 * whatever the VMM is told to do.
 *
 * The agent alone has the descriptor, so that the fence outlives the engine. The fence ends with
 * FENCE_OFF, with the agent, or with the process.
 *
 * The fence does not cover writes through other mappings of the same memfds, which another process
 * may have (vhost-user), nor DMA of real devices (vfio). Guests with such devices are refused.
 */
#include "guest/agent/internal.h"
#include "guest/agent/uffd-ranges.h"

/* The VMM adds and removes regions from its own threads, which must not wait for the fence. So the
 * lock is not held over the ioctls; one on a region that is removed meanwhile fails. */
static unsigned copy_regions(PrAgent *agent, PrAgentWireRegion *ret)
{
	unsigned n;

	pthread_mutex_lock(&agent->lock);
	n = agent->n_regions;
	for (unsigned i = 0; i < n; i++)
		ret[i] = agent->regions[i].wire;
	pthread_mutex_unlock(&agent->lock);
	return n;
}

void agent_fence_off(PrAgent *agent)
{
	PrAgentWireRegion regions[PR_AGENT_REGIONS_MAX];
	unsigned n = agent->fence_fd >= 0 ? copy_regions(agent, regions) : 0;

	for (unsigned i = 0; i < n; i++)
		agent_uffd_unregister(agent->fence_fd, regions[i].base, regions[i].size);
	/* Closing it unregisters all other ranges, and wakes the writers that wait there. */
	agent_close_fd(&agent->fence_fd);
}

/* Where the fence is on already, this fences the regions that were added since. To protect the
 * others again is harmless. */
bool agent_fence_on(PrAgent *agent, AgentResult *result)
{
	PrAgentWireRegion regions[PR_AGENT_REGIONS_MAX];
	unsigned n = copy_regions(agent, regions);
	bool was_on = agent->fence_fd >= 0;
	bool ok;

	if (!was_on)
		agent->fence_fd =
			agent_uffd_open(agent_uffd_needed(AGENT_UFFD_FENCE, false), 0, result);
	ok = agent->fence_fd >= 0;
	for (unsigned i = 0; ok && i < n; i++)
		ok = agent_uffd_register(agent->fence_fd, &regions[i], AGENT_UFFD_FENCE, result) &&
		     agent_uffd_protect(agent->fence_fd, &regions[i], result);
	/* The protection of an earlier call stays. */
	if (!ok && !was_on)
		agent_fence_off(agent);
	return ok;
}
