/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The handshake at the beginning of a control channel: HELLO and HELLO_ACK, on both sides. */
#include <string.h>

#include "transport/control/internal.h"
#include "transport/net/dial.h"
#include "transport/registry.h"

static gint64 deadline_in(guint ms)
{
	return g_get_monotonic_time() + (gint64)ms * 1000;
}

static gboolean send_hello(PrControl *control, const PrHello *hello, GError **error)
{
	g_autoptr(GByteArray) body = g_byte_array_new();

	pr_hello_encode(body, hello);
	return pr_control_send_bytes(control, PR_MSG_HELLO, body, error);
}

static gboolean read_ack(PrControl *control, PrHelloAck *ret, GError **error)
{
	g_autoptr(PrMsg) msg = pr_control_read_first(control, error);

	if (!msg)
		return FALSE;
	if (msg->type == PR_MSG_HELLO_ACK)
		return pr_hello_ack_decode(msg->body, msg->length, ret, error);
	g_set_error(error, PR_WIRE_ERROR, PR_WIRE_ERROR_MALFORMED, "it answers HELLO with %s",
		    pr_msg_name(msg->type));
	return FALSE;
}

/* Makes an error of the path. */
static void set_connect_error(const PrUri *uri, const PrControl *control, const GError *cause,
			      GError **error)
{
	g_autofree char *path = pr_uri_address(uri);

	if (cause->domain == PR_WIRE_ERROR)
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT,
			    "path %s: %s does not speak the Postroad protocol, or speaks another "
			    "version of it: %s; check the port and the release on both sides",
			    path, control->peer, cause->message);
	else
		g_set_error(error, cause->domain, cause->code, "path %s: handshake: %s", path,
			    cause->message);
}

gboolean pr_control_check_ack(PrControl *control, const PrHelloAck *ack, GError **error)
{
	if (ack->status != PR_HELLO_REFUSED && ack->status != PR_HELLO_PAUSED_BY_OPERATOR)
		return TRUE;
	g_set_error(error, PR_PATH_ERROR,
		    ack->status == PR_HELLO_PAUSED_BY_OPERATOR ? PR_PATH_ERROR_PAUSED_BY_OPERATOR
							       : PR_PATH_ERROR_REFUSED,
		    "%s refused the connection: %s", control->peer, ack->reason);
	return FALSE;
}

static gboolean exchange_hello(PrControl *control, const PrHello *hello, PrHelloAck *ret,
			       GError **error)
{
	PrHelloAck ack;

	if (!send_hello(control, hello, error) || !read_ack(control, &ack, error) ||
	    !pr_control_check_ack(control, &ack, error))
		return FALSE;
	*ret = ack;
	return TRUE;
}

static gboolean start_tls(PrControl *control, const PrTls *tls, GError **error)
{
	GSocketConnection *connection;

	if (!tls)
		return TRUE;
	connection = pr_tls_connect(tls, pr_control_take_connection(control), control->uri->host,
				    control->handshake_deadline, control->cancel, error);
	if (!connection)
		return FALSE;
	pr_control_put_connection(control, connection);
	return TRUE;
}

PrControl *pr_control_connect(const PrUri *uri, const PrTls *tls, const PrHello *hello,
			      guint timeout_ms, guint handshake_ms, GCancellable *cancel,
			      PrHelloAck *ret_ack, GError **error)
{
	const PrTransportOps *ops = pr_transport_find(uri->scheme, error);
	g_autoptr(PrControl) control = NULL;
	g_autoptr(GError) cause = NULL;
	GSocketConnection *connection;

	if (!ops)
		return NULL;
	connection = pr_dial(uri, uri->port, deadline_in(timeout_ms), cancel, error);
	if (!connection)
		return NULL;
	control = pr_control_new(connection, uri, ops, error);
	if (!control)
		return NULL;
	pr_control_set_handshake(control, deadline_in(handshake_ms), cancel);
	if (start_tls(control, tls, &cause) && exchange_hello(control, hello, ret_ack, &cause))
		return g_steal_pointer(&control);
	set_connect_error(uri, control, cause, error);
	return NULL;
}

gboolean pr_control_answer(PrControl *control, const PrHelloAck *ack, GError **error)
{
	g_autoptr(GByteArray) body = g_byte_array_new();
	g_autoptr(GError) reason = NULL;

	pr_hello_ack_encode(body, ack);
	if (!pr_control_send_bytes(control, PR_MSG_HELLO_ACK, body, error))
		return FALSE;
	if (ack->status == PR_HELLO_OK)
		return TRUE;
	reason = g_error_new(PR_PATH_ERROR, PR_PATH_ERROR_REFUSED, "%s: %s", control->peer,
			     ack->status == PR_HELLO_COMPLETED
				     ? "the destination has everything already"
				     : ack->reason);
	pr_control_shutdown(control, reason);
	return TRUE;
}
