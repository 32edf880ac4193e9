/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/postcopy/worker.h"

#include <errno.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "util/try-alloc.h"

gboolean pr_worker_start(PrWorker *worker, const char *name, GThreadFunc func, gpointer opaque,
			 GError **error)
{
	worker->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (worker->wake_fd < 0) {
		g_set_error(error, PR_PATH_ERROR, PR_PATH_ERROR_CONNECT,
			    "no eventfd for the %s thread: %s; raise the engine's limit of open "
			    "files (ulimit -n)",
			    name, g_strerror(errno));
		return FALSE;
	}
	g_mutex_init(&worker->lock);
	g_cond_init(&worker->changed);
	worker->thread = pr_thread_try(name, func, opaque, error);
	if (!worker->thread) {
		g_mutex_clear(&worker->lock);
		g_cond_clear(&worker->changed);
		close(worker->wake_fd);
	}
	return worker->thread != NULL;
}

void pr_worker_kick(PrWorker *worker)
{
	uint64_t one = 1;
	ssize_t written = write(worker->wake_fd, &one, sizeof(one));

	/* EAGAIN: the counter is full, so the worker is being woken anyway. */
	g_assert(written == sizeof(one) || errno == EAGAIN);
	/* After the write, so that the worker, when it sees the flag, can empty wake_fd. */
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
	close(worker->wake_fd);
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
	uint64_t count;

	/* Called in a polling loop, so without a system call in the usual case. */
	if (!__atomic_load_n(&worker->kicked, __ATOMIC_RELAXED) ||
	    !__atomic_exchange_n(&worker->kicked, FALSE, __ATOMIC_ACQ_REL))
		return FALSE;
	/* EAGAIN: an earlier call has read this kick as well; to apply the commands twice is
	 * harmless. */
	(void)!read(worker->wake_fd, &count, sizeof(count));
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
