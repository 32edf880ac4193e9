/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Capabilities. An engine that runs as root keeps three. IPC_LOCK: a recovery over rdma: pins the
 * guest's memory again. NET_BIND_SERVICE: migrate_recover may name a low port. DAC_OVERRIDE: QEMU's
 * sockets and the TLS keys may belong to another user. Nothing else needs one: the userfaultfd and
 * the memfds belong to QEMU and arrive as descriptors. A helper process, which is forked earlier,
 * keeps the capabilities for attaching to a QEMU (guest/attach/confine.c). The engine drops its
 * capabilities before it starts threads, because the kernel keeps them for each thread. It still
 * runs as user 0 then, who owns most files.
 *
 * User. Only --user takes root's file access away. libc's setresuid(2) changes all threads, and the
 * kernel clears the capabilities of each. The change also gives each thread credentials of its own,
 * and the kernel lets an rdma_cm descriptor be used only with the very credentials that it was
 * opened with. (A new thread shares the credentials of the thread that starts it.) So a descriptor
 * that was opened before the change is unusable after it. So is one that a thread opens and another
 * uses, when both threads existed before the change. Therefore the change comes after the monitor's
 * and the guest's sockets are open, and before the listeners and the threads of a migration exist.
 *
 * System calls. The filter lists the denied calls, not the allowed ones. The calls that libc,
 * GnuTLS, libfabric and rdma-core's drivers make differ between versions and cards. An engine that
 * is killed for a call that its author did not foresee loses a guest in the middle of postcopy. So
 * the filter denies what no version of these libraries needs and what an attacker uses next:
 * starting programs and processes, reading other processes, changing namespaces, mounts, users and
 * clocks, and the parts of the kernel with the most faults so far (bpf, keys, io_uring, modules). A
 * denied call fails with EPERM and leaves a line in the kernel's audit log. Calls that have a
 * fallback fail with ENOSYS and leave no line: clone3, whose flags a filter can't read, and
 * io_uring, whose operations bypass filters.
 *
 * Cost. Linux 5.11 and newer remembers which calls a filter always allows, and does not run it for
 * them. An older kernel runs a binary tree. SPEC_ALLOW leaves speculation unchanged: kernels before
 * 5.16 would otherwise restrict it for the whole process, which slows each system call down.
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
#define LEAK_CHECK TRUE /* LeakSanitizer forks, and stops the threads with ptrace(2) */
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define LEAK_CHECK TRUE
#endif
#endif
#ifndef LEAK_CHECK
#define LEAK_CHECK FALSE
#endif

/* Capabilities */

static const unsigned kept_capabilities[] = {CAP_IPC_LOCK, CAP_NET_BIND_SERVICE, CAP_DAC_OVERRIDE};
static const unsigned user_change[] = {CAP_SETUID, CAP_SETGID};

static gboolean fail_kernel(GError **error, const char *what, int code)
{
	g_set_error(error, PR_SANDBOX_ERROR, PR_SANDBOX_ERROR_KERNEL, "%s: %s", what,
		    g_strerror(code));
	return FALSE;
}

/* Bit n is set when the process has capability n of the list. */
static guint permitted_of(const unsigned *list, guint n)
{
	guint mask = 0;

	for (guint i = 0; i < n; i++)
		if (capng_have_capability(CAPNG_PERMITTED, list[i]))
			mask |= 1u << i;
	return mask;
}

static void add_capabilities(const unsigned *list, guint n, guint mask)
{
	for (guint i = 0; i < n; i++)
		if (mask & 1u << i)
			capng_update(CAPNG_ADD, CAPNG_EFFECTIVE | CAPNG_PERMITTED, list[i]);
}

static gboolean drop_capabilities(const PrSandbox *sandbox, GError **error)
{
	guint has, has_user_change;
	gboolean can_bound; /* may change the bounding set */

	if (capng_get_caps_process() < 0)
		return fail_kernel(error, "the process's capabilities can't be read", errno);
	has = permitted_of(kept_capabilities, G_N_ELEMENTS(kept_capabilities));
	has_user_change = sandbox->user ? permitted_of(user_change, G_N_ELEMENTS(user_change)) : 0;
	can_bound = capng_have_capability(CAPNG_EFFECTIVE, CAP_SETPCAP);
	capng_clear(CAPNG_SELECT_BOTH);
	add_capabilities(kept_capabilities, G_N_ELEMENTS(kept_capabilities), has);
	add_capabilities(user_change, G_N_ELEMENTS(user_change), has_user_change);
	if (capng_apply(can_bound ? CAPNG_SELECT_BOTH : CAPNG_SELECT_CAPS) < 0)
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
			"--user '%s': only root can change to another user, and this engine was "
			"started by user %u; leave the option out",
			sandbox->user, geteuid());
		return FALSE;
	}
	*ret_uid = user->pw_uid;
	*ret_gid = group ? group->gr_gid : user->pw_gid;
	return TRUE;
}

/* The user has no IPC_LOCK. If the limit can't be raised, an error of rdma: names the limit that it
 * needs. */
static void raise_memlock_limit(void)
{
	const struct rlimit none = {RLIM_INFINITY, RLIM_INFINITY};

	setrlimit(RLIMIT_MEMLOCK, &none);
}

static gboolean become_user(const PrSandbox *sandbox, GError **error)
{
	int death_signal = 0;
	uid_t uid;
	gid_t gid;

	if (!find_user(sandbox, &uid, &gid, error))
		return FALSE;
	prctl(PR_GET_PDEATHSIG, &death_signal);
	if (initgroups(sandbox->user, gid) < 0 || setresgid(gid, gid, gid) < 0 ||
	    setresuid(uid, uid, uid) < 0) {
		g_set_error(error, PR_SANDBOX_ERROR, PR_SANDBOX_ERROR_USER,
			    "--user '%s': can't change to this user: %s", sandbox->user,
			    g_strerror(errno));
		return FALSE;
	}
	/* Otherwise /proc/self would belong to root, and rdma: reads its mappings there. */
	prctl(PR_SET_DUMPABLE, 1);
	/* The change of the user has cleared it. */
	prctl(PR_SET_PDEATHSIG, death_signal);
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
	/* users and capabilities; --user takes effect before the filter */
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
static const int denied_without_leak_check[] = {SCMP_SYS(ptrace), SCMP_SYS(fork), SCMP_SYS(vfork)};
static const int absent[] = {SCMP_SYS(clone3), SCMP_SYS(io_uring_setup), SCMP_SYS(io_uring_enter),
			     SCMP_SYS(io_uring_register)};

/* Returns 0 or -errno, like libseccomp. */
static int add_rules(scmp_filter_ctx filter, const int *calls, guint n, uint32_t action)
{
	int err = 0;

	for (guint i = 0; i < n && !err; i++)
		err = seccomp_rule_add(filter, action, calls[i], 0);
	return err;
}

/* Allows clone() for threads, and denies it for processes and for new namespaces. The flags are its
 * first argument, but the second one on s390. */
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
		err = add_rules(filter, denied_without_leak_check,
				G_N_ELEMENTS(denied_without_leak_check), action);
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
		    "--sandbox: the kernel refused the system call filter: %s; use a kernel with "
		    "CONFIG_SECCOMP_FILTER, or start with --sandbox off",
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
		g_set_error(
			error, PR_SANDBOX_ERROR, PR_SANDBOX_ERROR_USER,
			"--user '%s': can't create its state directory %s: %s; name another one "
			"with --state-dir",
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
		raise_memlock_limit();
	}
	if (!drop_capabilities(sandbox, error))
		return FALSE;
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
		return fail_kernel(error, "prctl(PR_SET_NO_NEW_PRIVS) failed", errno);
	return TRUE;
}

gboolean pr_sandbox_enter(const PrSandbox *sandbox, GError **error)
{
	if (sandbox->user && !become_user(sandbox, error))
		return FALSE;
	return !sandbox->filter || load_filters(error);
}
