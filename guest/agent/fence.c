/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The fence: every region is write-protected in the kernel, by a userfaultfd of its own that nobody reads. Whoever
 * writes in this process, a vCPU, a device or the VMM's main loop, waits there; reads pass. So the memory of
 * a guest that has been handed over does not change, whatever the VMM is told.
 *
 * The agent alone has the descriptor, so that the fence outlives the engine; it ends with FENCE_OFF, with the agent, or
 * with the process.
 *
 * Not covered: writes through other mappings of the same memfds, as another process may have them
 * (vhost-user), and pages that a device writes to by itself (vfio). Such guests are refused.
 */
#include <errno.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "guest/agent/internal.h"

/* One call walks so much, and keeps whoever maps or unmaps memory waiting meanwhile. */
#define PIECE	       (1ULL << 30)

#define FENCE_FEATURES (UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM)

static bool register_region(int uffd, const PrAgentWireRegion *region, AgentResult *result)
{
	struct uffdio_register reg = {
		.range = {.start = region->base, .len = region->size},
		.mode = UFFDIO_REGISTER_MODE_WP,
	};

	if (ioctl(uffd, UFFDIO_REGISTER, &reg) == 0)
		return true;
	agent_result_fail(
		result, PR_AGENT_FAILED,
		"the fence: RAM block '%s' at 0x%llx can't be registered for write protection: %s%s",
		region->idstr, (unsigned long long)region->base, strerror(errno),
		errno == EBUSY ? "; another userfaultfd has it" : "");
	return false;
}

static bool protect_region(int uffd, const PrAgentWireRegion *region, AgentResult *result)
{
	for (uint64_t at = 0; at < region->size; at += PIECE) {
		uint64_t left = region->size - at;
		struct uffdio_writeprotect protect = {
			.range = {.start = region->base + at, .len = left < PIECE ? left : PIECE},
			.mode = UFFDIO_WRITEPROTECT_MODE_WP,
		};
		int err;

		/* EAGAIN: another thread was changing the process's mappings. */
		do {
			err = ioctl(uffd, UFFDIO_WRITEPROTECT, &protect) < 0 ? errno : 0;
		} while (err == EAGAIN || err == EINTR);
		if (!err)
			continue;
		agent_result_fail(
			result, PR_AGENT_FAILED,
			"the fence: RAM block '%s' at 0x%llx can't be write-protected: %s",
			region->idstr, (unsigned long long)protect.range.start, strerror(err));
		return false;
	}
	return true;
}

/* The VMM adds and removes regions from threads of its own, which must not wait for us. A region that goes away
 * meanwhile makes a call fail. */
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

/* Closing a userfaultfd unregisters what it has, and wakes who waits. */
void agent_fence_off(PrAgent *agent)
{
	PrAgentWireRegion regions[PR_AGENT_REGIONS_MAX];
	unsigned n = agent->fence_fd >= 0 ? copy_regions(agent, regions) : 0;

	for (unsigned i = 0; i < n; i++) {
		struct uffdio_range range = {.start = regions[i].base, .len = regions[i].size};

		(void)ioctl(agent->fence_fd, UFFDIO_UNREGISTER, &range);
	}
	agent_close_fd(&agent->fence_fd);
}

/* When it is on already, a region that has come since is fenced, too; to protect the others again is harmless. */
bool agent_fence_on(PrAgent *agent, AgentResult *result)
{
	PrAgentWireRegion regions[PR_AGENT_REGIONS_MAX];
	unsigned n = copy_regions(agent, regions);
	bool was_on = agent->fence_fd >= 0;
	bool ok;

	if (!was_on)
		agent->fence_fd = agent_uffd_open(FENCE_FEATURES, 0, result);
	ok = agent->fence_fd >= 0;
	for (unsigned i = 0; ok && i < n; i++)
		ok = register_region(agent->fence_fd, &regions[i], result) &&
		     protect_region(agent->fence_fd, &regions[i], result);
	/* What an earlier call has protected stays so. */
	if (!ok && !was_on)
		agent_fence_off(agent);
	return ok;
}
