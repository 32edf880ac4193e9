/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Capability verify at the destination: what the verify thread asks of the source, and what it
 * finds. */
#pragma once

#include "migration/destination/role.h"

/* HASHES, for the verify thread. From the control channel's reader thread, which leaves a malformed
 * message to the owner, to be refused. */
gboolean pr_destination_handle_hashes(PrConn *conn, const PrMsg *msg, GError **error);
/* The owner, before the other workers: if pages are to be verified. */
gboolean pr_destination_start_verify(PrDestination *destination, GError **error);
/* After the other workers; to be freed when no worker is left. */
PrVerify *pr_destination_stop_verify(PrDestination *destination);
