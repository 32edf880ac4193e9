/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A process that a helper can attach to: its main thread rests in ppoll(), as QEMU's does, and for each access to its
 * shared memory that it is asked for it has a thread. It is this very program, executed once more.
 */
#pragma once

#include <glib.h>
#include <stdint.h>
#include <sys/types.h>

#define ATTACH_PAGE 4096u
#define ATTACH_MEMFD_PAGES                                                                         \
	64u /* in one file, whose second half the kernel keeps as a mapping of its own */
#define ATTACH_TMPFS_PAGES  16u
#define ATTACH_MEMFD_OFFSET (4 * ATTACH_PAGE) /* in the file, of the mapping */

typedef struct AttachGuest AttachGuest;

/* First in main(): does not return in that process. */
void attach_guest_main(int argc, char **argv);

AttachGuest *attach_guest_new(void);
/* Kills it. */
void attach_guest_free(AttachGuest *guest);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(AttachGuest, attach_guest_free)

pid_t attach_guest_pid(AttachGuest *guest);
/* Where it has them mapped. */
uint64_t attach_guest_memfd(AttachGuest *guest);
uint64_t attach_guest_tmpfs(AttachGuest *guest);

/* An access by a thread of its own; returns the thread. */
pid_t attach_guest_write(AttachGuest *guest, uint64_t at, uint8_t value);
pid_t attach_guest_read(AttachGuest *guest, uint64_t at);
/* The same by its main thread, which can't do anything else meanwhile. */
pid_t attach_guest_write_in_main(AttachGuest *guest, uint64_t at, uint8_t value);
/* Waits for the end of one, whichever comes first; returns its thread, and what it has read or written. */
pid_t attach_guest_done(AttachGuest *guest, uint8_t *ret_value);
/* The same for a read from beginning to end. */
uint8_t attach_guest_value(AttachGuest *guest, uint64_t at);
/* Waits until the thread sleeps on a page fault. */
void attach_guest_wait_faulting(AttachGuest *guest, pid_t thread);
/* How many SIGUSR1 its main thread has handled; how many descriptors it has. */
guint attach_guest_signals(AttachGuest *guest);
guint attach_guest_files(AttachGuest *guest);
/* Its main thread sleeps elsewhere, for good. */
void attach_guest_leave_poll(AttachGuest *guest);
