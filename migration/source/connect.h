/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A path is connected: control channel, lanes, return path. */
#pragma once

#include "migration/source/role.h"

/* Connects one path; everything is closed again if that fails. By the owner, or with
 * PR_RESUME_STANDBY by a keeper. */
PrConnectOutcome pr_source_connect(PrSource *source, const PrUri *uri, PrResume resume,
				   GCancellable *cancel, PrConn **ret_conn, GError **error);
/* Notes the last figures, from a destination that has every page. */
void pr_source_note_completed(PrSource *source, const PrHelloAck *ack);
