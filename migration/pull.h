/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The pull thread: reads every page that nobody asked for yet, in bulk. Theory in pull.c. */
#pragma once

#include "migration/fault.h"
#include "migration/params.h"
#include "migration/ram.h"
#include "transport/transport.h"

typedef struct PrPullThread PrPullThread;

typedef struct PrPullHooks {
	/* About every 100 ms while a path is attached. From the pull thread. */
	void (*progress)(void *opaque);
	/* The last page has come in; any number of times. From the pull thread. */
	void (*complete)(void *opaque);
	/* The guest or the kernel failed us; once. From the pull thread, which goes on. */
	void (*broken)(const GError *error, void *opaque);
	void *opaque;
} PrPullHooks;

/* Starts the thread, with no path. All arguments outlive it. */
PrPullThread *pr_pull_start(PrRam *ram, int uffd, const PrParams *params, PrFaultThread *faults,
			    const PrPullHooks *hooks);
/* As pr_fault_attach() and pr_fault_detach(), for the bulk lane. */
void pr_pull_attach(PrPullThread *self, PrDataPath *path);
void pr_pull_detach(PrPullThread *self);
void pr_pull_stop(PrPullThread *self);
