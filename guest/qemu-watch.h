/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * * The watch: once the guest may run elsewhere, QMP's events show whether QEMU lets it run here,
 * and the watch stops it at once. A thread of its own makes the QMP calls, as they may hang.
 */
#pragma once

#include "guest/guest.h"
#include "guest/qmp.h"

typedef struct PrQemuWatch PrQemuWatch;

/* Returns the connection to QMP, and makes it at the first call; NULL: see error. */
typedef PrQmp *(*PrQemuWatchQmp)(void *opaque, GError **error);

PrQemuWatch *pr_qemu_watch_new(PrQemuWatchQmp qmp, void *opaque);
void pr_qemu_watch_free(PrQemuWatch *watch);
/* Starts the watch, unless it has started. It asks first whether the guest runs already. */
gboolean pr_qemu_watch_begin(PrQemuWatch *watch, GError **error);
/* Waits for a call in progress, which QMP's timeout bounds. Harmless without a watch. */
void pr_qemu_watch_end(PrQemuWatch *watch);
/* An event of QMP has come. Called by the QMP client's reader thread; makes no calls. */
void pr_qemu_watch_event(PrQemuWatch *watch, const char *name);
/* As PrGuestOps.on_run_again. */
void pr_qemu_watch_observe(PrQemuWatch *watch, PrGuestRanAgain ran_again, void *opaque);
