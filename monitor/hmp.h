/* SPDX-License-Identifier: GPL-2.0-or-later */
/* HMP: command lines for people, parsed by the command table. */
#pragma once

#include <json-glib/json-glib.h>

#include "monitor/commands.h"
#include "monitor/waits.h"

typedef struct PrHmpSession PrHmpSession;

/* An empty line gives no command (NULL) and no error. */
gboolean pr_hmp_parse(const char *line, const PrCommand **ret_command, JsonObject **ret_args,
		      GError **error);
/* Runs a line. Returns NULL when the line was answered at once; else the wait for its answer. */
PrWait *pr_hmp_run(PrMonitor *monitor, const char *line, PrAnswer answer, void *opaque);
PrHmpSession *pr_hmp_session_new(PrMonitor *monitor, int in_fd, int out_fd, gboolean prompt);
void pr_hmp_session_free(PrHmpSession *session);
