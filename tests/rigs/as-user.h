/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Runs something as another user, in a thread: the kernel's credentials are of threads. Needs root.
 */
#pragma once

#include <glib.h>
#include <stdbool.h>
#include <sys/syscall.h>
#include <unistd.h>

#define NOBODY 65534

typedef struct AsUser {
	uid_t uid;
	void (*run)(void *opaque);
	void *opaque;
} AsUser;

static inline gpointer as_user_main(gpointer opaque)
{
	const AsUser *as = opaque;

	/* libc's setresuid() would change all threads. */
	g_assert(syscall(SYS_setresgid, as->uid, as->uid, as->uid) == 0);
	g_assert(syscall(SYS_setgroups, 0, NULL) == 0);
	g_assert(syscall(SYS_setresuid, as->uid, as->uid, as->uid) == 0);
	g_assert(geteuid() == as->uid);
	as->run(as->opaque);
	return NULL;
}

static inline void as_user(uid_t uid, void (*run)(void *opaque), void *opaque)
{
	AsUser as = {uid, run, opaque};

	g_thread_join(g_thread_new("as-user", as_user_main, &as));
}
