/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The helper's child that allocates pages (guest/allocator.h). The helper forks it before it gives
 * privileges up. The child drops all privileges, and waits for the engine's requests. The helper
 * moves it into the memory cgroup of the guest's process, by writing to cgroup.procs there. It also
 * gives it a pidfd of that process: a child that outlives the guest would keep the guest's cgroup
 * alive.
 *
 * With cgroup v2 the main thread may be in a threaded cgroup, as libvirt makes them. Memory belongs
 * to a domain cgroup above it then, which accepts processes.
 *
 * Where the cgroup has no room left the kernel kills a process in it. The child raises its OOM
 * score, so that the kernel kills it and not the guest. The engine then reports this, and goes on
 * when there is room. But the pages that the child has allocated stay, so the cgroup stays full.
 * The next page that the VMM needs would have the VMM killed. So the child holds a reserve: memory
 * of its own, charged to that cgroup, which its death frees.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "guest/allocator.h"
#include "guest/attach/internal.h"

#define PATH_BYTES 4096
#define TEXT_BYTES 8192
#define RESERVE	   (16u * 1024 * 1024) /* bytes */

static void write_file(const char *name, const char *text)
{
	int fd = open(name, O_WRONLY | O_CLOEXEC);

	if (fd < 0)
		return;
	(void)!write(fd, text, strlen(text));
	close(fd);
}

/* Reserves address space only. It is locked where that is permitted, as the death of the child
 * frees no swapped memory. */
static char *map_reserve(void)
{
	char *reserve = mmap(NULL, RESERVE, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (reserve == MAP_FAILED)
		return NULL;
	(void)mlock2(reserve, RESERVE, MLOCK_ONFAULT);
	return reserve;
}

/* Waits for the first request. By then the child is in the guest's cgroup, which is charged. */
static void fill_reserve(int socket, char *reserve)
{
	struct pollfd first = {.fd = socket, .events = POLLIN};

	/* Ended by a request, or by the end of the engine. */
	while (poll(&first, 1, -1) < 0 && errno == EINTR)
		;
	if (first.revents == POLLIN)
		memset(reserve, 1, RESERVE);
}

static void run_child(int socket, bool filter)
{
	char *reserve = map_reserve();

	write_file("/proc/self/oom_score_adj", "1000");
	if (reserve && attach_confine_allocator(socket, filter)) {
		fill_reserve(socket, reserve);
		pr_allocator_serve(socket);
	}
	_exit(0);
}

void attach_allocator_fork(AttachAllocator *allocator, bool filter)
{
	int pair[2];

	*allocator = (AttachAllocator){.socket = -1};
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
		return;
	allocator->pid = fork();
	if (allocator->pid == 0)
		run_child(pair[1], filter);
	close(pair[1]);
	allocator->socket = pair[0];
	if (allocator->pid < 0)
		agent_close_fd(&allocator->socket);
}

/* Reads a file of /proc line by line, as it may be of any length. A line that does not fit is
 * cut. */
typedef struct Lines {
	int fd;
	size_t at, n;
	char buffer[4096];
} Lines;

static bool next_line(Lines *lines, char *ret, size_t bytes)
{
	size_t used = 0;

	for (;;) {
		if (lines->at == lines->n) {
			ssize_t n = read(lines->fd, lines->buffer, sizeof(lines->buffer));

			if (n < 0 && errno == EINTR)
				continue;
			if (n <= 0)
				return false;
			lines->at = 0;
			lines->n = (size_t)n;
		}
		char c = lines->buffer[lines->at++];

		if (c == '\n')
			break;
		if (used + 1 < bytes)
			ret[used++] = c;
	}
	ret[used] = '\0';
	return true;
}

/* Cuts the next word off. */
static char *next_word(char **at)
{
	char *found = *at + strspn(*at, " ");
	size_t length = strcspn(found, " ");

	*at = found + length + (found[length] == ' ');
	found[length] = '\0';
	return found;
}

static bool has_option(const char *options, const char *option)
{
	size_t length = strlen(option);

	for (const char *at = options; at; at = strchr(at, ',')) {
		at += *at == ',';
		if (!strncmp(at, option, length) && (!at[length] || at[length] == ','))
			return true;
	}
	return false;
}

/* A line of mountinfo: "ID PARENT DEVICE ROOT WHERE OPTIONS … - KIND SOURCE OPTIONS" */
static bool is_hierarchy(char *line, bool v1, char **ret_root, char **ret_where)
{
	char *behind = strstr(line, " - ");
	const char *kind;

	if (!behind)
		return false;
	*behind = '\0';
	behind += 3;
	kind = next_word(&behind);
	next_word(&behind);
	if (strcmp(kind, v1 ? "cgroup" : "cgroup2") || (v1 && !has_option(behind, "memory")))
		return false;
	for (int i = 0; i < 3; i++)
		next_word(&line);
	*ret_root = next_word(&line);
	*ret_where = next_word(&line);
	return true;
}

/* The path of a cgroup in this process's file system; *ret_above: the length of the mount point in
 * it. */
static bool locate_cgroup(const char *path, bool v1, char *ret, size_t bytes, size_t *ret_above)
{
	Lines lines = {.fd = open("/proc/self/mountinfo", O_RDONLY | O_CLOEXEC)};
	char line[PATH_BYTES], *root, *where;
	bool found = false;

	if (lines.fd < 0)
		return false;
	while (!found && next_line(&lines, line, sizeof(line))) {
		if (!is_hierarchy(line, v1, &root, &where))
			continue;
		size_t length = strcmp(root, "/") ? strlen(root) : 0;
		found = !strncmp(path, root, length) && (!path[length] || path[length] == '/') &&
			(size_t)snprintf(ret, bytes, "%s%s", where, path + length) < bytes;
		*ret_above = strlen(where);
	}
	close(lines.fd);
	return found;
}

/* Returns 0 or an errno. */
static int write_pid(const char *group, pid_t pid)
{
	char name[PATH_BYTES + 32], text[16];
	int fd, code = 0, length = snprintf(text, sizeof(text), "%d", (int)pid);

	snprintf(name, sizeof(name), "%s/cgroup.procs", group);
	fd = open(name, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return errno;
	if (write(fd, text, (size_t)length) != length)
		code = errno;
	close(fd);
	return code;
}

static bool join_cgroup(pid_t pid, const AttachTarget *target, AgentResult *result)
{
	char text[TEXT_BYTES], path[PATH_BYTES], group[PATH_BYTES];
	size_t above;
	int code = ENOENT;
	bool v1;

	if (!attach_target_read(target, "cgroup", text, sizeof(text)) ||
	    !pr_memory_cgroup(text, path, sizeof(path), &v1))
		return agent_fail(result, PR_AGENT_UNSUPPORTED,
				  "process %d has no memory cgroup that can be seen",
				  (int)target->pid);
	if (locate_cgroup(path, v1, group, sizeof(group), &above)) {
		code = write_pid(group, pid);
		/* EOPNOTSUPP: a threaded cgroup. The domain is above it. */
		for (char *slash; code == EOPNOTSUPP && (slash = strrchr(group, '/')) &&
				  (size_t)(slash - group) > above;
		     code = write_pid(group, pid))
			*slash = '\0';
	}
	if (!code)
		return true;
	return agent_fail(result,
			  code == EACCES || code == EPERM ? PR_AGENT_PERMISSION : PR_AGENT_FAILED,
			  "the memory cgroup of process %d, %s, can't be joined: %s",
			  (int)target->pid, path, strerror(code));
}

int attach_allocator(AttachAllocator *allocator, const AttachTarget *target, AgentResult *result)
{
	const PrAllocatorRequest end = {.op = PR_ALLOCATOR_END};
	int socket = allocator->socket;

	if (pr_memory_cgroup_is_shared(getpid(), target->pid))
		return -1;
	if (socket < 0) {
		agent_fail(result, PR_AGENT_FAILED,
			   "there is no process to allocate pages (any more)");
		return -1;
	}
	if (!join_cgroup(allocator->pid, target, result))
		return -1;
	if (!pr_allocator_send(socket, &end, target->pidfd)) {
		agent_fail(result, PR_AGENT_FAILED, "the process to allocate pages has ended: %s",
			   strerror(errno));
		return -1;
	}
	allocator->socket = -1;
	return socket;
}
