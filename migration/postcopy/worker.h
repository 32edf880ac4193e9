/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A thread of the destination that uses one lane of the attached data path: a fault thread or a
 * pull thread. Other threads attach and detach paths, and kick the worker. A worker sleeps until
 * its waker, or something else that it waits for, is readable, and applies the changes after a
 * kick.
 */
#pragma once

#include "transport/transport.h"
#include "util/waker.h"

typedef struct PrWorker {
	GThread *thread;
	PrWaker waker; /* woken by a kick */
	int kicked;    /* atomic; set after the waker was woken */

	GMutex lock; /* protects the rest */
	GCond changed;
	PrDataPath *wanted;
	PrDataPath *current; /* written by the worker under lock; the worker reads it without */
	gboolean stop;
} PrWorker;

gboolean pr_worker_start(PrWorker *worker, const char *name, GThreadFunc func, gpointer opaque,
			 GError **error);
/* NULL detaches. Returns when the worker uses the new path and no longer the old one. */
void pr_worker_set_path(PrWorker *worker, PrDataPath *path);
void pr_worker_kick(PrWorker *worker);
/* Ends and joins the thread. Nobody may kick it any more. */
void pr_worker_stop(PrWorker *worker);
/* The same in two steps. Between them a kick is allowed and does nothing. */
void pr_worker_end(PrWorker *worker);
void pr_worker_clear(PrWorker *worker);

/* For the worker itself: whether it was kicked since the last call. */
gboolean pr_worker_was_kicked(PrWorker *worker);
/* For the worker itself: applies what other threads have requested. FALSE: the thread has to
 * end. */
gboolean pr_worker_apply(PrWorker *worker, gboolean *ret_switched);
