/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "guest/agent/uffd-features.h"

#include <linux/userfaultfd.h>
#include <stddef.h>

static const AgentFeature table[] = {
	{UFFD_FEATURE_MISSING_SHMEM, "MISSING_SHMEM", "4.11"},
	{UFFD_FEATURE_MINOR_SHMEM, "MINOR_SHMEM", "5.14"},
	{UFFD_FEATURE_MISSING_HUGETLBFS, "MISSING_HUGETLBFS", "4.11"},
	{UFFD_FEATURE_MINOR_HUGETLBFS, "MINOR_HUGETLBFS", "5.13"},
	{UFFD_FEATURE_PAGEFAULT_FLAG_WP, "PAGEFAULT_FLAG_WP", "5.7"},
	{UFFD_FEATURE_WP_HUGETLBFS_SHMEM, "WP_HUGETLBFS_SHMEM", "5.19"},
};

const AgentFeature *agent_missing_feature(uint64_t supported, uint64_t needed)
{
	for (unsigned i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
		if ((needed & table[i].bit) && !(supported & table[i].bit))
			return &table[i];
	}
	return NULL;
}
