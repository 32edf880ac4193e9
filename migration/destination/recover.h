/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The destination's half of a recovery; source/recover.c has the whole exchange. */
#pragma once

#include "migration/destination/role.h"

/* RECV_BITMAP: answers with the received bitmap of a RAM block. */
gboolean pr_destination_handle_recv_bitmap(PrConn *conn, const PrMsg *msg, GError **error);
/* POSTCOPY_RESUME: goes on over this connection. */
gboolean pr_destination_handle_resume(PrConn *conn, const PrMsg *msg, GError **error);
