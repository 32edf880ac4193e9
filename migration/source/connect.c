/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/source/connect.h"

#include <string.h>

#include "migration/source/page-hashes.h"
#include "migration/source/return-path.h"
#include "transport/registry.h"
#include "util/try-alloc.h"

/* Nothing that the destination sends is handled early. */
static gboolean handle_nothing_early(PrConn *conn, const PrMsg *msg)
{
	return FALSE;
}

/* PrPathAllocate: the source's pages are all there. */
static gboolean allocate_nothing(uint32_t block, uint64_t offset, uint64_t length, void *source)
{
	return TRUE;
}

/* The source posts no READs. */
static void release_nothing(PrConn *conn)
{
}

static const PrConnOps source_conn_ops = {
	.early = handle_nothing_early,
	.allocate = allocate_nothing,
	.release = release_nothing,
	.fenced = release_nothing,
};

static PrConn *conn_new(PrSource *source, const PrUri *uri, GCancellable *cancel)
{
	PrSession *session = source->session;

	pr_session_lock(session);
	uint64_t epoch = ++session->binding.epoch;
	pr_session_unlock(session);
	PrConn *conn = pr_conn_new(session, &source_conn_ops, source, uri, /* name= */ NULL, epoch);
	conn->cancel = g_object_ref(cancel);
	return conn;
}

/* Opens the control channel; *ret_ack is the destination's answer. */
static PrControl *say_hello(PrConn *conn, PrResume resume, PrHelloAck *ret_ack, GError **error)
{
	PrSession *session = conn->session;
	g_autofree PrWireBlock *blocks = pr_ram_wire_blocks(session->ram);
	PrHello hello = {
		.version = PR_WIRE_VERSION,
		.role = PR_HELLO_SOURCE,
		.epoch = conn->epoch,
		.resume = resume,
		.capabilities =
			PR_HELLO_CAN_ZSTD | pr_hello_more_lanes(PR_URGENT_LANES_MAX - 1) |
			(pr_capability(session->params, PR_CAP_VERIFY) ? PR_HELLO_CAN_VERIFY : 0),
		.n_blocks = session->ram->n_blocks,
		.blocks = blocks,
	};

	memcpy(hello.uuid, session->binding.uuid, PR_UUID_BYTES);
	memcpy(hello.secret, session->binding.secret, PR_SECRET_BYTES);
	g_strlcpy(hello.scheme, conn->uri->scheme, sizeof(hello.scheme));
	return pr_control_connect(conn->uri, session->security.tls, &hello,
				  (guint)pr_param(session->params, PR_PARAM_CONNECT_TIMEOUT),
				  (guint)pr_param(session->params, PR_PARAM_HANDSHAKE_TIMEOUT),
				  conn->cancel, ret_ack, error);
}

static gboolean count_lanes(PrConn *conn, const PrHelloAck *ack, GError **error)
{
	guint more = pr_hello_get_more_lanes(ack->capabilities);

	conn->n_lanes = PR_LANES_MIN + more;
	if (conn->n_lanes <= PR_LANES_MAX)
		return TRUE;
	g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT,
		    "path %s: the destination asks for %u urgent lanes, of %u that were offered; "
		    "use the same version of Postroad on both sides",
		    conn->name, more + 1, PR_URGENT_LANES_MAX);
	return FALSE;
}

/* Brings up the lanes and the return path. */
static gboolean open_lanes(PrConn *conn, const PrHelloAck *ack, GError **error)
{
	const PrTransportOps *ops = pr_transport_find(conn->uri->scheme, error);
	PrBinding binding;

	if (!ops || !count_lanes(conn, ack, error))
		return FALSE;
	pr_conn_binding(conn, &binding);
	PrPathSetup setup = pr_conn_setup(conn, &binding, ack->data_port);
	PrDataPath *path = ops->connect(&setup, error);

	if (!path || !pr_conn_set_path(conn, path, error))
		return FALSE;
	conn->return_path = pr_thread_try("return-path", pr_source_return_path_thread, conn, error);
	return conn->return_path != NULL;
}

void pr_source_note_completed(PrSource *source, const PrHelloAck *ack)
{
	PrSession *session = source->session;

	pr_session_lock(session);
	session->progress = ack->progress;
	pr_session_unlock(session);
}

PrConnectOutcome pr_source_connect(PrSource *source, const PrUri *uri, PrResume resume,
				   GCancellable *cancel, PrConn **ret_conn, GError **error)
{
	PrHelloAck ack = {0};
	g_autoptr(PrConn) conn = conn_new(source, uri, cancel);

	conn->control = say_hello(conn, resume, &ack, error);
	if (!conn->control)
		return PR_CONNECT_FAILED;
	if (ack.status == PR_HELLO_COMPLETED) {
		pr_source_note_completed(source, &ack);
		return PR_CONNECT_COMPLETED;
	}
	if (resume == PR_RESUME_NO)
		pr_source_note_verify(source, &ack);
	if (!(resume == PR_RESUME_STANDBY ? pr_conn_stand_by(conn, error)
					  : pr_conn_publish(conn, error)))
		return PR_CONNECT_FAILED;
	if (!open_lanes(conn, &ack, error)) {
		pr_conn_close(g_steal_pointer(&conn));
		return PR_CONNECT_FAILED;
	}
	*ret_conn = g_steal_pointer(&conn);
	return PR_CONNECT_UP;
}
