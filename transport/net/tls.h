/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * TLS on the connections that lead to the control port: control channels and the lanes of tcp:. The
 * source is the client, the destination the server; each shows a certificate of one CA, the only one
 * that either trusts.
 *
 * The certificates are read again for each connection: those that were renewed in the course of a
 * long migration are used by the next recovery.
 */
#pragma once

#include <gio/gio.h>

/* Constant once made; used by any thread. */
typedef struct PrTls PrTls;

/* What protects the connections of one engine. The fields are constant and outlive what uses them. */
typedef struct PrSecurity {
	const PrTls *tls;   /* NULL: connections are plain */
	gboolean plain_net; /* plain connections may also come in from elsewhere than this host */
} PrSecurity;

/* `dir` has QEMU's names: ca-cert.pem, server-cert.pem and server-key.pem, client-cert.pem and
 * client-key.pem; a side needs its own pair only. `allow` (NULL-terminated, NULL: everybody): common
 * names, or whole distinguished names, of the clients that are let in. FALSE: something is missing or
 * can't be read; the error has the file's name. */
PrTls *pr_tls_new(const char *dir, const char *const *allow, GError **error);
void pr_tls_free(PrTls *tls);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrTls, pr_tls_free)
/* FALSE: it can't be a server, because of that file. */
gboolean pr_tls_check_server(const PrTls *tls, GError **error);

/*
 * Both take the connection, also when they fail, and return one to use in its place, whose descriptor
 * works as a TCP socket's: what is written to it goes out encrypted, and shutdown(2) and close(2) have the
 * same effects at the far end. Closing waits for a moment where the network does not take the rest. `deadline` in
 * microseconds of the monotonic clock. Errors are of the domain PR_PATH_ERROR, or G_IO_ERROR_CANCELLED.
 */
/* Source. The server's certificate must be for `host`, a name or an address. */
GSocketConnection *pr_tls_connect(const PrTls *tls, GSocketConnection *connection, const char *host,
				  gint64 deadline, GCancellable *cancel, GError **error);
/* Destination. *ret_refusal, where it is set, says what is wrong with the client's certificate: the
 * connection is then good for telling it so, and for nothing else. */
GSocketConnection *pr_tls_accept(const PrTls *tls, GSocketConnection *connection, gint64 deadline,
				 GCancellable *cancel, char **ret_refusal, GError **error);
