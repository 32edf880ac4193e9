/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * With this file linked in, the engine kills itself at a crash point
 * (migration/core/crash-point.h), or its attach helper does (guest/attach/crash-point.h).
 * POSTROAD_KILL=NAME[:N] kills the process with SIGKILL when it reaches the point the N-th time.
 * POSTROAD_KILL=list prints the names of the engine's points, list-attach those of the helper's.
 * POSTROAD_FREEZE=NAME[:N] stops the process there with SIGSTOP instead; it continues at SIGCONT.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "guest/attach/crash-point.h"
#include "migration/core/crash-point.h"

static int wanted = -1;	       /* constant after the start */
static int wanted_helper = -1; /* constant after the start */
static int countdown;	       /* atomic; the helper has its own */
static gboolean freezes;       /* constant after the start */

static void freeze(void)
{
	static const char said[] = "stopped at its crash point\n";

	(void)!write(STDERR_FILENO, said, sizeof(said) - 1);
	/* raise() signals this very thread, so that it does no further step. */
	raise(SIGSTOP);
}

static void die(void)
{
	static const char said[] = "killed at its crash point\n";

	if (__atomic_sub_fetch(&countdown, 1, __ATOMIC_SEQ_CST) != 0)
		return;
	if (freezes) {
		freeze();
		return;
	}
	(void)!write(STDERR_FILENO, said, sizeof(said) - 1);
	kill(getpid(), SIGKILL);
	/* The kernel ends all threads a moment later. Until then this one does no further step. */
	for (;;)
		pause();
}

static void reached(PrCrashPoint point)
{
	if ((int)point == wanted)
		die();
}

static void reached_in_helper(PrAttachCrashPoint point)
{
	if ((int)point == wanted_helper)
		die();
}

static const char *engine_name(int point)
{
	return point < PR_N_CRASH_POINTS ? pr_crash_point_name(point) : NULL;
}

static const char *helper_name(int point)
{
	return point < PR_ATTACH_N_CRASH_POINTS ? pr_attach_crash_point_name(point) : NULL;
}

static void list_and_exit(const char *(*name)(int point))
{
	for (int i = 0; name(i); i++)
		puts(name(i));
	exit(0);
}

/* Returns -1 if no point has this name. */
static int find(const char *(*name)(int point), const char *text, gsize length)
{
	for (int i = 0; name(i); i++)
		if (strlen(name(i)) == length && !strncmp(text, name(i), length))
			return i;
	return -1;
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
		list_and_exit(engine_name);
	if (!strcmp(text, "list-attach"))
		list_and_exit(helper_name);
	length = strcspn(text, ":");
	wanted = find(engine_name, text, length);
	wanted_helper = find(helper_name, text, length);
	if (wanted < 0 && wanted_helper < 0) {
		fprintf(stderr, "%s: there is no such crash point\n", text);
		exit(2);
	}
	countdown = text[length] == ':' ? atoi(text + length + 1) : 1;
	pr_crash_hook = reached;
	pr_attach_crash_hook = reached_in_helper;
}
