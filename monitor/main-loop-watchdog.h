/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Puts a main loop under the stall watchdog: a loop that hangs answers no client. */
#pragma once

#include "util/stall-watchdog.h"

/* Call it from the thread that runs the context's loop. watchdog NULL: stops watching. A process
 * can have one such loop only, because GLib passes no user data to the poll function. */
void pr_main_loop_watch(PrWatchdog *watchdog, GMainContext *context);
