/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "transport/control/tls-handshakes.h"

#include "util/try-alloc.h"
#include "util/waker.h"

/* Its thread's until it is in `done`, then the accept thread's. */
typedef struct TlsHandshake {
	PrTlsHandshakes *all;
	PrPendingConn *conn;
	GCancellable *cancel; /* constant; cancelled under the lock, while it is in `running` */
	GError *failure;
} TlsHandshake;

struct PrTlsHandshakes {
	const PrTls *tls; /* constant */
	PrWaker waker;	  /* something is in `done` */

	GMutex lock; /* of the rest */
	GCond changed;
	GQueue running; /* TlsHandshake, not cancelled, oldest first */
	GQueue done;	/* TlsHandshake */
	guint n_threads;
};

static void handshake_free(TlsHandshake *handshake)
{
	pr_pending_conn_free(handshake->conn);
	g_object_unref(handshake->cancel);
	g_clear_error(&handshake->failure);
	g_free(handshake);
}

/* Replaces the control's connection by the encrypted one. */
static void encrypt(TlsHandshake *handshake)
{
	PrPendingConn *conn = handshake->conn;
	GSocketConnection *connection =
		pr_tls_accept(handshake->all->tls, pr_control_take_connection(conn->control),
			      conn->deadline, handshake->cancel, &conn->refusal,
			      &handshake->failure);

	if (connection)
		pr_control_put_connection(conn->control, connection);
	else if (g_error_matches(handshake->failure, G_IO_ERROR, G_IO_ERROR_CANCELLED))
		g_prefix_error(&handshake->failure, "too many TLS handshakes at a time: ");
}

static gpointer handshake_thread(gpointer opaque)
{
	TlsHandshake *handshake = opaque;
	PrTlsHandshakes *all = handshake->all;

	encrypt(handshake);
	g_mutex_lock(&all->lock);
	g_queue_remove(&all->running, handshake);
	g_queue_push_tail(&all->done, handshake);
	pr_waker_wake(&all->waker);
	all->n_threads--;
	g_cond_signal(&all->changed);
	g_mutex_unlock(&all->lock);
	return NULL;
}

/* Under the lock. */
static void cancel_one(PrTlsHandshakes *all)
{
	PrPeerHost hosts[PR_TLS_HANDSHAKES_MAX];
	guint n = 0;
	TlsHandshake *handshake;

	for (GList *link = all->running.head; link; link = link->next)
		hosts[n++] = ((TlsHandshake *)link->data)->conn->host;
	handshake = g_queue_pop_nth(&all->running, pr_peer_pick_eviction(hosts, n));
	g_cancellable_cancel(handshake->cancel);
}

gboolean pr_tls_handshakes_start(PrTlsHandshakes *all, PrPendingConn *conn, GError **error)
{
	TlsHandshake *handshake = g_new0(TlsHandshake, 1);
	GThread *thread;

	handshake->all = all;
	handshake->conn = conn;
	handshake->cancel = g_cancellable_new();
	conn->step = PR_PENDING_TLS;
	g_mutex_lock(&all->lock);
	if (all->running.length == PR_TLS_HANDSHAKES_MAX)
		cancel_one(all);
	thread = pr_thread_try("tls-shake", handshake_thread, handshake, error);
	if (thread) {
		g_queue_push_tail(&all->running, handshake);
		all->n_threads++;
	}
	g_mutex_unlock(&all->lock);
	if (thread) {
		g_thread_unref(thread);
		return TRUE;
	}
	handshake->conn = NULL;
	handshake_free(handshake);
	return FALSE;
}

int pr_tls_handshakes_fd(PrTlsHandshakes *all)
{
	return pr_waker_fd(&all->waker);
}

PrPendingConn *pr_tls_handshakes_pop(PrTlsHandshakes *all, GError **ret_failure)
{
	TlsHandshake *handshake;
	PrPendingConn *conn;

	pr_waker_drain(&all->waker);
	g_mutex_lock(&all->lock);
	handshake = g_queue_pop_head(&all->done);
	g_mutex_unlock(&all->lock);
	if (!handshake)
		return NULL;
	conn = g_steal_pointer(&handshake->conn);
	conn->step = PR_PENDING_FRAME;
	*ret_failure = g_steal_pointer(&handshake->failure);
	handshake_free(handshake);
	return conn;
}

PrTlsHandshakes *pr_tls_handshakes_new(const PrTls *tls, GError **error)
{
	PrTlsHandshakes *all = g_new0(PrTlsHandshakes, 1);

	if (!pr_waker_init(&all->waker, error)) {
		g_free(all);
		return NULL;
	}
	all->tls = tls;
	g_mutex_init(&all->lock);
	g_cond_init(&all->changed);
	return all;
}

void pr_tls_handshakes_free(PrTlsHandshakes *all)
{
	if (!all)
		return;
	g_mutex_lock(&all->lock);
	while (all->running.length)
		cancel_one(all);
	/* Ended by the threads of those handshakes, which were just cancelled. */
	while (all->n_threads)
		g_cond_wait(&all->changed, &all->lock);
	g_mutex_unlock(&all->lock);
	g_queue_clear_full(&all->done, (GDestroyNotify)handshake_free);
	pr_waker_clear(&all->waker);
	g_mutex_clear(&all->lock);
	g_cond_clear(&all->changed);
	g_free(all);
}
