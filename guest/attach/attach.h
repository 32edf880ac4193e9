/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The attach helper: a small privileged process that is to a guest's process from outside what the preload
 * agent is from within. It speaks the agent's protocol (guest/agent-proto.h) over a SOCK_SEQPACKET pair.
 *
 * It is forked, so that the engine can give its privileges up: it alone keeps the right to look into another
 * process. It takes no input but its socket's, serves the one process that ATTACH names, and ends when its
 * socket is closed, or when that process has ended. What it has set up in the process stays: faults wait, and
 * the next helper finds it.
 *
 * libc only, for it may be forked from a process with threads.
 */
#pragma once

#include <stdbool.h>
#include <sys/types.h>

/* Flags of the open file of a parked userfaultfd that is registered nowhere any more, and waits to be closed. */
#define PR_ATTACH_UFFD_OFF 0

/* Forks a helper. filter: it may make only the system calls that it needs. Returns the engine's end of its
 * socket, or -errno; ENOSYS: this architecture has no injector. Whoever has the descriptor closes it and then
 * waits for the process. */
int pr_attach_fork(bool filter, pid_t *ret_helper);
