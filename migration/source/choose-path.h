/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Over which path an attempt goes. */
#pragma once

#include "migration/source/role.h"

/* Tries the paths in order; the first that connects is used. A destination that refuses ends it, as
 * it would refuse over any path. By the owner. */
PrConnectOutcome pr_source_connect_any(PrSource *source, PrConn **ret_conn, GError **error);
