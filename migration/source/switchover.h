/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The switch-over: from the first connection until the guest is the destination's. */
#pragma once

#include "migration/source/role.h"

/* FALSE: the guest is still the source's, and has to run on here. *ret_conn: the connection, or
 * NULL; it is the caller's. */
gboolean pr_source_switch_over(PrSource *source, PrConn **ret_conn, GError **error);
