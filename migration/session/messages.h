/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Messages that both sides send, and handle in the same way. peer: "source" or "destination", for
 * the operator. */
#pragma once

#include "migration/session/connection.h"

gboolean pr_send(PrConn *conn, uint16_t type, GByteArray *body, GError **error);
/* PAUSE, HOLD, ERROR or NOTE, unless the socket takes nothing for 2 ms. */
void pr_send_reason_nowait(PrConn *conn, uint16_t type, const char *reason);
/* Tells the peer over all standbys that the connection of this epoch is lost. With the lock held;
 * does not wait. */
void pr_send_lost_nowait(PrSession *session, uint64_t epoch, const GError *error);

/* LOST, of the connection in use; it comes over another one. */
gboolean pr_handle_lost(PrSession *session, const PrMsg *msg, const char *peer, GError **error);
gboolean pr_handle_note(PrSession *session, const PrMsg *msg, const char *peer, GError **error);
/* PAUSE, HOLD or ERROR as an error; always FALSE. */
gboolean pr_handle_reason(const PrMsg *msg, const char *peer, GError **error);
