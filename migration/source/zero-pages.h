/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* RAM_ZERO: the destination need not read pages of zeros. The guest has stopped. */
#pragma once

#include "migration/source/role.h"

/* Tells the destination all holes. */
gboolean pr_source_send_holes(PrConn *conn, GError **error);
/* For a path with incremental grants: every part of [start, end) that is not in these grants is a
 * hole. The grants are sorted. */
gboolean pr_source_send_ungranted(PrConn *conn, uint32_t block, uint64_t start, uint64_t end,
				  const GArray *grants, GError **error);
/* Searches all RAM that is not known to be in place, ahead of the destination's pull. */
void pr_source_send_zero_pages(PrConn *conn);
