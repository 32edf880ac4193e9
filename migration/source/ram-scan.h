/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Finds out, after the guest has stopped, what the destination may read over a path with
 * incremental grants, and what is zero; tells it. A thread does that. */
#pragma once

#include "migration/source/role.h"

GThread *pr_ram_scan_start(PrConn *conn, GError **error);
/* Returns whether the destination was told about all RAM. */
gboolean pr_ram_scan_finish(PrSource *source, GThread *scanner);
/* Waits until the destination was told about all RAM, or the attempt has failed. */
void pr_ram_scan_await(PrSource *source);
/* SCAN_FIRST: the destination waits for these pages. From the return path. */
gboolean pr_source_handle_scan_first(PrConn *conn, const PrMsg *msg, GError **error);
