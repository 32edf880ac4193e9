/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/postcopy/worker.h"

#include "util/try-alloc.h"

gboolean pr_worker_start(PrWorker *worker, const char *name, GThreadFunc func, gpointer opaque,
			 GError **error)
{
	if (!pr_waker_init(&worker->waker, error)) {
		g_prefix_error(error, "%s thread: ", name);
		return FALSE;
	}
	g_mutex_init(&worker->lock);
	g_cond_init(&worker->changed);
	worker->thread = pr_thread_try(name, func, opaque, error);
	if (!worker->thread) {
		g_mutex_clear(&worker->lock);
		g_cond_clear(&worker->changed);
		pr_waker_clear(&worker->waker);
	}
	return worker->thread != NULL;
}

void pr_worker_kick(PrWorker *worker)
{
	pr_waker_wake(&worker->waker);
	/* After the wake-up, so that the worker, when it sees the flag, can drain the waker. */
	__atomic_store_n(&worker->kicked, TRUE, __ATOMIC_RELEASE);
}

void pr_worker_set_path(PrWorker *worker, PrDataPath *path)
{
	g_mutex_lock(&worker->lock);
	worker->wanted = path;
	pr_worker_kick(worker);
	/* Ended by the worker's next round: the caller has shut down whatever the worker may block
	 * in. */
	while (worker->current != path)
		g_cond_wait(&worker->changed, &worker->lock);
	g_mutex_unlock(&worker->lock);
}

void pr_worker_end(PrWorker *worker)
{
	g_mutex_lock(&worker->lock);
	worker->stop = TRUE;
	pr_worker_kick(worker);
	g_mutex_unlock(&worker->lock);
	g_thread_join(worker->thread);
}

void pr_worker_clear(PrWorker *worker)
{
	pr_waker_clear(&worker->waker);
	g_mutex_clear(&worker->lock);
	g_cond_clear(&worker->changed);
}

void pr_worker_stop(PrWorker *worker)
{
	pr_worker_end(worker);
	pr_worker_clear(worker);
}

gboolean pr_worker_was_kicked(PrWorker *worker)
{
	/* Called in a polling loop, so without a system call in the usual case. */
	if (!__atomic_load_n(&worker->kicked, __ATOMIC_RELAXED) ||
	    !__atomic_exchange_n(&worker->kicked, FALSE, __ATOMIC_ACQ_REL))
		return FALSE;
	/* An earlier call may have drained this kick as well; to apply the commands twice is
	 * harmless. */
	pr_waker_drain(&worker->waker);
	return TRUE;
}

gboolean pr_worker_apply(PrWorker *worker, gboolean *ret_switched)
{
	g_mutex_lock(&worker->lock);
	gboolean stop = worker->stop;
	*ret_switched = worker->current != worker->wanted;
	worker->current = worker->wanted;
	g_cond_broadcast(&worker->changed);
	g_mutex_unlock(&worker->lock);
	return !stop;
}
