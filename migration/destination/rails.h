/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Rails: standbys over which the destination pulls. Called by the thread that has the connection;
 * harmless where the connection is no rail. */
#pragma once

#include "migration/destination/role.h"

/* Makes the standby a rail, if it is fit for that and it is of use. */
void pr_rail_begin(PrConn *conn);
/* Ends the rail when it is of no use any more. FALSE: the path is dead. */
gboolean pr_rail_review(PrConn *conn, GError **error);
/* Ends the rail when all READs that it has posted have come back. FALSE: they do not; the path is
 * dead. */
gboolean pr_rail_drain(PrConn *conn, GError **error);
/* The path is being closed: posts no more, at once. And when it has been fenced: claims of its lost
 * READs are freed. */
void pr_rail_stop(PrConn *conn);
void pr_rail_reclaim(PrConn *conn);
/* Tells the source which standbys are rails, and what they have carried. */
gboolean pr_destination_send_rails(PrConn *conn, GError **error);
