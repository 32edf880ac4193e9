/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The source's commands, as the destination carries them out. */
#pragma once

#include "migration/destination/role.h"

/* Carries out one message. FALSE: it makes no sense in this state, or it has failed. By the
 * owner. */
gboolean pr_destination_handle_command(PrConn *conn, const PrMsg *msg, GError **error);
