/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "transport/control/hello-queue.h"

#include "transport/control/internal.h"
#include "transport/control/peer-limits.h"
#include "util/try-alloc.h"

typedef struct PendingHello {
	PrControl *control;
	PrPeerHost host;
	PrHello hello;
} PendingHello;

struct PrHelloQueue {
	/* Constant. */
	PrHelloHandler handler;
	void *opaque;
	GThread *thread;

	GMutex lock; /* of the rest */
	GCond changed;
	GQueue pending; /* PendingHello, oldest first */
	gboolean stopping;
};

static void pending_hello_free(PendingHello *pending)
{
	if (!pending)
		return;
	pr_control_free(pending->control);
	pr_hello_clear(&pending->hello);
	g_free(pending);
}
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PendingHello, pending_hello_free)

/* Under the lock, where there is one too many. */
static PendingHello *evict(PrHelloQueue *queue)
{
	PrPeerHost hosts[PR_HELLOS_MAX + 1];
	guint n = 0;

	for (GList *link = queue->pending.head; link; link = link->next)
		hosts[n++] = ((PendingHello *)link->data)->host;
	return g_queue_pop_nth(&queue->pending, pr_peer_pick_eviction(hosts, n));
}

void pr_hello_queue_push(PrHelloQueue *queue, PrControl *control, const PrHello *hello)
{
	PendingHello *pending = g_new0(PendingHello, 1);
	g_autoptr(PendingHello) evicted = NULL;

	pending->control = control;
	pending->hello = *hello;
	pr_peer_host(control->fd, &pending->host);
	g_mutex_lock(&queue->lock);
	g_queue_push_tail(&queue->pending, pending);
	if (queue->pending.length > PR_HELLOS_MAX)
		evicted = evict(queue);
	g_cond_signal(&queue->changed);
	g_mutex_unlock(&queue->lock);
}

/* NULL: the queue is being freed. */
static PendingHello *wait_for_hello(PrHelloQueue *queue)
{
	g_autoptr(GMutexLocker) locker G_GNUC_UNUSED = g_mutex_locker_new(&queue->lock);

	/* Ended by a HELLO, or by pr_hello_queue_free(). */
	while (!queue->stopping && g_queue_is_empty(&queue->pending))
		g_cond_wait(&queue->changed, &queue->lock);
	return queue->stopping ? NULL : g_queue_pop_head(&queue->pending);
}

/* FALSE: the queue is being freed. */
static gboolean handle_next(PrHelloQueue *queue)
{
	g_autoptr(PendingHello) pending = wait_for_hello(queue);

	if (pending)
		queue->handler(g_steal_pointer(&pending->control), &pending->hello, queue->opaque);
	return pending != NULL;
}

static gpointer hello_thread(gpointer queue)
{
	while (handle_next(queue))
		;
	return NULL;
}

PrHelloQueue *pr_hello_queue_new(PrHelloHandler handler, void *opaque, GError **error)
{
	PrHelloQueue *queue = g_new0(PrHelloQueue, 1);

	queue->handler = handler;
	queue->opaque = opaque;
	g_mutex_init(&queue->lock);
	g_cond_init(&queue->changed);
	queue->thread = pr_thread_try("hello", hello_thread, queue, error);
	if (queue->thread)
		return queue;
	pr_hello_queue_free(queue);
	return NULL;
}

void pr_hello_queue_free(PrHelloQueue *queue)
{
	if (!queue)
		return;
	g_mutex_lock(&queue->lock);
	queue->stopping = TRUE;
	g_cond_signal(&queue->changed);
	g_mutex_unlock(&queue->lock);
	if (queue->thread)
		g_thread_join(queue->thread);
	g_queue_clear_full(&queue->pending, (GDestroyNotify)pending_hello_free);
	g_mutex_clear(&queue->lock);
	g_cond_clear(&queue->changed);
	g_free(queue);
}
