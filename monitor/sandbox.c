/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Capabilities. Root's engine keeps three: IPC_LOCK (a recovery over rdma: pins the guest's memory anew),
 * NET_BIND_SERVICE (migrate_recover may name a low port), and DAC_OVERRIDE (QEMU's sockets and the TLS keys may be
 * another user's). It needs none for the rest: the userfaultfd and the memfds are QEMU's and come as descriptors; what
 * attaching to a QEMU takes is kept by a helper, which is forked before (guest/attach/confine.c). The capabilities
 * are given up before there are threads, because the kernel keeps them for each thread. The engine is still
 * user 0 then, who owns most files; --user is what really takes that away. setresuid(2) in libc is for all threads,
 * and takes all capabilities from all of them. It also gives each of them credentials of its own, and the kernel lets a
 * descriptor of rdma_cm be used with those very credentials only that it was opened with (a thread shares those
 * of the thread that starts it). What was opened before the switch is dead, and so is what one thread opens and
 * another one uses, if both were there before. So the switch comes once the monitor's sockets and the guest's are open,
 * and before there are listeners and a migration's threads.
 *
 * System calls. The filter is a list of what is denied and not of what is allowed: what libc, GnuTLS, libfabric and
 * rdma-core's drivers call differs between versions and cards, and an engine that dies of a call that its author
 * did not foresee loses a guest in mid-postcopy. So it denies what no version of them has a use for and what a break-in
 * goes on with: to start programs and processes, to look into others, to change namespaces, mounts, users and
 * clocks, and the kernel's parts that have been its weak ones (bpf, keys, io_uring, modules). Denied calls fail with
 * EPERM and leave a line in the kernel's audit log. What asks in order to fall back to something else gets ENOSYS
 * and no line: clone3, whose flags a filter can't see, and io_uring, which works past filters.
 *
 * Costs: the kernel remembers which calls a filter always lets pass (5.11 and newer) and then does not run it;
 * older ones run a binary tree. Speculation is left as it is (SPEC_ALLOW), which kernels before 5.16 would
 * otherwise change for the whole process, at a price for each system call.
 */
#include "monitor/sandbox.h"

#include <cap-ng.h>
#include <errno.h>
#include <grp.h>
#include <pwd.h>
#include <sched.h>
#include <seccomp.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

G_DEFINE_QUARK(pr_sandbox_error, pr_sandbox_error)

#if defined(__SANITIZE_ADDRESS__)
#define LEAK_CHECK TRUE /* stops the threads with ptrace(2), from a process of its own */
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define LEAK_CHECK TRUE
#endif
#endif
#ifndef LEAK_CHECK
#define LEAK_CHECK FALSE
#endif

/* Capabilities */

static const unsigned kept[] = {CAP_IPC_LOCK, CAP_NET_BIND_SERVICE, CAP_DAC_OVERRIDE};
static const unsigned for_user[] = {CAP_SETUID, CAP_SETGID};

static gboolean fail_kernel(GError **error, const char *what, int code)
{
	g_set_error(error, PR_SANDBOX_ERROR, PR_SANDBOX_ERROR_KERNEL, "%s: %s", what,
		    g_strerror(code));
	return FALSE;
}

/* Bit n: we have n of the list. */
static guint which(const unsigned *list, guint n)
{
	guint mask = 0;

	for (guint i = 0; i < n; i++)
		if (capng_have_capability(CAPNG_PERMITTED, list[i]))
			mask |= 1u << i;
	return mask;
}

static void keep(const unsigned *list, guint n, guint mask)
{
	for (guint i = 0; i < n; i++)
		if (mask & 1u << i)
			capng_update(CAPNG_ADD, CAPNG_EFFECTIVE | CAPNG_PERMITTED, list[i]);
}

static gboolean drop_capabilities(const PrSandbox *sandbox, GError **error)
{
	guint has, has_for_user;
	gboolean bounds;

	if (capng_get_caps_process() < 0)
		return fail_kernel(error, "the process's capabilities can't be read", errno);
	has = which(kept, G_N_ELEMENTS(kept));
	has_for_user = sandbox->user ? which(for_user, G_N_ELEMENTS(for_user)) : 0;
	bounds = capng_have_capability(CAPNG_EFFECTIVE, CAP_SETPCAP);
	capng_clear(CAPNG_SELECT_BOTH);
	keep(kept, G_N_ELEMENTS(kept), has);
	keep(for_user, G_N_ELEMENTS(for_user), has_for_user);
	if (capng_apply(bounds ? CAPNG_SELECT_BOTH : CAPNG_SELECT_CAPS) < 0)
		return fail_kernel(error, "capabilities can't be dropped", errno);
	return TRUE;
}

/* Users */

static gboolean find_user(const PrSandbox *sandbox, uid_t *ret_uid, gid_t *ret_gid, GError **error)
{
	const struct passwd *user = getpwnam(sandbox->user);
	const struct group *group = sandbox->group ? getgrnam(sandbox->group) : NULL;

	if (!user) {
		g_set_error(error, PR_SANDBOX_ERROR, PR_SANDBOX_ERROR_USER,
			    "--user '%s': there is no such user", sandbox->user);
		return FALSE;
	}
	if (sandbox->group && !group) {
		g_set_error(error, PR_SANDBOX_ERROR, PR_SANDBOX_ERROR_USER,
			    "--group '%s': there is no such group", sandbox->group);
		return FALSE;
	}
	if (geteuid() != 0) {
		g_set_error(
			error, PR_SANDBOX_ERROR, PR_SANDBOX_ERROR_USER,
			"--user '%s': only root can become another user, this engine was started "
			"by user %u; leave the option out",
			sandbox->user, geteuid());
		return FALSE;
	}
	*ret_uid = user->pw_uid;
	*ret_gid = group ? group->gr_gid : user->pw_gid;
	return TRUE;
}

/* The user has no IPC_LOCK. Where the limit can't be raised, rdma: says which one it would need. */
static void lift_memlock(void)
{
	const struct rlimit none = {RLIM_INFINITY, RLIM_INFINITY};

	setrlimit(RLIMIT_MEMLOCK, &none);
}

static gboolean become_user(const PrSandbox *sandbox, GError **error)
{
	int on_parents_death = 0;
	uid_t uid;
	gid_t gid;

	if (!find_user(sandbox, &uid, &gid, error))
		return FALSE;
	prctl(PR_GET_PDEATHSIG, &on_parents_death);
	if (initgroups(sandbox->user, gid) < 0 || setresgid(gid, gid, gid) < 0 ||
	    setresuid(uid, uid, uid) < 0) {
		g_set_error(error, PR_SANDBOX_ERROR, PR_SANDBOX_ERROR_USER,
			    "--user '%s': cannot become it: %s", sandbox->user, g_strerror(errno));
		return FALSE;
	}
	/* Or /proc/self would be root's, where rdma: looks at its mappings. */
	prctl(PR_SET_DUMPABLE, 1);
	/* The switch has cleared it. */
	prctl(PR_SET_PDEATHSIG, on_parents_death);
	return TRUE;
}

/* System calls */

static const int denied[] = {
	/* programs and processes */
	SCMP_SYS(execve),
	SCMP_SYS(execveat),
	SCMP_SYS(personality),
	/* other processes */
	SCMP_SYS(process_vm_readv),
	SCMP_SYS(process_vm_writev),
	SCMP_SYS(pidfd_getfd),
	SCMP_SYS(kcmp),
	/* users and capabilities; the switch of --user is before */
	SCMP_SYS(setuid),
	SCMP_SYS(setgid),
	SCMP_SYS(setreuid),
	SCMP_SYS(setregid),
	SCMP_SYS(setresuid),
	SCMP_SYS(setresgid),
	SCMP_SYS(setfsuid),
	SCMP_SYS(setfsgid),
	SCMP_SYS(setgroups),
	SCMP_SYS(capset),
	/* namespaces and mounts */
	SCMP_SYS(unshare),
	SCMP_SYS(setns),
	SCMP_SYS(mount),
	SCMP_SYS(umount2),
	SCMP_SYS(pivot_root),
	SCMP_SYS(chroot),
	SCMP_SYS(move_mount),
	SCMP_SYS(open_tree),
	SCMP_SYS(fsopen),
	SCMP_SYS(fsconfig),
	SCMP_SYS(fsmount),
	SCMP_SYS(fspick),
	SCMP_SYS(mount_setattr),
	SCMP_SYS(open_by_handle_at),
	SCMP_SYS(name_to_handle_at),
	SCMP_SYS(mknod),
	SCMP_SYS(mknodat),
	SCMP_SYS(quotactl),
	SCMP_SYS(swapon),
	SCMP_SYS(swapoff),
	SCMP_SYS(fanotify_init),
	/* the kernel itself */
	SCMP_SYS(init_module),
	SCMP_SYS(finit_module),
	SCMP_SYS(delete_module),
	SCMP_SYS(kexec_load),
	SCMP_SYS(kexec_file_load),
	SCMP_SYS(reboot),
	SCMP_SYS(bpf),
	SCMP_SYS(perf_event_open),
	SCMP_SYS(keyctl),
	SCMP_SYS(add_key),
	SCMP_SYS(request_key),
	SCMP_SYS(syslog),
	SCMP_SYS(acct),
	SCMP_SYS(iopl),
	SCMP_SYS(ioperm),
	SCMP_SYS(modify_ldt),
	SCMP_SYS(lookup_dcookie),
	SCMP_SYS(uselib),
	/* clocks and names of the host */
	SCMP_SYS(settimeofday),
	SCMP_SYS(clock_settime),
	SCMP_SYS(clock_adjtime),
	SCMP_SYS(adjtimex),
	SCMP_SYS(sethostname),
	SCMP_SYS(setdomainname),
	SCMP_SYS(vhangup),
};
static const int denied_but_to_leak_check[] = {SCMP_SYS(ptrace), SCMP_SYS(fork), SCMP_SYS(vfork)};
static const int absent[] = {SCMP_SYS(clone3), SCMP_SYS(io_uring_setup), SCMP_SYS(io_uring_enter),
			     SCMP_SYS(io_uring_register)};

/* 0 or -errno, as libseccomp's. */
static int add_rules(scmp_filter_ctx filter, const int *calls, guint n, uint32_t action)
{
	int err = 0;

	for (guint i = 0; i < n && !err; i++)
		err = seccomp_rule_add(filter, action, calls[i], 0);
	return err;
}

/* Threads, yes; processes and what has namespaces of its own, no. clone's flags are its first argument on all
 * architectures but s390, which has them second. */
static int add_clone_rules(scmp_filter_ctx filter, uint32_t action)
{
	static const int namespaces[] = {CLONE_NEWNS,  CLONE_NEWUTS, CLONE_NEWIPC,   CLONE_NEWUSER,
					 CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWCGROUP};
#if defined(__s390__)
	const unsigned flags = 1;
#else
	const unsigned flags = 0;
#endif
	int err = 0;

	for (guint i = 0; i < G_N_ELEMENTS(namespaces) && !err; i++) {
		scmp_datum_t flag = (unsigned)namespaces[i];

		err = seccomp_rule_add(filter, action, SCMP_SYS(clone), 1,
				       SCMP_CMP(flags, SCMP_CMP_MASKED_EQ, flag, flag));
	}
	if (!err && !LEAK_CHECK)
		err = seccomp_rule_add(filter, action, SCMP_SYS(clone), 1,
				       SCMP_CMP(flags, SCMP_CMP_MASKED_EQ, CLONE_THREAD, 0));
	return err;
}

static int set_attributes(scmp_filter_ctx filter, gboolean log)
{
	int err = seccomp_attr_set(filter, SCMP_FLTATR_CTL_TSYNC, 1);

	if (!err)
		err = seccomp_attr_set(filter, SCMP_FLTATR_CTL_OPTIMIZE, 2);
	if (!err)
		err = seccomp_attr_set(filter, SCMP_FLTATR_CTL_SSB, 1);
	if (!err && log)
		err = seccomp_attr_set(filter, SCMP_FLTATR_CTL_LOG, 1);
	return err;
}

static int load_denied(void)
{
	scmp_filter_ctx filter = seccomp_init(SCMP_ACT_ALLOW);
	uint32_t action = SCMP_ACT_ERRNO(EPERM);
	int err = filter ? set_attributes(filter, TRUE) : -ENOMEM;

	if (!err)
		err = add_rules(filter, denied, G_N_ELEMENTS(denied), action);
	if (!err && !LEAK_CHECK)
		err = add_rules(filter, denied_but_to_leak_check,
				G_N_ELEMENTS(denied_but_to_leak_check), action);
	if (!err)
		err = add_clone_rules(filter, action);
	if (!err)
		err = seccomp_load(filter);
	seccomp_release(filter);
	return err;
}

static int load_absent(void)
{
	scmp_filter_ctx filter = seccomp_init(SCMP_ACT_ALLOW);
	int err = filter ? set_attributes(filter, FALSE) : -ENOMEM;

	if (!err)
		err = add_rules(filter, absent, G_N_ELEMENTS(absent), SCMP_ACT_ERRNO(ENOSYS));
	if (!err)
		err = seccomp_load(filter);
	seccomp_release(filter);
	return err;
}

static gboolean load_filters(GError **error)
{
	int err = load_absent();

	if (!err)
		err = load_denied();
	if (!err)
		return TRUE;
	g_set_error(error, PR_SANDBOX_ERROR, PR_SANDBOX_ERROR_KERNEL,
		    "--sandbox: the kernel does not take a filter of system calls: %s; it needs "
		    "CONFIG_SECCOMP_FILTER; or start with --sandbox off",
		    g_strerror(-err));
	return FALSE;
}

gboolean pr_sandbox_make_dir(const PrSandbox *sandbox, const char *dir, GError **error)
{
	uid_t uid;
	gid_t gid;

	if (!find_user(sandbox, &uid, &gid, error))
		return FALSE;
	if (g_file_test(dir, G_FILE_TEST_EXISTS))
		return TRUE;
	if (g_mkdir_with_parents(dir, 0700) < 0 || chown(dir, uid, gid) < 0) {
		g_set_error(error, PR_SANDBOX_ERROR, PR_SANDBOX_ERROR_USER,
			    "--user '%s': %s cannot be made for it: %s; --state-dir names another "
			    "directory",
			    sandbox->user, dir, g_strerror(errno));
		return FALSE;
	}
	return TRUE;
}

gboolean pr_sandbox_prepare(const PrSandbox *sandbox, GError **error)
{
	uid_t uid;
	gid_t gid;

	if (sandbox->user) {
		if (!find_user(sandbox, &uid, &gid, error))
			return FALSE;
		lift_memlock();
	}
	if (!drop_capabilities(sandbox, error))
		return FALSE;
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
		return fail_kernel(error, "PR_SET_NO_NEW_PRIVS", errno);
	return TRUE;
}

gboolean pr_sandbox_enter(const PrSandbox *sandbox, GError **error)
{
	if (sandbox->user && !become_user(sandbox, error))
		return FALSE;
	return !sandbox->filter || load_filters(error);
}
