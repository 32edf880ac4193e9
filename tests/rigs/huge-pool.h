/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The kernel's pool of huge pages, which all tests on this machine share. */
#pragma once

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

/* As in tests/e2e/harness/hugepages.py. */
#define HUGE_POOL_IN_USE "/run/lock/postroad-huge-pages-in-use"

/*
 * Call it before the first huge page is used. The lock is held until the program ends. A test that
 * counts the free pages of the pool waits for that, and this call waits for such a test. A program
 * that may not open the lock file goes on without it: the tests that count need root, so they do
 * not run then.
 */
static inline void huge_pool_use(void)
{
	int lock = open(HUGE_POOL_IN_USE, O_RDWR | O_CREAT | O_CLOEXEC, 0644);

	if (lock >= 0 && flock(lock, LOCK_SH) < 0)
		close(lock);
}
