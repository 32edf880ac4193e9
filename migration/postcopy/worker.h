/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A thread of the destination that uses one lane of whichever data path is attached: a fault
 * thread or a pull thread. Others attach and detach paths; the worker sleeps on wake_fd beside
 * whatever else it waits for, and takes changes over when it was kicked.
 */
#pragma once

#include "transport/transport.h"

typedef struct PrWorker {
	GThread *thread;
	int wake_fd; /* eventfd, readable when the worker was kicked */
	int kicked;  /* atomic; set after wake_fd was written */

	GMutex lock; /* protects the rest */
	GCond changed;
	PrDataPath *wanted;
	PrDataPath *current; /* written by the worker under lock; the worker reads it without */
	gboolean stop;
} PrWorker;

gboolean pr_worker_start(PrWorker *worker, const char *name, GThreadFunc func, gpointer opaque,
			 GError **error);
/* NULL detaches. Returns when the worker uses the new path, and no longer the old one. */
void pr_worker_set_path(PrWorker *worker, PrDataPath *path);
void pr_worker_kick(PrWorker *worker);
/* Ends and joins the thread; nobody kicks it any more. */
void pr_worker_stop(PrWorker *worker);
/* The same in two steps: after the first it may still be kicked, to no effect. */
void pr_worker_end(PrWorker *worker);
void pr_worker_clear(PrWorker *worker);

/* For the worker itself. Whether it was kicked since the last call. */
gboolean pr_worker_was_kicked(PrWorker *worker);
/* Takes over what the others want. FALSE: the thread is to end. */
gboolean pr_worker_obey(PrWorker *worker, gboolean *ret_switched);
