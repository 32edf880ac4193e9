/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * libpostroad-agent.so: the agent for a stock QEMU, loaded by LD_PRELOAD. POSTROAD_AGENT names the
 * socket.
 *
 * The library watches mmap() for MAP_SHARED mappings of the memfds of QEMU's memory-backend-memfd.
 * It offers them to the engine in the order of their mapping. The service starts with the first
 * such mapping. By then a QEMU with -daemonize has forked, so the agent's threads survive.
 *
 * Without POSTROAD_AGENT nothing happens: the wrappers pass their arguments on.
 *
 * Children must not inherit any of this. The library knows a QEMU by the name of its executable.
 * There it removes the variable and its own entry of LD_PRELOAD from the environment before main().
 * Other programs may be wrappers that execute QEMU later (timeout, numactl, ip netns exec). They
 * keep both until they map a memfd themselves. The library knows a child that was forked and not
 * executed by its process id.
 */
/* With _FILE_OFFSET_BITS, glibc's headers make the name mmap an alias of mmap64. This file defines
 * both. */
#undef _FILE_OFFSET_BITS
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "guest/agent/internal.h"

#define PATH_BYTES 4096

typedef void *(*MmapFn)(void *, size_t, int, int, int, off_t);
typedef int (*MunmapFn)(void *, size_t);

/* One per process, as the library is loaded once. */
static struct {
	char path[PATH_BYTES]; /* constant after the constructor; "": switched off */
	_Atomic(MmapFn)
		mmap; /* the libc's, or another preload library's; NULL: not looked up yet */
	_Atomic(MunmapFn) munmap; /* as mmap */
	_Atomic(PrAgent *) agent; /* set once, under lock */
	_Atomic pid_t pid;	  /* of the process whose agent it is */
	pthread_mutex_t lock;	  /* makes the agent */
} preload = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* dlsym() may call mmap(). While it runs, the wrappers call the kernel directly. */
static _Thread_local bool resolving;

static void *resolve(const char *name)
{
	void *symbol;

	if (resolving)
		return NULL;
	resolving = true;
	symbol = dlsym(RTLD_NEXT, name);
	resolving = false;
	return symbol;
}

static void *next_mmap(void *addr, size_t len, int prot, int flags, int fd, off_t offset)
{
	MmapFn next = atomic_load(&preload.mmap);

	if (!next) {
		next = (MmapFn)resolve("mmap");
		atomic_store(&preload.mmap, next);
	}
	if (!next)
		return (void *)syscall(SYS_mmap, addr, len, prot, flags, fd, offset);
	return next(addr, len, prot, flags, fd, offset);
}

static int next_munmap(void *addr, size_t len)
{
	MunmapFn next = atomic_load(&preload.munmap);

	if (!next) {
		next = (MunmapFn)resolve("munmap");
		atomic_store(&preload.munmap, next);
	}
	if (!next)
		return syscall(SYS_munmap, addr, len);
	return next(addr, len);
}

/* Environment */

static bool same_file(const char *path, size_t len, const char *other)
{
	char copy[PATH_BYTES];
	struct stat a, b;

	if (len >= sizeof(copy))
		return false;
	memcpy(copy, path, len);
	copy[len] = '\0';
	if (strcmp(copy, other) == 0)
		return true;
	return stat(copy, &a) == 0 && stat(other, &b) == 0 && a.st_dev == b.st_dev &&
	       a.st_ino == b.st_ino;
}

/* Removes this library from LD_PRELOAD, and keeps the others. */
static void remove_from_ld_preload(void)
{
	const char *list = getenv("LD_PRELOAD");
	char kept[PATH_BYTES] = "";
	size_t used = 0;
	Dl_info self;

	if (!list || strlen(list) >= sizeof(kept) || !dladdr((void *)remove_from_ld_preload, &self))
		return;
	for (const char *at = list; *at;) {
		size_t len = strcspn(at, ": ");

		if (len && !same_file(at, len, self.dli_fname)) {
			used += snprintf(kept + used, sizeof(kept) - used, "%s%.*s",
					 used ? ":" : "", (int)len, at);
		}
		at += len;
		at += strspn(at, ": ");
	}
	if (used)
		setenv("LD_PRELOAD", kept, 1);
	else
		unsetenv("LD_PRELOAD");
}

static void clean_environment(void)
{
	if (!getenv("POSTROAD_AGENT"))
		return;
	remove_from_ld_preload();
	unsetenv("POSTROAD_AGENT");
}

static bool is_qemu(void)
{
	char exe[PATH_BYTES];
	ssize_t n = readlink("/proc/self/exe", exe, sizeof(exe) - 1);
	const char *base;

	if (n <= 0)
		return false;
	exe[n] = '\0';
	base = strrchr(exe, '/');
	return strstr(base ? base : exe, "qemu") != NULL;
}

__attribute__((constructor)) static void start(void)
{
	const char *path = getenv("POSTROAD_AGENT");

	if (!path || !*path)
		return;
	if (strlen(path) >= sizeof(preload.path)) {
		fprintf(stderr, "postroad-agent: POSTROAD_AGENT is too long; no agent\n");
		return;
	}
	strcpy(preload.path, path);
	if (is_qemu())
		clean_environment();
}

/* Mappings */

/* Only guest RAM: QEMU's display code shares memfds too, and must never wait for an engine. */
static bool is_guest_ram(int fd)
{
	static const char name[] = "/memfd:memory-backend-memfd";
	char link[64], target[sizeof(name)];

	snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	return readlink(link, target, sizeof(target)) == sizeof(target) &&
	       memcmp(target, name, sizeof(name) - 1) == 0 && target[sizeof(name) - 1] == ' ';
}

static PrAgent *make_agent(void)
{
	PrAgent *agent = pr_agent_new(NULL, NULL);
	int err = agent ? pr_agent_serve(agent, preload.path) : -ENOMEM;

	if (!err)
		return agent;
	fprintf(stderr, "postroad-agent: %s: %s; this guest can't be migrated by Postroad%s\n",
		preload.path, strerror(-err),
		err == -EADDRINUSE ? " (another guest uses this socket: name another one in "
				     "POSTROAD_AGENT)"
				   : "");
	pr_agent_free(agent);
	return NULL;
}

/* NULL: this process has no agent. */
static PrAgent *the_agent(bool make)
{
	PrAgent *agent = atomic_load(&preload.agent);

	/* A forked child has no threads of the agent, and the agent's lock may stay held. */
	if (agent)
		return atomic_load(&preload.pid) == getpid() ? agent : NULL;
	if (!make || atomic_load(&preload.pid))
		return NULL;
	pthread_mutex_lock(&preload.lock);
	agent = atomic_load(&preload.agent);
	if (!agent && !atomic_load(&preload.pid)) {
		clean_environment();
		atomic_store(&preload.pid, getpid());
		agent = make_agent();
		atomic_store(&preload.agent, agent);
	}
	pthread_mutex_unlock(&preload.lock);
	return agent;
}

static void forget(void *addr, size_t len)
{
	PrAgent *agent = the_agent(false);

	if (agent)
		pr_agent_remove_regions(agent, addr, len);
}

static void record(void *addr, size_t len, int fd, off_t offset)
{
	PrAgent *agent = the_agent(true);
	PrAgentRegion region = {.base = addr, .size = len, .memfd = fd, .offset = offset};
	int err;

	if (!agent)
		return;
	err = pr_agent_add_region(agent, &region);
	if (err)
		fprintf(stderr, "postroad-agent: a mapping of %zu bytes is not offered: %s\n", len,
			strerror(-err));
}

static void *watch_mmap(void *addr, size_t len, int prot, int flags, int fd, off_t offset)
{
	bool shared = fd >= 0 && ((flags & MAP_TYPE) == MAP_SHARED ||
				  (flags & MAP_TYPE) == MAP_SHARED_VALIDATE);
	void *mapped = next_mmap(addr, len, prot, flags, fd, offset);
	int saved = errno;

	if (mapped == MAP_FAILED || resolving || !preload.path[0])
		return mapped;
	if (flags & MAP_FIXED)
		forget(mapped, len);
	if (shared && is_guest_ram(fd))
		record(mapped, len, fd, offset);
	errno = saved;
	return mapped;
}

PR_AGENT_API void *mmap(void *addr, size_t len, int prot, int flags, int fd, off_t offset)
{
	return watch_mmap(addr, len, prot, flags, fd, offset);
}

PR_AGENT_API void *mmap64(void *addr, size_t len, int prot, int flags, int fd, off64_t offset)
{
	return watch_mmap(addr, len, prot, flags, fd, offset);
}

PR_AGENT_API int munmap(void *addr, size_t len)
{
	/* Before the munmap(), as afterwards another thread may map something there. */
	if (preload.path[0])
		forget(addr, len);
	return next_munmap(addr, len);
}
