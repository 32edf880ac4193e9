/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the engine gives up, so that whoever takes it over through what a peer or a guest sends has little: its
 * capabilities, its user, and the system calls that it never needs. In two steps, because the guest's sockets and the
 * ports it listens on are opened with what it was started with.
 */
#pragma once

#include <glib.h>

typedef enum PrSandboxError {
	PR_SANDBOX_ERROR_USER,	 /* --user, --group */
	PR_SANDBOX_ERROR_KERNEL, /* the kernel refuses; says what */
} PrSandboxError;
#define PR_SANDBOX_ERROR pr_sandbox_error_quark()
GQuark pr_sandbox_error_quark(void);

/* What the options say. */
typedef struct PrSandbox {
	const char *user;  /* to become in the end; NULL: stay who we are */
	const char *group; /* its group; NULL: the user's own */
	gboolean filter;   /* system calls */
} PrSandbox;

/* Makes a directory for the user to become, if there is none. Before pr_sandbox_prepare(). */
gboolean pr_sandbox_make_dir(const PrSandbox *sandbox, const char *dir, GError **error);
/* Before there are threads, which inherit it: no new privileges, and no capability but those that are needed. */
gboolean pr_sandbox_prepare(const PrSandbox *sandbox, GError **error);
/* When all is set up: the rest, for all threads, those that run already, too. */
gboolean pr_sandbox_enter(const PrSandbox *sandbox, GError **error);
