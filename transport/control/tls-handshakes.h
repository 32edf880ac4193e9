/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The TLS handshakes of incoming connections. Each has a thread of its own, because it blocks. At
 * most PR_TLS_HANDSHAKES_MAX run at a time, because GIO works through them in a pool of ten
 * threads. One more cancels one of those that run, of the host that has most of them
 * (peer-limits.h).
 *
 * All functions are for one thread, the listener's accept thread.
 */
#pragma once

#include "transport/control/pending-conn.h"

#define PR_TLS_HANDSHAKES_MAX 8

typedef struct PrTlsHandshakes PrTlsHandshakes;

/* Keeps `tls`. */
PrTlsHandshakes *pr_tls_handshakes_new(const PrTls *tls, GError **error);
/* Cancels what runs, and waits for the threads. */
void pr_tls_handshakes_free(PrTlsHandshakes *handshakes);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrTlsHandshakes, pr_tls_handshakes_free)

/* Starts the handshake of a connection that has a control. Takes the connection when TRUE. */
gboolean pr_tls_handshakes_start(PrTlsHandshakes *handshakes, PrPendingConn *conn, GError **error);
/* Readable where there is something for pr_tls_handshakes_pop(). */
int pr_tls_handshakes_fd(PrTlsHandshakes *handshakes);
/* The connection of a handshake that has ended, which is the caller's then; NULL: there is none.
 * It is encrypted, and its refusal is set where the client's certificate is not accepted. Where
 * *ret_failure is set the handshake has failed, and the connection is good for nothing. */
PrPendingConn *pr_tls_handshakes_pop(PrTlsHandshakes *handshakes, GError **ret_failure);
