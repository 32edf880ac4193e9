/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The program's log: GLib messages, one line each, with time and level. Logging never waits
 * (log.c). */
#pragma once

#include <glib.h>

#define PR_LOG_FINAL_FLUSH_MS 1000 /* the end of the program waits that long for the log */

/* name: error, warning, info or debug. It is the least important level that is logged. */
gboolean pr_log_parse_level(const char *name, GLogLevelFlags *ret);
/* Call it once, before other threads start. The log is written to fd, which may block. */
gboolean pr_log_start(GLogLevelFlags level, int fd, GError **error);
/* Waits until every queued line is written, or has failed to be. Returns FALSE after the
 * timeout. */
gboolean pr_log_flush(guint timeout_ms);
/* Logs the program's last line as it is, and waits PR_LOG_FINAL_FLUSH_MS for the log to be
 * written. */
void pr_log_final(const char *format, ...) G_GNUC_PRINTF(1, 2);
