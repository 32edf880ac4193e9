/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The workers bring the guest's memory in: fault threads, pull threads, the verify thread, the
 * allocator. All calls are the owner's. */
#pragma once

#include "migration/destination/role.h"

/* Before the fault mode is on, when no thread of the guest can wait for a page yet: forgets who
 * waited for how long, and asks the guest for its vCPUs. */
void pr_destination_reset_blocktime(PrDestination *destination);
/* Turns the fault mode on, and starts the workers. fresh: no page was received yet. */
gboolean pr_destination_start_workers(PrDestination *destination, gboolean fresh, GError **error);
/* Gives the path of this connection to the fault threads, or to them and the pull. */
void pr_destination_attach_faults(PrDestination *destination, PrConn *conn);
void pr_destination_attach_all(PrDestination *destination, PrConn *conn);
/* No worker uses the path in use any more. READs that it has posted may still land. */
void pr_destination_detach(PrDestination *destination);
void pr_destination_stop_workers(PrDestination *destination);
void pr_destination_close_uffd(PrDestination *destination);
/* Both. The faults of a guest in postcopy wait for the next engine; the agent keeps them. */
void pr_destination_leave(PrDestination *destination);
