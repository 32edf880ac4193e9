/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Commands that listen may look up a name first, and a name server that does not answer takes
 * seconds. So each of them runs in a thread of its own. The main loop answers it when it has ended,
 * and serves the other clients meanwhile. The command also runs to its end when its client has
 * left.
 */
#pragma once

#include <json-glib/json-glib.h>

#include "monitor/commands.h"
#include "monitor/waits.h"

typedef struct PrAsyncCommand PrAsyncCommand;

/* Starts a command that has listen(), and answers when it has ended. NULL with an error: it was not
 * started. */
PrWait *pr_async_command_start(PrMonitor *monitor, const PrCommand *command, JsonObject *args,
			       PrAnswer answer, void *opaque, GError **error);
/* Cancels its name look-ups, joins its thread and frees it, without an answer. */
void pr_async_command_free(PrAsyncCommand *async);
