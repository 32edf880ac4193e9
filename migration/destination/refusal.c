/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/destination/refusal.h"

#include "migration/session/messages.h"

PrHelloAck pr_hello_accepted(void)
{
	return (PrHelloAck){.status = PR_HELLO_OK};
}

PrHelloAck pr_hello_refusal(PrHelloStatus status, const char *format, ...)
{
	PrHelloAck ack = {.status = status};
	g_autofree char *reason = NULL;
	va_list args;

	va_start(args, format);
	reason = g_strdup_vprintf(format, args);
	va_end(args);
	pr_reason_copy(ack.reason, reason);
	return ack;
}

void pr_destination_log_refusal(PrDestination *destination, const char *what, PrControl *control,
				const char *reason)
{
	g_autofree char *more = NULL;
	guint left_out;

	if (!pr_log_ratelimit_allows(&destination->refusals, g_get_monotonic_time(), &left_out))
		return;
	if (left_out)
		more = g_strdup_printf(" (%u more refusals were not logged)", left_out);
	g_message("refused a %s from %s: %s%s", what, pr_control_peer(control), reason,
		  more ? more : "");
}

gboolean pr_destination_send_activated(PrConn *conn, const PrHelloAck *ack, GError **error)
{
	g_autoptr(GByteArray) body = g_byte_array_new();

	pr_hello_ack_encode(body, ack);
	return pr_send(conn, PR_RP_ACTIVATED, body, error);
}
