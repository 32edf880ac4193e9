/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/destination/accept.h"

#include "migration/destination/charge.h"
#include "migration/destination/live-grants.h"
#include "migration/destination/page-hashes.h"
#include "migration/destination/rails.h"

/* The owner may be waiting for a guest that itself waits for a page, so these messages must not
 * wait for the owner. */
static gboolean handle_early(PrConn *conn, const PrMsg *msg)
{
	switch (msg->type) {
	case PR_CMD_HASHES:
		return pr_destination_handle_hashes(conn, msg, NULL);
	case PR_CMD_GRANT:
	case PR_CMD_RAM_ZERO:
		return pr_live_grants_handle(conn, msg);
	default:
		return FALSE;
	}
}

static const PrConnOps destination_conn_ops = {
	.early = handle_early,
	.allocate = pr_destination_allocate,
	.release = pr_rail_stop,
	.fenced = pr_rail_reclaim,
};

/* Called by the address that the source has called: the operator may listen on all of a host's. */
static char *path_name(PrControl *control, PrListener *listener)
{
	g_autofree char *host = pr_control_local_host(control);
	PrUri local = *pr_listener_uri(listener);

	local.host = host;
	return pr_uri_address(&local);
}

PrConn *pr_destination_conn_new(PrDestination *destination, PrControl *control,
				PrListener *listener, const PrHello *hello)
{
	g_autofree char *name = path_name(control, listener);
	PrConn *conn = pr_conn_new(destination->session, &destination_conn_ops, destination,
				   pr_listener_uri(listener), name, hello->epoch);

	conn->control = control;
	conn->peer_can = hello->capabilities;
	return conn;
}

gboolean pr_destination_accept(PrConn *conn, PrListener *listener, gboolean standby, GError **error)
{
	PrSession *session = conn->session;
	PrDataListener *data = pr_listener_data(listener);
	guint more = MIN(pr_params_fault_threads(session->params) - 1,
			 pr_hello_get_more_lanes(conn->peer_can));
	PrHelloAck ack = {
		.status = PR_HELLO_OK,
		.capabilities =
			pr_hello_more_lanes(more) | (session->verifies ? PR_HELLO_CAN_VERIFY : 0),
		.data_port = data->ops->listener_port(data),
	};
	PrBinding binding;

	conn->n_lanes = PR_LANES_MIN + more;
	pr_conn_binding(conn, &binding);
	data->ops->expect(data, &binding);
	if (!pr_control_answer(conn->control, &ack, error) ||
	    !(standby ? pr_conn_stand_by(conn, error) : pr_conn_publish(conn, error))) {
		data->ops->forget(data, &binding);
		return FALSE;
	}
	PrPathSetup setup = pr_conn_setup(conn, &binding, ack.data_port);
	PrDataPath *path = data->ops->accept(data, &setup, error);
	/* The caller may report that the source has hung up instead, which came first. */
	if (!path && error)
		g_debug("%s", (*error)->message);
	return path && pr_conn_set_path(conn, path, error);
}
