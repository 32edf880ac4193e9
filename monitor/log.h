/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The program's log: GLib messages on standard error, one line each, with time and level. */
#pragma once

#include <glib.h>

/* error, warning, info or debug: the least important level that is shown. */
gboolean pr_log_parse_level(const char *name, GLogLevelFlags *ret);
/* Once, before threads are started: the writer is the process's. */
void pr_log_start(GLogLevelFlags level);
