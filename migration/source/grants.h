/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* GRANT and PING, which the source sends over any connection. */
#pragma once

#include "migration/source/role.h"

/* Sends all grants of the path. Only once the guest has stopped: until then it may touch what was a
 * hole. */
gboolean pr_source_send_all_grants(PrConn *conn, GError **error);
/* Sends these: PrGrant, sorted by block. */
gboolean pr_source_send_grants(PrConn *conn, const GArray *grants, GError **error);
gboolean pr_source_send_ping(PrConn *conn, uint32_t value, GError **error);
