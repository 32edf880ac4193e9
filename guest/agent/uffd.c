/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The fault mode: a userfaultfd of this process over every region.
 *
 * The descriptor's ioctls act on the address space that created it, whoever issues them, so it is made
 * here and resolved by the engine. Order: register MISSING|MINOR, then drop the page table entries:
 * an access after that faults, whatever was mapped before. The agent keeps the descriptor itself, so
 * that a fault waits, and does not read zeros, while there is no engine.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "guest/agent/uffd-features.h"
#include "guest/agent/internal.h"

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
		agent_result_fail(result, PR_AGENT_PERMISSION,
				  "userfaultfd: the kernel refused it to process %d; run `sysctl "
				  "vm.unprivileged_userfaultfd=1` or give its user access to "
				  "/dev/userfaultfd",
				  (int)getpid());
	else if (fd < 0)
		agent_result_fail(result, PR_AGENT_UNSUPPORTED, "userfaultfd: %s", strerror(errno));
	return fd;
}

static bool has_hugetlb(const PrAgent *agent)
{
	for (unsigned i = 0; i < agent->n_regions; i++) {
		if (agent->regions[i].wire.page_size != (uint32_t)sysconf(_SC_PAGESIZE))
			return true;
	}
	return false;
}

static uint64_t needed_features(const PrAgent *agent)
{
	uint64_t features = UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM;

	if (has_hugetlb(agent))
		features |= UFFD_FEATURE_MISSING_HUGETLBFS | UFFD_FEATURE_MINOR_HUGETLBFS;
	return features;
}

/* A descriptor shakes hands once only, so the question takes one of its own. */
static bool supported_features(uint64_t *ret_features, AgentResult *result)
{
	struct uffdio_api api = {.api = UFFD_API};
	int fd = uffd_new_checked(result);
	bool ok;

	if (fd < 0)
		return false;
	ok = ioctl(fd, UFFDIO_API, &api) == 0;
	if (ok)
		*ret_features = api.features;
	else
		agent_result_fail(result, PR_AGENT_UNSUPPORTED, "userfaultfd: UFFDIO_API: %s",
				  strerror(errno));
	close(fd);
	return ok;
}

static bool check_features(uint64_t supported, uint64_t needed, AgentResult *result)
{
	const AgentFeature *missing = agent_missing_feature(supported, needed);

	if (missing)
		agent_result_fail(
			result, PR_AGENT_UNSUPPORTED,
			"userfaultfd: this kernel has no UFFD_FEATURE_%s; use Linux %s or later",
			missing->name, missing->since);
	return !missing;
}

bool agent_uffd_probe(PrAgent *agent, AgentResult *result)
{
	uint64_t supported;

	return supported_features(&supported, result) &&
	       check_features(supported, needed_features(agent), result);
}

int agent_uffd_open(uint64_t needed, uint64_t optional, AgentResult *result)
{
	struct uffdio_api api = {.api = UFFD_API};
	uint64_t supported;
	int fd;

	if (!supported_features(&supported, result) || !check_features(supported, needed, result))
		return -1;
	fd = uffd_new_checked(result);
	if (fd < 0)
		return -1;
	api.features = needed | (supported & optional);
	if (ioctl(fd, UFFDIO_API, &api) < 0) {
		agent_result_fail(result, PR_AGENT_UNSUPPORTED, "userfaultfd: UFFDIO_API: %s",
				  strerror(errno));
		close(fd);
		return -1;
	}
	return fd;
}

static bool register_region(int uffd, const PrAgentWireRegion *region, AgentResult *result)
{
	struct uffdio_register reg = {
		.range = {.start = region->base, .len = region->size},
		.mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR,
	};

	if (ioctl(uffd, UFFDIO_REGISTER, &reg) < 0) {
		agent_result_fail(result, PR_AGENT_FAILED,
				  "userfaultfd: RAM block '%s' at 0x%llx: UFFDIO_REGISTER: %s",
				  region->idstr, (unsigned long long)region->base, strerror(errno));
		return false;
	}
	if (reg.ioctls & (1ULL << _UFFDIO_CONTINUE))
		return true;
	agent_result_fail(
		result, PR_AGENT_UNSUPPORTED,
		"userfaultfd: RAM block '%s': this kernel offers no UFFDIO_CONTINUE there",
		region->idstr);
	return false;
}

static bool drop_stale_ptes(const PrAgentWireRegion *region, AgentResult *result)
{
	void *base = (void *)(uintptr_t)region->base;

	if (madvise(base, region->size, MADV_DONTNEED) == 0)
		return true;
	/* Locked memory (-overcommit mem-lock=on) */
	if (errno == EINVAL && madvise(base, region->size, MADV_DONTNEED_LOCKED) == 0)
		return true;
	agent_result_fail(result, PR_AGENT_FAILED, "RAM block '%s' at 0x%llx: MADV_DONTNEED: %s",
			  region->idstr, (unsigned long long)region->base, strerror(errno));
	return false;
}

/* Harmless for regions that are not registered. */
static void unregister_all(PrAgent *agent, int uffd)
{
	for (unsigned i = 0; i < agent->n_regions; i++) {
		struct uffdio_range range = {
			.start = agent->regions[i].wire.base,
			.len = agent->regions[i].wire.size,
		};

		(void)ioctl(uffd, UFFDIO_UNREGISTER, &range);
	}
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

		if (register_region(uffd, region, result) && drop_stale_ptes(region, result))
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
