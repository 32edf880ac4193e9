/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A process that a helper can attach to. Its main thread sleeps in ppoll(), as QEMU's does. The
 * test has it access its shared memory, each time by a new thread. The process executes the test
 * program once more.
 */
#pragma once

#include <glib.h>
#include <stdint.h>
#include <sys/types.h>

#define ATTACH_PAGE 4096u
#define ATTACH_MEMFD_PAGES                                                                         \
	64u /* in one file; its second half is a mapping of its own in the kernel */
#define ATTACH_TMPFS_PAGES  16u
#define ATTACH_MEMFD_OFFSET (4 * ATTACH_PAGE) /* in the file, of the mapping */

typedef struct AttachGuest AttachGuest;

/* To be called first in main(). Does not return in the process that is attached to. */
void attach_guest_main(int argc, char **argv);

AttachGuest *attach_guest_new(void);
/* Kills the process and frees the rig. */
void attach_guest_free(AttachGuest *guest);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(AttachGuest, attach_guest_free)

pid_t attach_guest_pid(AttachGuest *guest);
/* The addresses of the process's mappings. */
uint64_t attach_guest_memfd(AttachGuest *guest);
uint64_t attach_guest_tmpfs(AttachGuest *guest);

/* Starts an access by a new thread of the process; returns the thread. */
pid_t attach_guest_write(AttachGuest *guest, uint64_t at, uint8_t value);
pid_t attach_guest_read(AttachGuest *guest, uint64_t at);
/* The same access by the main thread, which runs no command until the access ends. */
pid_t attach_guest_write_in_main(AttachGuest *guest, uint64_t at, uint8_t value);
/* Waits for the end of the next access. Returns its thread, and the value that it has read or
 * written. */
pid_t attach_guest_done(AttachGuest *guest, uint8_t *ret_value);
/* Reads a byte, and waits for the result. */
uint8_t attach_guest_value(AttachGuest *guest, uint64_t at);
/* Waits until the thread sleeps on a page fault. */
void attach_guest_wait_faulting(AttachGuest *guest, pid_t thread);
/* The number of SIGUSR1 that its main thread has handled; the number of its descriptors. */
guint attach_guest_signals(AttachGuest *guest);
guint attach_guest_files(AttachGuest *guest);
/* Makes the main thread sleep for ever in another system call than ppoll(). */
void attach_guest_leave_poll(AttachGuest *guest);
