/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Grants that come while the guest runs, over a path with incremental grants. The source's half:
 * source/ram-scan.c. */
#pragma once

#include "migration/destination/role.h"

void pr_live_grants_start(PrConn *conn);
/* GRANT or RAM_ZERO, from the control channel's reader thread. FALSE: it is for the owner. */
gboolean pr_live_grants_handle(PrConn *conn, const PrMsg *msg);
/* When it returns, no grant is handled over this connection any more. */
void pr_live_grants_stop(PrConn *conn);
/* Asks the source to scan this page first. */
void pr_live_grants_request(PrConn *conn, guint block, uint64_t page);
