/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Identifies a process by a text that can be recorded: its pid, its start time, the pid namespace
 * of that pid, and the boot id. No two processes of a host have the same text.
 */
#pragma once

#include <glib.h>
#include <sys/types.h>

#define PR_PROCESS_TEXT_BYTES 128 /* with the end mark */

/* "PID START NAMESPACE BOOT"; START is 0 where /proc does not show the process. g_free() it. */
char *pr_process_text(pid_t pid);
/* Whether that process still exists, also if it is just ending. A process of another pid namespace
 * can't be seen, and counts as gone. */
gboolean pr_process_lives(const char *text);
/* Whether a thread of that process may still touch its memory. FALSE also for a process whose end
 * waits for something else, as KVM waits for asynchronous page faults. TRUE for a process that
 * can't be seen from here. */
gboolean pr_process_uses_memory(const char *text);
