/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Takes capabilities, the user and unused system calls away from the engine. So an attacker who
 * takes the engine over with data from a peer or a guest can do little. There are two steps,
 * because the monitor's and the guest's sockets are opened as the user that started the engine.
 */
#pragma once

#include <glib.h>

typedef enum PrSandboxError {
	PR_SANDBOX_ERROR_USER,	 /* a fault of --user or --group; names it */
	PR_SANDBOX_ERROR_KERNEL, /* the kernel refused a step; says which */
} PrSandboxError;
#define PR_SANDBOX_ERROR pr_sandbox_error_quark()
GQuark pr_sandbox_error_quark(void);

/* The values of the options. */
typedef struct PrSandbox {
	const char *user;  /* to change to in the second step; NULL: keep the user */
	const char *group; /* its group; NULL: the user's own */
	gboolean filter;   /* deny unused system calls */
} PrSandbox;

/* Creates a directory for sandbox->user unless it exists. Call it before pr_sandbox_prepare(). */
gboolean pr_sandbox_make_dir(const PrSandbox *sandbox, const char *dir, GError **error);
/* First step, before threads start, because they inherit it: drops the capabilities that are not
 * needed, and denies new privileges. */
gboolean pr_sandbox_prepare(const PrSandbox *sandbox, GError **error);
/* Second step, for all threads, including those that run already: changes the user, loads the
 * filter. */
gboolean pr_sandbox_enter(const PrSandbox *sandbox, GError **error);
