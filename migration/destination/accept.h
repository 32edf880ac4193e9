/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A connection of an admitted source is brought up. */
#pragma once

#include "migration/destination/role.h"

/* A connection that came in at this listener. Takes the control. */
PrConn *pr_destination_conn_new(PrDestination *destination, PrControl *control,
				PrListener *listener, const PrHello *hello);
/* Answers HELLO with PR_HELLO_OK, publishes the connection or lists it as a standby, and waits for
 * its lanes. */
gboolean pr_destination_accept(PrConn *conn, PrListener *listener, gboolean standby,
			       GError **error);
