/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The program's log: GLib messages, one line each, with time and level. Logging never waits (log.c). */
#pragma once

#include <glib.h>

/* error, warning, info or debug: the least important level that is shown. */
gboolean pr_log_parse_level(const char *name, GLogLevelFlags *ret);
/* Once, before threads are started: the writer is the process's. fd: where to; it may block. */
gboolean pr_log_start(GLogLevelFlags level, int fd, GError **error);
/* Waits until all that was logged is written (or could not be). FALSE: not in time. */
gboolean pr_log_flush(guint timeout_ms);
/* What the program says as it ends: a line as it is, and then a moment for all to be written. */
void pr_log_last_words(const char *format, ...) G_GNUC_PRINTF(1, 2);
