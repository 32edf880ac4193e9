/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The engine's state memfd is parked in the process, where the next helper finds it by its name. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "guest/attach/internal.h"
#include "guest/attach/crash-point.h"

#define STATE_MEMFD_MAX 16

typedef struct Search {
	const AttachTarget *target;
	int found[STATE_MEMFD_MAX];
	unsigned n;
} Search;

static bool is_state(const AttachTarget *target, int fd)
{
	static const char wanted[] = "/memfd:" PR_AGENT_STATE_NAME " (deleted)";
	char name[32], text[64];
	ssize_t n;

	snprintf(name, sizeof(name), "fd/%d", fd);
	n = readlinkat(target->proc_fd, name, text, sizeof(text));
	return n == sizeof(wanted) - 1 && !memcmp(text, wanted, n);
}

static bool note_state_fd(int fd, void *opaque)
{
	Search *search = opaque;

	if (is_state(search->target, fd))
		search->found[search->n++] = fd;
	return search->n < STATE_MEMFD_MAX;
}

/* Closes the old one first: a helper that dies in between leaves none, as before any migration. */
static bool replace(AttachStop *stop, const Search *search, int fd)
{
	for (unsigned i = 0; i < search->n; i++) {
		if (!attach_close_there(stop, search->found[i]))
			return false;
		pr_attach_crash_point(PR_ATTACH_CRASH_OLD_STATE_CLOSED);
	}
	return fd < 0 || attach_push(stop, fd) >= 0;
}

bool attach_store_state_fd(AttachTarget *target, int fd, AgentResult *result)
{
	Search search = {.target = target};
	AttachStop stop;
	bool ok;

	if (!attach_each_fd(target, note_state_fd, &search))
		return attach_fail_access(target, result, "the list of open files");
	if (fd < 0 && !search.n)
		return true;
	if (!attach_stop(&stop, target, result))
		return false;
	ok = replace(&stop, &search, fd);
	attach_resume(&stop);
	return ok;
}

int attach_fetch_state(const AttachTarget *target, AgentResult *result)
{
	Search search = {.target = target};
	int fd;

	if (!attach_each_fd(target, note_state_fd, &search)) {
		attach_fail_access(target, result, "the list of open files");
		return -1;
	}
	if (!search.n)
		return -1;
	fd = attach_target_fd(target, search.found[search.n - 1]);
	if (fd < 0)
		attach_fail_access(target, result, "taking the state memfd");
	return fd;
}
