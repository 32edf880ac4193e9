/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "guest/agent/uffd-ranges.h"

#include <errno.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>

/* Bytes that one ioctl protects. It walks the page tables, and threads that map or unmap memory
 * wait meanwhile. */
#define PROTECT_BYTES (1ull << 30)
#define NAME_BYTES    (PR_AGENT_IDSTR_MAX + 64)

static const struct {
	uint64_t bit;
	const char *name;
	const char *since; /* the Linux version */
} features[] = {
	{UFFD_FEATURE_MISSING_SHMEM, "MISSING_SHMEM", "4.11"},
	{UFFD_FEATURE_MINOR_SHMEM, "MINOR_SHMEM", "5.14"},
	{UFFD_FEATURE_MISSING_HUGETLBFS, "MISSING_HUGETLBFS", "4.11"},
	{UFFD_FEATURE_MINOR_HUGETLBFS, "MINOR_HUGETLBFS", "5.13"},
	{UFFD_FEATURE_PAGEFAULT_FLAG_WP, "PAGEFAULT_FLAG_WP", "5.7"},
	{UFFD_FEATURE_WP_HUGETLBFS_SHMEM, "WP_HUGETLBFS_SHMEM", "5.19"},
};

uint64_t agent_uffd_needed(AgentUffdKind kind, bool hugetlb)
{
	if (kind == AGENT_UFFD_FENCE)
		return UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM;
	return UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM |
	       (hugetlb ? UFFD_FEATURE_MISSING_HUGETLBFS | UFFD_FEATURE_MINOR_HUGETLBFS : 0);
}

bool agent_uffd_check(uint64_t supported, uint64_t needed, AgentResult *result)
{
	for (unsigned i = 0; i < sizeof(features) / sizeof(features[0]); i++) {
		if ((needed & features[i].bit) && !(supported & features[i].bit))
			return agent_fail(result, PR_AGENT_UNSUPPORTED,
					  "userfaultfd: this kernel has no UFFD_FEATURE_%s; use "
					  "Linux %s or later",
					  features[i].name, features[i].since);
	}
	return true;
}

static bool call_api(int fd, struct uffdio_api *api, AgentResult *result)
{
	return ioctl(fd, UFFDIO_API, api) == 0 ||
	       agent_fail(result, PR_AGENT_UNSUPPORTED, "userfaultfd: UFFDIO_API: %s",
			  strerror(errno));
}

bool agent_uffd_supported(int fd, uint64_t *ret_features, AgentResult *result)
{
	struct uffdio_api api = {.api = UFFD_API};

	if (!call_api(fd, &api, result))
		return false;
	*ret_features = api.features;
	return true;
}

bool agent_uffd_api(int fd, uint64_t wanted, AgentResult *result)
{
	struct uffdio_api api = {.api = UFFD_API, .features = wanted};

	return call_api(fd, &api, result);
}

/* A region for an error text. The helper knows no names of RAM blocks. */
static const char *describe(const PrAgentWireRegion *region, uint64_t at, char name[NAME_BYTES])
{
	if (*region->idstr)
		snprintf(name, NAME_BYTES, "RAM block '%s' at 0x%llx", region->idstr,
			 (unsigned long long)at);
	else
		snprintf(name, NAME_BYTES, "RAM at 0x%llx", (unsigned long long)at);
	return name;
}

bool agent_uffd_register(int uffd, const PrAgentWireRegion *region, AgentUffdKind kind,
			 AgentResult *result)
{
	bool fence = kind == AGENT_UFFD_FENCE;
	struct uffdio_register reg = {
		.range = {.start = region->base, .len = region->size},
		.mode = fence ? UFFDIO_REGISTER_MODE_WP
			      : UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR,
	};
	char name[NAME_BYTES];

	if (ioctl(uffd, UFFDIO_REGISTER, &reg) < 0)
		return agent_fail(result, PR_AGENT_FAILED, "userfaultfd: %s: UFFDIO_REGISTER: %s%s",
				  describe(region, region->base, name), strerror(errno),
				  errno == EBUSY ? "; the process has another userfaultfd there: "
						   "a migration or snapshot of QEMU's own?"
						 : "");
	if (reg.ioctls & (1ull << (fence ? _UFFDIO_WRITEPROTECT : _UFFDIO_CONTINUE)))
		return true;
	return agent_fail(result, PR_AGENT_UNSUPPORTED,
			  "userfaultfd: %s: this kernel offers no %s there",
			  describe(region, region->base, name),
			  fence ? "UFFDIO_WRITEPROTECT" : "UFFDIO_CONTINUE");
}

void agent_uffd_unregister(int uffd, uint64_t base, uint64_t size)
{
	struct uffdio_range range = {.start = base, .len = size};

	(void)ioctl(uffd, UFFDIO_UNREGISTER, &range);
	(void)ioctl(uffd, UFFDIO_WAKE, &range);
}

/* EAGAIN: another thread was changing the process's mappings. Returns 0 or an errno. */
static int protect_range(int uffd, uint64_t start, uint64_t len)
{
	struct uffdio_writeprotect protect = {
		.range = {.start = start, .len = len},
		.mode = UFFDIO_WRITEPROTECT_MODE_WP,
	};
	int code;

	do {
		code = ioctl(uffd, UFFDIO_WRITEPROTECT, &protect) < 0 ? errno : 0;
	} while (code == EAGAIN || code == EINTR);
	return code;
}

bool agent_uffd_protect(int uffd, const PrAgentWireRegion *region, AgentResult *result)
{
	for (uint64_t at = 0; at < region->size; at += PROTECT_BYTES) {
		uint64_t left = region->size - at;
		int code = protect_range(uffd, region->base + at,
					 left < PROTECT_BYTES ? left : PROTECT_BYTES);
		char name[NAME_BYTES];

		if (code)
			return agent_fail(result, PR_AGENT_FAILED,
					  "userfaultfd: %s can't be write-protected: %s",
					  describe(region, region->base + at, name),
					  strerror(code));
	}
	return true;
}
