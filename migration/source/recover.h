/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A recovery, from recover to postcopy-active. */
#pragma once

#include "migration/source/role.h"

/* Exchanges the received bitmaps over a connection that is up, and resumes. By the owner. */
gboolean pr_source_recover(PrConn *conn, GError **error);
/* RECV_BITMAP; from the return path. */
gboolean pr_source_handle_bitmap(PrConn *conn, const PrMsg *msg, GError **error);
