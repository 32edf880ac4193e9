/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Capability verify at the source: hashes of the pages that the destination asks about. */
#pragma once

#include "migration/source/role.h"

/* REQ_HASHES; from the return path. */
gboolean pr_source_handle_req_hashes(PrConn *conn, const PrMsg *msg, GError **error);
/* Notes from the answer to HELLO whether both sides want pages verified. */
void pr_source_note_verify(PrSource *source, const PrHelloAck *ack);
