/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Answers to a source that asks to connect, or to activate a standby. */
#pragma once

#include "migration/destination/role.h"

PrHelloAck pr_hello_accepted(void);
/* A refusal with its reason. status: PR_HELLO_REFUSED, or PR_HELLO_PAUSED_BY_OPERATOR: the source
 * is to wait for its operator. */
PrHelloAck pr_hello_refusal(PrHelloStatus status, const char *format, ...) G_GNUC_PRINTF(2, 3);
/* Logs it, unless there were many of late. what: what the peer asked for. */
void pr_destination_log_refusal(PrDestination *destination, const char *what, PrControl *control,
				const char *reason);
/* The answer to ACTIVATE. */
gboolean pr_destination_send_activated(PrConn *conn, const PrHelloAck *ack, GError **error);
