/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "transport/control/listen-sockets.h"

#include "transport/net/dial.h"
#include "transport/path-error.h"

#define BACKLOG	   4096 /* the kernel may have a lower limit */
#define RESOLVE_MS 5000

static GSocket *listen_at(GSocketAddress *address, GError **error)
{
	g_autoptr(GSocket) socket =
		g_socket_new(g_socket_address_get_family(address), G_SOCKET_TYPE_STREAM,
			     G_SOCKET_PROTOCOL_TCP, error);

	if (!socket)
		return NULL;
	g_socket_set_blocking(socket, FALSE);
	g_socket_set_listen_backlog(socket, BACKLOG);
	if (!g_socket_bind(socket, address, TRUE, error) || !g_socket_listen(socket, error))
		return NULL;
	return g_steal_pointer(&socket);
}

uint16_t pr_listening_port(GSocket *socket)
{
	g_autoptr(GSocketAddress) address = g_socket_get_local_address(socket, NULL);

	return g_inet_socket_address_get_port(G_INET_SOCKET_ADDRESS(address));
}

char *pr_listening_host(GSocket *socket)
{
	g_autoptr(GSocketAddress) address = g_socket_get_local_address(socket, NULL);

	return g_inet_address_to_string(
		g_inet_socket_address_get_address(G_INET_SOCKET_ADDRESS(address)));
}

/* The same address with another port. */
static GSocketAddress *with_port(GSocketAddress *address, uint16_t port)
{
	GInetSocketAddress *inet = G_INET_SOCKET_ADDRESS(address);
	gboolean has_scope = g_socket_address_get_family(address) == G_SOCKET_FAMILY_IPV6;

	return g_object_new(G_TYPE_INET_SOCKET_ADDRESS, "address",
			    g_inet_socket_address_get_address(inet), "port", (guint)port,
			    "scope-id", has_scope ? g_inet_socket_address_get_scope_id(inet) : 0,
			    NULL);
}

/* Plain connections from other hosts are refused unless the operator has allowed them. */
static gboolean check_security(const PrSecurity *security, GPtrArray *addresses, GError **error)
{
	if (security->tls)
		return pr_tls_check_server(security->tls, error);
	for (guint i = 0; i < addresses->len && !security->plain_net; i++) {
		GInetSocketAddress *address = addresses->pdata[i];

		if (g_inet_address_get_is_loopback(g_inet_socket_address_get_address(address)))
			continue;
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT,
			    "other hosts could reach it, and nothing would be encrypted or "
			    "authenticated; give --tls-dir DIR with certificates, or --insecure if "
			    "you trust everybody on that network");
		return FALSE;
	}
	return TRUE;
}

/* Listens on every address of the host. An address that this machine does not have (::1 without
 * IPv6) is skipped as long as there is another. */
static gboolean open_sockets(GPtrArray *sockets, GPtrArray *addresses, uint16_t port,
			     GError **error)
{
	g_autoptr(GError) last = NULL;

	for (guint i = 0; i < MIN(addresses->len, PR_LISTENING_MAX); i++) {
		g_autoptr(GSocketAddress) address = with_port(addresses->pdata[i], port);
		GSocket *socket;

		g_clear_error(&last);
		socket = listen_at(address, &last);
		if (socket) {
			port = pr_listening_port(socket);
			g_ptr_array_add(sockets, socket);
		} else if (g_error_matches(last, G_IO_ERROR, G_IO_ERROR_ADDRESS_IN_USE)) {
			break;
		}
	}
	if (sockets->len && !g_error_matches(last, G_IO_ERROR, G_IO_ERROR_ADDRESS_IN_USE))
		return TRUE;
	g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT, "%s; %s", last->message,
		    g_error_matches(last, G_IO_ERROR, G_IO_ERROR_ADDRESS_IN_USE)
			    ? "use another port or stop what listens there"
			    : "use an address of this host");
	return FALSE;
}

gboolean pr_listening_open(const PrUri *uri, const PrSecurity *security, GPtrArray *sockets,
			   GCancellable *cancel, GError **error)
{
	gint64 deadline = g_get_monotonic_time() + RESOLVE_MS * 1000;
	g_autoptr(GPtrArray) addresses = pr_resolve(uri->host, uri->port, deadline, cancel, error);

	return addresses && check_security(security, addresses, error) &&
	       open_sockets(sockets, addresses, uri->port, error);
}
