/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The guest starts to run at the destination, and its memory becomes complete. */
#pragma once

#include "migration/destination/role.h"

/* What the source is told of the progress. With PrSession.lock held, or by the owner. */
PrProgress pr_destination_progress(const PrDestination *destination, const PrFaultStats *stats);
void pr_destination_send_progress(PrDestination *destination, PrConn *conn);
/* Completes the migration if every page is in place. From any thread. */
void pr_destination_check_complete(PrDestination *destination);
/* The owner lets the guest run, if it ran at the source. The first fails if that is not possible
 * now; the second leaves it to the operator then. */
gboolean pr_destination_try_run(PrDestination *destination, GError **error);
void pr_destination_run(PrDestination *destination);
