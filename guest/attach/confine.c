/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The helper gives privileges up as soon as it is forked. It closes every descriptor but its
 * socket, that of the allocator and standard error. It drops every capability but two, and denies
 * itself the system calls that it does not need. The filter is a list of allowed calls, as the
 * helper is libc and little else; any other call fails with EPERM.
 *
 * Its child that allocates pages (allocator.c) drops all capabilities, and may make only the calls
 * for that.
 *
 * CAP_SYS_PTRACE: to read another user's process, to stop its main thread, to duplicate its
 * descriptors. CAP_DAC_OVERRIDE: to open its memory for writing, and /dev/userfaultfd.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "guest/attach/internal.h"

#ifndef SYS_close_range
#define SYS_close_range 436
#endif

#if defined(__x86_64__)
#define FILTER_ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define FILTER_ARCH AUDIT_ARCH_AARCH64
#endif

/* The runtime libraries of sanitizers make system calls of their own. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED true
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED true
#endif
#endif
#ifndef SANITIZED
#define SANITIZED false
#endif

static void close_others(int socket, int other)
{
	int fd, last = STDERR_FILENO;

	last = socket > last ? socket : last;
	last = other > last ? other : last;
	for (fd = 0; fd < last; fd++) {
		if (fd != STDERR_FILENO && fd != socket && fd != other)
			close(fd);
	}
	syscall(SYS_close_range, (unsigned)last + 1, ~0u, 0);
	/* /dev/null takes the numbers of the standard descriptors, so that no other file gets
	 * them. */
	while ((fd = open("/dev/null", O_RDWR | O_CLOEXEC)) >= 0 && fd <= STDERR_FILENO)
		;
	agent_close_fd(&fd);
}

/* The helper ends with its socket, and not by a signal to the engine's terminal or unit. SIGCHLD is
 * blocked, as inject-x86_64.c waits for it. */
static void arrange_signals(void)
{
	sigset_t child;

	signal(SIGINT, SIG_IGN);
	signal(SIGTERM, SIG_IGN);
	signal(SIGHUP, SIG_IGN);
	signal(SIGCHLD, SIG_DFL);
	sigemptyset(&child);
	sigaddset(&child, SIGCHLD);
	sigprocmask(SIG_SETMASK, &child, NULL);
}

static bool drop_capabilities(uint32_t kept)
{
	struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct data[2];

	if (syscall(SYS_capget, &head, data) < 0)
		return false;
	for (int i = 0; i <= CAP_LAST_CAP; i++) {
		if (i >= 32 || !(kept & 1u << i))
			prctl(PR_CAPBSET_DROP, i, 0, 0, 0);
	}
	prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
	data[0].permitted &= kept;
	data[0].effective = data[0].permitted;
	data[0].inheritable = 0;
	memset(&data[1], 0, sizeof(data[1]));
	head.pid = 0;
	return syscall(SYS_capset, &head, data) == 0;
}

#ifdef FILTER_ARCH
static const int for_helper[] = {
	/* its socket */
	SYS_recvmsg,
	SYS_sendmsg,
	SYS_ppoll,
#ifdef SYS_poll
	SYS_poll,
#endif
	/* files of /proc, and descriptors of the process */
	SYS_openat,
	SYS_close,
	SYS_read,
	SYS_write,
	SYS_pread64,
	SYS_pwrite64,
	SYS_lseek,
	SYS_getdents64,
	SYS_readlinkat,
	SYS_newfstatat,
	SYS_fstat,
	SYS_fstatfs,
	SYS_fcntl,
	SYS_flock,
	SYS_ioctl,
	SYS_userfaultfd,
	SYS_pidfd_getfd,
#ifdef SYS_open
	SYS_open,
	SYS_readlink,
	SYS_stat,
	SYS_statfs,
#endif
#ifdef SYS_statx
	SYS_statx,
#endif
	/* the process */
	SYS_ptrace,
	SYS_wait4,
	/* signals and time */
	SYS_rt_sigtimedwait,
	SYS_rt_sigprocmask,
	SYS_rt_sigaction,
	SYS_rt_sigreturn,
	SYS_restart_syscall,
	SYS_nanosleep,
	SYS_clock_nanosleep,
	SYS_clock_gettime,
#ifdef SYS_pause
	SYS_pause,
#endif
	/* libc, and the end */
	SYS_getpid,
	SYS_gettid,
	SYS_brk,
	SYS_mmap,
	SYS_munmap,
	SYS_mprotect,
	SYS_futex,
	SYS_exit_group,
	SYS_exit,
};

static const int for_allocator[] = {
	SYS_recvmsg,	    SYS_sendmsg,      SYS_sendto,	   SYS_ppoll,
#ifdef SYS_poll
	SYS_poll,
#endif
	SYS_fallocate,	    SYS_ioctl, /* page tables, by the userfaultfd */
	SYS_close,	    SYS_write, /* libc's last message on standard error */
	SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_restart_syscall, SYS_getpid, SYS_gettid,
	SYS_exit_group,	    SYS_exit,
};
#define N_CALLS(list) (sizeof(list) / sizeof((list)[0]))
#define MAX_ALLOWED   N_CALLS(for_helper)
_Static_assert(N_CALLS(for_allocator) <= MAX_ALLOWED, "room in the filter");

/* Signals are allowed to itself only: abort() needs that. */
static bool load_filter(const int *allowed, unsigned n_allowed)
{
	struct sock_filter code[2 * MAX_ALLOWED + 11];
	struct sock_fprog program = {.filter = code};
	unsigned n = 0;

#define LOAD(field)                                                                                \
	(struct sock_filter)                                                                       \
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define UNLESS(value, skip) (struct sock_filter) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 0, skip)
#define IF(value, skip)	    (struct sock_filter) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, skip, 0)
#define RETURN(action)	    (struct sock_filter) BPF_STMT(BPF_RET | BPF_K, action)
	code[n++] = LOAD(arch);
	code[n++] = UNLESS(FILTER_ARCH, 6);
	code[n++] = LOAD(nr);
	code[n++] = IF(SYS_tgkill, 1);
	code[n++] = UNLESS(SYS_kill, 4);
	code[n++] = LOAD(args[0]);
	code[n++] = UNLESS((uint32_t)getpid(), 1);
	code[n++] = RETURN(SECCOMP_RET_ALLOW);
	code[n++] = RETURN(SECCOMP_RET_ERRNO | EPERM);
	for (unsigned i = 0; i < n_allowed; i++) {
		code[n++] = UNLESS((uint32_t)allowed[i], 1);
		code[n++] = RETURN(SECCOMP_RET_ALLOW);
	}
	code[n++] = RETURN(SECCOMP_RET_ERRNO | EPERM);
#undef LOAD
#undef UNLESS
#undef IF
#undef RETURN
	program.len = n;
	return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_LOG, &program) ==
	       0;
}
#endif

static bool give_up(const char *name, uint32_t kept)
{
	arrange_signals();
	prctl(PR_SET_NAME, name);
	return drop_capabilities(kept) && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0;
}

bool attach_confine(int socket, int other, bool filter)
{
	close_others(socket, other);
	if (!give_up("postroad-attach", 1u << CAP_SYS_PTRACE | 1u << CAP_DAC_OVERRIDE))
		return false;
#ifdef FILTER_ARCH
	if (filter && !SANITIZED)
		return load_filter(for_helper, N_CALLS(for_helper));
#endif
	return true;
}

bool attach_confine_allocator(int socket, bool filter)
{
	close_others(socket, -1);
	if (!give_up("postroad-pages", 0))
		return false;
#ifdef FILTER_ARCH
	if (filter && !SANITIZED)
		return load_filter(for_allocator, N_CALLS(for_allocator));
#endif
	return true;
}
