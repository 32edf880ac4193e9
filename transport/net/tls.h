/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * TLS on the connections to the control port: control channels and the lanes of tcp:. The source
 * is the client, the destination the server. Each has a certificate of the one CA that both
 * trust.
 *
 * The certificates are read again for each connection. So a recovery uses certificates that were
 * renewed during a long migration.
 */
#pragma once

#include <gio/gio.h>

/* Constant once made; any thread may use it. */
typedef struct PrTls PrTls;

/* How the connections of one engine are protected. Constant; outlives all users. */
typedef struct PrSecurity {
	const PrTls *tls;   /* NULL: connections are plain */
	gboolean plain_net; /* plain connections may also come from other hosts */
} PrSecurity;

/* The files in `dir` have QEMU's names: ca-cert.pem, server-cert.pem and server-key.pem,
 * client-cert.pem and client-key.pem. A side needs its own pair only. `allow` (NULL-terminated;
 * NULL: all clients) has common names, or whole distinguished names, of the clients that may
 * connect. NULL: a file is missing or cannot be read; the error names it. */
PrTls *pr_tls_new(const char *dir, const char *const *allow, GError **error);
void pr_tls_free(PrTls *tls);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrTls, pr_tls_free)
/* Whether there is a server's certificate. FALSE: the error names the file. */
gboolean pr_tls_check_server(const PrTls *tls, GError **error);

/*
 * Both take the connection, also when they fail, and return one to use in its place. Its
 * descriptor works as a TCP socket's does: bytes written to it are sent encrypted, and
 * shutdown(2) and close(2) have the same effects at the far end. Closing waits for 200 ms at most
 * while the network does not take the last bytes. `deadline`: us, monotonic. Errors are
 * PR_PATH_ERROR, PR_RESOURCE_ERROR or G_IO_ERROR_CANCELLED.
 */
/* Source. The server's certificate must be for `host`, a name or an address. */
GSocketConnection *pr_tls_connect(const PrTls *tls, GSocketConnection *connection, const char *host,
				  gint64 deadline, GCancellable *cancel, GError **error);
/* Destination. Where *ret_refusal is set, it says what is wrong with the client's certificate. The
 * connection may then be used only to send that reason. */
GSocketConnection *pr_tls_accept(const PrTls *tls, GSocketConnection *connection, gint64 deadline,
				 GCancellable *cancel, char **ret_refusal, GError **error);
