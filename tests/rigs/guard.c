/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Between fork() and exec() of a process that may have had threads: system calls only. */
#include "tests/rigs/guard.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

/* The buffer may be too small for all children. The others are killed at the next SIGCHLD. */
static void kill_children(void)
{
	char text[4096], *at = text, *end;
	int fd = open("/proc/thread-self/children", O_RDONLY);
	ssize_t n = read(fd, text, sizeof(text) - 1);

	close(fd);
	text[n > 0 ? n : 0] = '\0';
	for (long pid; (pid = strtol(at, &end, 10)) > 0 && *end == ' '; at = end)
		kill((pid_t)pid, SIGKILL);
}

static gboolean has_children(void)
{
	pid_t ended;

	while ((ended = waitpid(-1, NULL, WNOHANG)) > 0)
		;
	return ended == 0 || errno != ECHILD;
}

/* The kernel gives the guard the children of killed processes, too. */
static void kill_on_signal(const sigset_t *signals)
{
	gboolean ending = FALSE;
	int number = 0;

	while (has_children()) {
		if (ending)
			kill_children();
		/* A child's end, the test or the end of the test sends a signal here. */
		sigwait(signals, &number);
		ending = ending || number == SIGTERM;
	}
}

void guard_daemons(gpointer data)
{
	sigset_t signals, before;

	sigemptyset(&signals);
	sigaddset(&signals, SIGTERM);
	sigaddset(&signals, SIGCHLD);
	sigprocmask(SIG_BLOCK, &signals, &before);
	setsid();
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	prctl(PR_SET_PDEATHSIG, SIGTERM);
	if (getppid() != (pid_t)GPOINTER_TO_INT(data))
		_exit(1);
	pid_t program = fork();
	if (program == 0) {
		sigprocmask(SIG_SETMASK, &before, NULL);
		return;
	}
	/* Closes the pipes to the test, so that readers of the program's output do not wait for the
	 * guard. */
	close_range(0, ~0u, 0);
	if (program > 0)
		kill_on_signal(&signals);
	_exit(0);
}
