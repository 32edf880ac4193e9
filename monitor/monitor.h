/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The monitor: the interface for operators and management software. One command table (commands.c)
 * serves QMP (JSON over a unix socket, as QEMU speaks it) and HMP (lines for people).
 *
 * It belongs to one main context, and all calls are made from that context's thread, except
 * pr_monitor_on_state() and pr_monitor_on_path(). It touches no guest memory and never blocks, so
 * it answers even when another part of the engine hangs.
 */
#pragma once

#include <glib.h>

#include "migration/core/params.h"
#include "migration/migration.h"
#include "monitor/waits.h"

/* A client gave the command `quit`; its answer is queued. */
typedef void (*PrMonitorQuit)(void *opaque);

/* params is not owned and outlives the monitor. */
PrMonitor *pr_monitor_new(PrParams *params, GMainContext *context, PrMonitorQuit on_quit,
			  void *opaque);
/* Call it before the first client. The migration is not owned; it was created with
 * pr_monitor_hooks(). */
void pr_monitor_attach(PrMonitor *monitor, PrMigration *migration);
/* PrMigrationHooks, from any thread: the events are queued, and reach the clients in order. */
void pr_monitor_on_state(PrState state, const char *reason, void *monitor);
void pr_monitor_on_path(const char *uri, PrPathState state, const char *device, const char *reason,
			void *monitor);
PrMigrationHooks pr_monitor_hooks(PrMonitor *monitor);

/* Serves QMP on a unix socket, mode 0600. A socket file whose server has ended is replaced. One
 * that is served, or a file that is not a socket, is an error. */
gboolean pr_monitor_listen(PrMonitor *monitor, const char *path, GError **error);
/* Serves HMP on a pair of descriptors (taken; non-blocking), with a prompt or without. */
void pr_monitor_hmp(PrMonitor *monitor, int in_fd, int out_fd, gboolean prompt);

/* Drops all clients and stops listening. The hooks may still be called. */
void pr_monitor_close(PrMonitor *monitor);
/* Free the migration first. */
void pr_monitor_free(PrMonitor *monitor);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrMonitor, pr_monitor_free)
