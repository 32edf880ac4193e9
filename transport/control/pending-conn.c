/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "transport/control/pending-conn.h"

#include <sys/socket.h>
#include <unistd.h>

#include "transport/net/dial.h"

PrPendingConn *pr_pending_conn_new(int fd, gint64 deadline)
{
	PrPendingConn *conn = g_new0(PrPendingConn, 1);

	conn->fd = fd;
	conn->deadline = deadline;
	pr_peer_host(fd, &conn->host);
	return conn;
}

void pr_pending_conn_free(PrPendingConn *conn)
{
	if (!conn)
		return;
	pr_control_free(conn->control);
	if (conn->fd >= 0)
		close(conn->fd);
	g_free(conn->refusal);
	g_free(conn);
}

gboolean pr_pending_conn_open(PrPendingConn *conn, const PrUri *uri, const PrTransportOps *ops,
			      GError **error)
{
	g_autoptr(GSocket) socket = g_socket_new_from_fd(conn->fd, error);

	if (!socket)
		return FALSE;
	conn->fd = -1;
	pr_configure_socket(socket);
	conn->control = pr_control_new(g_socket_connection_factory_create_connection(socket), uri,
				       ops, error);
	return conn->control != NULL;
}

char *pr_pending_conn_peer(const PrPendingConn *conn)
{
	struct sockaddr_storage native = {0};
	socklen_t size = sizeof(native);
	g_autoptr(GSocketAddress) address = NULL;

	if (conn->control)
		return g_strdup(pr_control_peer(conn->control));
	if (getpeername(conn->fd, (struct sockaddr *)&native, &size) == 0)
		address = g_socket_address_new_from_native(&native, size);
	if (!address || !G_IS_INET_SOCKET_ADDRESS(address))
		return g_strdup("an unknown address");
	return pr_address_text(address);
}

int pr_pending_conn_poll_fd(const PrPendingConn *conn)
{
	/* Until its turn comes, nothing is done with what it has sent. */
	if (conn->step == PR_PENDING_TLS_TURN)
		return -1;
	return conn->control ? conn->control->fd : conn->fd;
}
