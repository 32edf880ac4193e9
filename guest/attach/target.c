/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Access to the process that is served, and the errors that say why it was refused. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "guest/attach/internal.h"

#define STATUS_BYTES 8192
/* a helper of an engine that was just killed keeps the lock for a moment */
#define LOCK_MS	      3000
#define LOCK_CHECK_MS 5

int64_t attach_now(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

void attach_sleep(int ms)
{
	const struct timespec time = {.tv_nsec = ms * 1000000L};

	nanosleep(&time, NULL);
}

static bool read_all(int fd, char *text, size_t bytes)
{
	size_t used = 0;
	ssize_t n;

	while (used + 1 < bytes) {
		n = read(fd, text + used, bytes - 1 - used);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			break;
		used += n;
	}
	text[used] = '\0';
	return used > 0;
}

static bool read_file_at(int dir, const char *name, char *text, size_t bytes)
{
	int fd = openat(dir, name, O_RDONLY | O_CLOEXEC);
	bool ok;

	if (fd < 0)
		return false;
	ok = read_all(fd, text, bytes);
	close(fd);
	return ok;
}

bool attach_target_read(const AttachTarget *target, const char *name, char *text, size_t bytes)
{
	return read_file_at(target->proc_fd, name, text, bytes);
}

const char *attach_field(const char *text, const char *name)
{
	size_t length = strlen(name);

	for (const char *at = text; at; at = strchr(at, '\n')) {
		at += *at == '\n';
		if (!strncmp(at, name, length) && at[length] == ':')
			return at + length + 1 + strspn(at + length + 1, "\t ");
	}
	return NULL;
}

static pid_t pid_of(int pidfd)
{
	char name[64], text[512];
	const char *pid;

	snprintf(name, sizeof(name), "/proc/self/fdinfo/%d", pidfd);
	if (!read_file_at(AT_FDCWD, name, text, sizeof(text)))
		return 0;
	pid = attach_field(text, "Pid");
	return pid ? atoi(pid) : 0;
}

bool attach_target_gone(const AttachTarget *target)
{
	struct pollfd end = {.fd = target->pidfd, .events = POLLIN};

	return poll(&end, 1, 0) > 0;
}

bool attach_target_open(AttachTarget *target, int pidfd, AgentResult *result)
{
	char name[64];

	target->pidfd = pidfd;
	target->pid = pid_of(pidfd);
	if (target->pid <= 0)
		return agent_fail(result, PR_AGENT_FAILED, "the guest's process is gone");
	snprintf(name, sizeof(name), "/proc/%d", (int)target->pid);
	target->proc_fd = open(name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	/* As the process still lives, this is its directory, and not that of a later process with
	 * the same pid. */
	if (target->proc_fd < 0 || attach_target_gone(target))
		return agent_fail(result, PR_AGENT_FAILED, "process %d is gone", (int)target->pid);
	return true;
}

char attach_target_state(const AttachTarget *target)
{
	char text[1024];
	const char *behind;

	if (!attach_target_read(target, "stat", text, sizeof(text)))
		return 0;
	behind = strrchr(text, ')');
	return behind && behind[1] ? behind[2] : 0;
}

/* The process that traces it; 0: none but this one. */
static pid_t tracer_of(const AttachTarget *target, char *name, size_t bytes)
{
	char text[STATUS_BYTES], path[64];
	const char *tracer;
	pid_t pid;

	if (!attach_target_read(target, "status", text, sizeof(text)))
		return 0;
	tracer = attach_field(text, "TracerPid");
	pid = tracer ? atoi(tracer) : 0;
	snprintf(path, sizeof(path), "/proc/%d/comm", (int)pid);
	if (!pid || !read_file_at(AT_FDCWD, path, name, bytes))
		snprintf(name, bytes, "?");
	name[strcspn(name, "\n")] = '\0';
	return pid == getpid() ? 0 : pid;
}

static int yama_scope(void)
{
	char text[16];

	if (!read_file_at(AT_FDCWD, "/proc/sys/kernel/yama/ptrace_scope", text, sizeof(text)))
		return 0;
	return atoi(text);
}

#define WAY_OUT                                                                                    \
	"or preload libpostroad-agent.so into QEMU and add agent=PATH, which needs no privilege"

bool attach_is_traced(const AttachTarget *target)
{
	char name[32];

	return tracer_of(target, name, sizeof(name)) != 0;
}

bool attach_fail_access(const AttachTarget *target, AgentResult *result, const char *what)
{
	int code = errno, scope = yama_scope(), pid = target->pid;
	char name[64];
	pid_t tracer;

	if (code == ESRCH || attach_target_gone(target))
		return agent_fail(result, PR_AGENT_FAILED, "process %d is gone", pid);
	if (code != EPERM && code != EACCES)
		return agent_fail(result, PR_AGENT_FAILED, "%s of process %d: %s", what, pid,
				  strerror(code));
	tracer = tracer_of(target, name, sizeof(name));
	if (tracer)
		return agent_fail(
			result, PR_AGENT_PERMISSION,
			"process %d is traced by process %d (%s), a debugger or the like; "
			"end that one first",
			pid, (int)tracer, name);
	if (scope >= 3)
		return agent_fail(
			result, PR_AGENT_PERMISSION,
			"%s of process %d: refused, since kernel.yama.ptrace_scope is %d, which "
			"only a reboot changes; preload libpostroad-agent.so into QEMU and add "
			"agent=PATH",
			what, pid, scope);
	return agent_fail(
		result, PR_AGENT_PERMISSION,
		"%s of process %d: refused; start the engine as root with the "
		"CAP_SYS_PTRACE and CAP_DAC_OVERRIDE%s, " WAY_OUT,
		what, pid,
		scope ? " (kernel.yama.ptrace_scope is set, so being QEMU's user is not enough)"
		      : "");
}

/* Locks /proc/PID/auxv. Only a process with the right to ptrace the target can open it, so that no
 * other user can take the lock. The engine gets a duplicate, so the kernel unlocks when both helper
 * and engine are gone. */
bool attach_target_lock(AttachTarget *target, AgentResult *result)
{
	int64_t deadline = attach_now() + LOCK_MS;

	if (target->lock_fd >= 0)
		return true;
	target->lock_fd = openat(target->proc_fd, "auxv", O_RDONLY | O_CLOEXEC);
	if (target->lock_fd < 0)
		return attach_fail_access(target, result, "attaching to the memory");
	while (flock(target->lock_fd, LOCK_EX | LOCK_NB) < 0) {
		if (errno == EINTR || (errno == EWOULDBLOCK && attach_now() < deadline)) {
			attach_sleep(LOCK_CHECK_MS); /* between two checks of the condition */
			continue;
		}
		agent_close_fd(&target->lock_fd);
		return agent_fail(result, PR_AGENT_BUSY, "another engine is attached");
	}
	return true;
}

int attach_target_memory(const AttachTarget *target)
{
	return openat(target->proc_fd, "mem", O_RDWR | O_CLOEXEC);
}

int attach_target_fd(const AttachTarget *target, int fd)
{
	return (int)syscall(SYS_pidfd_getfd, target->pidfd, fd, 0);
}

/* getdents64(2) instead of readdir(), which allocates. */
struct entry {
	uint64_t ino;
	int64_t off;
	unsigned short length;
	unsigned char type;
	char name[];
};

static bool visit_entries(int dir, bool (*visit)(int fd, void *opaque), void *opaque)
{
	_Alignas(struct entry) char buffer[4096];
	long n;

	while ((n = syscall(SYS_getdents64, dir, buffer, sizeof(buffer))) > 0) {
		for (long at = 0; at < n;) {
			const struct entry *entry = (const struct entry *)(buffer + at);

			at += entry->length;
			if (entry->name[0] < '0' || entry->name[0] > '9')
				continue;
			if (!visit(atoi(entry->name), opaque))
				return true;
		}
	}
	return n == 0;
}

bool attach_each_fd(const AttachTarget *target, bool (*visit)(int fd, void *opaque), void *opaque)
{
	int dir = openat(target->proc_fd, "fd", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	bool ok;

	if (dir < 0)
		return false;
	ok = visit_entries(dir, visit, opaque);
	close(dir);
	return ok;
}
