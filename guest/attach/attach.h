/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The attach helper: a small privileged process that does from outside of a guest's process what
 * the preload agent does from within. It speaks the agent's protocol (guest/agent-proto.h) over a
 * SOCK_SEQPACKET pair.
 *
 * The engine forks the helper, and then gives its own privileges up. Only the helper keeps the
 * right to access another process. It reads no input but its socket, and serves the one process
 * that ATTACH names. It ends when its socket is closed, or when that process has ended. The fault
 * mode, the fence and the state memfd that it has set up stay in the process: faults wait, and the
 * next helper finds all of it.
 *
 * libc only, as it may be forked from a process with threads.
 */
#pragma once

#include <stdbool.h>
#include <sys/types.h>

/* The flags of the open file of a parked userfaultfd that is unregistered, and has to be closed. */
#define PR_ATTACH_UFFD_OFF 0

/* Forks a helper. filter: it may make only the system calls that it needs. Returns the engine's end
 * of its socket, or -errno; ENOSYS: this architecture has no injector. The caller closes the
 * descriptor and then waits for the process. */
int pr_attach_fork(bool filter, pid_t *ret_helper);
