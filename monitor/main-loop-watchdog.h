/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Has the watchdog look after a main loop: one that does not come round answers nobody. */
#pragma once

#include "util/stall-watchdog.h"

/* From the thread that runs the context's loop; watchdog NULL: no more. One loop of the process: GLib's hook for the place
 * where a loop waits knows nothing but what to wait for. */
void pr_loop_watch(PrWatchdog *watchdog, GMainContext *context);
