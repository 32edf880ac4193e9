/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The fault mode: a userfaultfd of this process over every region.
 *
 * The descriptor's ioctls act on the address space of the process that made it. So the agent makes
 * it here, and the engine resolves the faults with it. Order: register MISSING|MINOR, then drop the
 * page table entries. An access after that faults, whatever was mapped before. The agent keeps the
 * descriptor itself, so that a fault waits, and does not read zeros, while there is no engine.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "guest/agent/internal.h"
#include "guest/agent/uffd-ranges.h"

#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24 /* Linux 5.18 */
#endif

static int uffd_new(void)
{
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	int dev;

	if (fd >= 0 || errno != EPERM)
		return fd;
	dev = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	if (dev < 0) {
		errno = EPERM;
		return -1;
	}
	fd = ioctl(dev, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
	close(dev);
	return fd;
}

static int uffd_new_checked(AgentResult *result)
{
	int fd = uffd_new();

	if (fd < 0 && errno == EPERM)
		agent_fail(result, PR_AGENT_PERMISSION,
			   "userfaultfd: the kernel refused it to process %d; run `sysctl "
			   "vm.unprivileged_userfaultfd=1` or give its user access to "
			   "/dev/userfaultfd",
			   (int)getpid());
	else if (fd < 0)
		agent_fail(result, PR_AGENT_UNSUPPORTED, "userfaultfd: %s", strerror(errno));
	return fd;
}

static uint64_t needed_features(const PrAgent *agent)
{
	bool hugetlb = false;

	for (unsigned i = 0; i < agent->n_regions; i++)
		hugetlb |= agent->regions[i].wire.page_size != (uint32_t)sysconf(_SC_PAGESIZE);
	return agent_uffd_needed(AGENT_UFFD_FAULTS, hugetlb);
}

/* UFFDIO_API works once per descriptor, so the question for the features takes a descriptor of its
 * own. */
static bool check_features(uint64_t needed, uint64_t *ret_supported, AgentResult *result)
{
	int fd = uffd_new_checked(result);
	bool ok;

	if (fd < 0)
		return false;
	ok = agent_uffd_supported(fd, ret_supported, result) &&
	     agent_uffd_check(*ret_supported, needed, result);
	close(fd);
	return ok;
}

bool agent_uffd_probe(PrAgent *agent, AgentResult *result)
{
	uint64_t supported;

	return check_features(needed_features(agent), &supported, result);
}

int agent_uffd_open(uint64_t needed, uint64_t optional, AgentResult *result)
{
	uint64_t supported;
	int fd;

	if (!check_features(needed, &supported, result))
		return -1;
	fd = uffd_new_checked(result);
	if (fd >= 0 && !agent_uffd_api(fd, needed | (supported & optional), result))
		agent_close_fd(&fd);
	return fd;
}

static bool drop_stale_ptes(const PrAgentWireRegion *region, AgentResult *result)
{
	void *base = (void *)(uintptr_t)region->base;

	if (madvise(base, region->size, MADV_DONTNEED) == 0)
		return true;
	/* Locked memory (-overcommit mem-lock=on) */
	if (errno == EINVAL && madvise(base, region->size, MADV_DONTNEED_LOCKED) == 0)
		return true;
	return agent_fail(result, PR_AGENT_FAILED, "RAM block '%s' at 0x%llx: MADV_DONTNEED: %s",
			  region->idstr, (unsigned long long)region->base, strerror(errno));
}

static void unregister_all(PrAgent *agent, int uffd)
{
	for (unsigned i = 0; i < agent->n_regions; i++)
		agent_uffd_unregister(uffd, agent->regions[i].wire.base,
				      agent->regions[i].wire.size);
}

bool agent_uffd_enable(PrAgent *agent, AgentResult *result)
{
	int uffd;

	if (agent->uffd >= 0)
		return true;
	uffd = agent_uffd_open(needed_features(agent), UFFD_FEATURE_THREAD_ID, result);
	if (uffd < 0)
		return false;
	for (unsigned i = 0; i < agent->n_regions; i++) {
		const PrAgentWireRegion *region = &agent->regions[i].wire;

		if (agent_uffd_register(uffd, region, AGENT_UFFD_FAULTS, result) &&
		    drop_stale_ptes(region, result))
			continue;
		unregister_all(agent, uffd);
		close(uffd);
		return false;
	}
	agent->uffd = uffd;
	return true;
}

void agent_uffd_disable(PrAgent *agent)
{
	if (agent->uffd < 0)
		return;
	unregister_all(agent, agent->uffd);
	agent_close_fd(&agent->uffd);
}
