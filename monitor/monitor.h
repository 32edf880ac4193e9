/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The monitor: what an operator and management software talk to. One command table (commands.c)
 * serves QMP (JSON over a unix socket, as QEMU speaks it) and HMP (lines for people).
 *
 * It lives in one main context and all calls are made from its thread, except pr_monitor_on_state(). It
 * touches no guest memory and blocks on nothing, so it answers whatever else is stuck.
 */
#pragma once

#include <glib.h>

#include "migration/migration.h"
#include "migration/core/params.h"

typedef enum PrMonitorError {
	PR_MONITOR_ERROR_SOCKET, /* the QMP socket can't be made; names its path and why */
} PrMonitorError;
#define PR_MONITOR_ERROR pr_monitor_error_quark()
GQuark pr_monitor_error_quark(void);

typedef struct PrMonitor PrMonitor;
/* Somebody said `quit`; the answer is on its way. */
typedef void (*PrMonitorQuit)(void *opaque);

/* params is not owned and outlives the monitor. */
PrMonitor *pr_monitor_new(PrParams *params, GMainContext *context, PrMonitorQuit on_quit,
			  void *opaque);
/* Before the first client. The migration is not owned; it was made with pr_monitor_hooks(). */
void pr_monitor_attach(PrMonitor *monitor, PrMigration *migration);
/* PrMigrationHooks, from any thread: the news is queued, and reaches the clients in order. */
void pr_monitor_on_state(PrState state, const char *reason, void *monitor);
void pr_monitor_on_path(const char *uri, PrPathState state, const char *device, const char *reason,
			void *monitor);
PrMigrationHooks pr_monitor_hooks(PrMonitor *monitor);

/* Serves QMP on a unix socket, mode 0600. A stale socket file is replaced; a live one, or a file that
 * is no socket, is refused. */
gboolean pr_monitor_listen(PrMonitor *monitor, const char *path, GError **error);
/* Serves HMP on a pair of descriptors (taken; non-blocking), with a prompt or without. */
void pr_monitor_hmp(PrMonitor *monitor, int in_fd, int out_fd, gboolean prompt);

/* Drops all clients and stops listening; pr_monitor_on_state() may still be called. */
void pr_monitor_close(PrMonitor *monitor);
/* After the migration is freed. */
void pr_monitor_free(PrMonitor *monitor);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrMonitor, pr_monitor_free)
