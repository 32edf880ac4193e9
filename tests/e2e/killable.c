/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Linked into the engine, makes one that kills itself at a point (migration/killpoint.h):
 * POSTROAD_KILL=NAME[:N] kills it when it gets there for the N-th time, with SIGKILL: nothing is tidied up.
 * POSTROAD_KILL=list prints the names. POSTROAD_FREEZE=NAME[:N] stops it there instead, with SIGSTOP: it goes on from
 * there when it is sent SIGCONT.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "migration/killpoint.h"

static PrKillPoint wanted; /* constant after the start */
static int countdown;	   /* atomic */
static gboolean freezes;   /* constant after the start */

static void freeze(void)
{
	static const char said[] = "stopped where it was to be\n";

	(void)!write(STDERR_FILENO, said, sizeof(said) - 1);
	kill(getpid(), SIGSTOP);
}

static void reached(PrKillPoint point)
{
	static const char said[] = "killed where it was to be\n";

	if (point != wanted || __atomic_sub_fetch(&countdown, 1, __ATOMIC_SEQ_CST) != 0)
		return;
	if (freezes) {
		freeze();
		return;
	}
	(void)!write(STDERR_FILENO, said, sizeof(said) - 1);
	kill(getpid(), SIGKILL);
	/* Other threads are stopped a moment later; this one does no further step. */
	for (;;)
		pause();
}

static void list_and_exit(void)
{
	for (guint i = 0; i < PR_N_KILL_POINTS; i++)
		puts(pr_kill_point_name(i));
	exit(0);
}

__attribute__((constructor)) static void hook_in(void)
{
	const char *text = getenv("POSTROAD_KILL");
	gsize length;

	freezes = !text;
	if (freezes)
		text = getenv("POSTROAD_FREEZE");
	if (!text)
		return;
	if (!strcmp(text, "list"))
		list_and_exit();
	length = strcspn(text, ":");
	for (wanted = 0; wanted < PR_N_KILL_POINTS; wanted++)
		if (strlen(pr_kill_point_name(wanted)) == length &&
		    !strncmp(text, pr_kill_point_name(wanted), length))
			break;
	if (wanted == PR_N_KILL_POINTS) {
		fprintf(stderr, "%s: there is no such point\n", text);
		exit(2);
	}
	countdown = text[length] == ':' ? atoi(text + length + 1) : 1;
	pr_kill_hook = reached;
}
