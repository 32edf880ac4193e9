/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A guard for programs that become daemons. Daemons leave their parent, their session and their
 * process group, so the end of a test does not end them. They cannot leave a child subreaper, which
 * the guard is. The guard executes the program as its child, and becomes the parent of all
 * processes that the program leaves behind. It kills them on SIGTERM, or when the thread that has
 * started it ends for any reason. It has a session of its own, so that signals to the test's
 * process group do not reach it. It ends by itself when it has no child any more.
 */
#pragma once

#include <glib.h>

/* A GSpawnChildSetupFunc. The child becomes the guard, and forks a child that executes the program.
 * data: getpid() of the test, as a pointer. */
void guard_daemons(gpointer data);
