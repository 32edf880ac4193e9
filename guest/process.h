/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Which process somebody means, in a text that can be written down: pid, when it was started, the pid namespace
 * that the number is of, and the boot. No two processes of a host have the same.
 */
#pragma once

#include <glib.h>
#include <sys/types.h>

#define PR_PROCESS_TEXT_BYTES 128 /* with the end mark */

/* "PID START NAMESPACE BOOT"; START is 0 where the process can't be looked at. g_free() it. */
char *pr_process_text(pid_t pid);
/* Whether that very process is still there, in whole or as one that is just ending. One of another pid namespace
 * can't be seen: it counts as gone. */
gboolean pr_process_lives(const char *text);
/* Whether a thread of that process may still touch its memory. Not any more also while its end waits for something
 * else, as KVM does for asynchronous page faults. TRUE for a process that can't be seen from here. */
gboolean pr_process_uses_memory(const char *text);
