/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the source says about its RAM: GRANT, which allows a range to be read, and RAM_ZERO, for
 * ranges of zeros. */
#pragma once

#include "migration/destination/role.h"

/* GRANT: adds to PrConn.grants. */
gboolean pr_destination_handle_grant(PrConn *conn, const PrMsg *msg, GError **error);
/* RAM_ZERO: the pages are received. */
gboolean pr_destination_handle_zero(PrConn *conn, const PrMsg *msg, GError **error);
/* Gives the grants to the path, which is up. Again for the same connection: harmless. */
void pr_destination_use_grants(PrConn *conn);
