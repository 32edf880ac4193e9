/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Whose memory cgroup is charged for the guest's memory: the guest's, if it can be. */
#pragma once

#include "migration/destination/role.h"

/* The owner, before the other workers. fresh: no page was received yet. */
gboolean pr_destination_start_allocator(PrDestination *destination, gboolean fresh, GError **error);
/* After the other workers. */
void pr_destination_stop_allocator(PrDestination *destination);
/* PrPathAllocate; opaque is the PrDestination. */
gboolean pr_destination_allocate(uint32_t block, uint64_t offset, uint64_t length, void *opaque);
