/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A guard for programs that become daemons. Those leave their parents, their session and their process group, so nothing that
 * ends a test, from inside or outside, ends them. They cannot leave a child subreaper: the guard is one. It executes the
 * program as its child, gets what the program leaves behind, and kills all of it when it is sent SIGTERM, or when the
 * thread that has started it has ended, whatever has ended it. It has a session of its own, so that what is sent to the test's
 * process group does not meet it, and ends by itself when it has no child any more.
 */
#pragma once

#include <glib.h>

/* A GSpawnChildSetupFunc: the child becomes the guard, and a child of it goes on to execute the program. data: getpid() of the
 * test, as a pointer. */
void guard_daemons(gpointer data);
