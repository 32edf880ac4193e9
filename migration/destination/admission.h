/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Admission: which sources may connect to the destination. A HELLO, or an ACTIVATE over a standby,
 * is judged here, in the listener's thread or the standby's. One that is accepted waits as the
 * pending peer until the owner serves it. A newer one replaces it.
 */
#pragma once

#include "migration/destination/role.h"

void pr_pending_peer_free(PrPendingPeer *peer);

/* The HELLO is about the migration that this side is in. */
gboolean pr_destination_same_migration(const PrDestination *destination, const PrHello *hello);
/* HELLO of a connection that is to be used at once. Takes the control; answers if the peer is
 * refused. */
void pr_destination_admit(PrDestination *destination, PrControl *control, const PrHello *hello,
			  PrListener *listener);
/* ACTIVATE over a standby, as a HELLO with a higher epoch. With PR_HELLO_OK the owner has the
 * connection now. */
PrHelloAck pr_destination_activate(PrConn *conn, const PrHello *hello, PrListener *listener);
