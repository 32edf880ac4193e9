/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The sandbox. Each test enters it in a process of its own, which has a thread already, like an
 * engine. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <netinet/in.h>
#include <pwd.h>
#include <sched.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "monitor/sandbox.h"

#define KEPT ((1ull << 1) | (1ull << 10) | (1ull << 14)) /* the capabilities that sandbox.c keeps */
#if defined(__SANITIZE_ADDRESS__)
#define LEAK_CHECK TRUE
#else
#define LEAK_CHECK FALSE
#endif

/* In the child: a condition that does not hold ends it, with the line number in its exit status. */
#define HOLDS(condition)                                                                           \
	do {                                                                                       \
		if (!(condition)) {                                                                \
			print_error("%s:%d: %s; errno: %s\n", __FILE__, __LINE__, #condition,      \
				    g_strerror(errno));                                            \
			_exit(1);                                                                  \
		}                                                                                  \
	} while (0)

#define IS_DENIED(call) HOLDS((call) < 0 && errno == EPERM)

typedef struct Case {
	const PrSandbox *sandbox;
	void (*check)(void);
	int go_fd; /* eventfd: the sandbox has been entered */
} Case;

static gpointer early_thread(gpointer opaque)
{
	Case *this = opaque;
	eventfd_t count;

	HOLDS(eventfd_read(this->go_fd, &count) == 0);
	this->check();
	return NULL;
}

static void run_child(Case *this)
{
	g_autoptr(GError) error = NULL;
	GThread *early;

	this->go_fd = eventfd(0, EFD_CLOEXEC);
	HOLDS(pr_sandbox_prepare(this->sandbox, &error));
	early = g_thread_new("early", early_thread, this);
	if (!pr_sandbox_enter(this->sandbox, &error)) {
		print_error("%s\n", error->message);
		_exit(1);
	}
	this->check();
	HOLDS(eventfd_write(this->go_fd, 1) == 0);
	g_thread_join(early);
	_exit(0);
}

static void in_sandbox(const PrSandbox *sandbox, void (*check)(void))
{
	Case this = {.sandbox = sandbox, .check = check};
	pid_t child = fork();
	int status;

	assert_true(child >= 0);
	if (child == 0)
		run_child(&this);
	assert_int_equal(waitpid(child, &status, 0), child);
	assert_true(WIFEXITED(status));
	assert_int_equal(WEXITSTATUS(status), 0);
}

static void nothing_is_started(void)
{
	/* If this program could be started, the test would fail. */
	char *const argv[] = {"false", NULL};
	char *const environment[] = {NULL};

	HOLDS(prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1);
	HOLDS(prctl(PR_GET_SECCOMP, 0, 0, 0, 0) == 2);
	IS_DENIED(execve("/bin/false", argv, environment));
	IS_DENIED(syscall(SYS_execveat, AT_FDCWD, "/bin/false", argv, environment, 0));
	if (LEAK_CHECK)
		return;
	IS_DENIED(fork());
	IS_DENIED(syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0));
	IS_DENIED(ptrace(PTRACE_TRACEME, 0, NULL, NULL));
}

static void a_sandboxed_engine_starts_no_program(void **state)
{
	in_sandbox(&(PrSandbox){.filter = TRUE}, nothing_is_started);
}

static void nothing_else_is_reached(void)
{
	char byte;
	struct iovec own = {&byte, 1}, other = {&byte, 1};

	IS_DENIED(unshare(CLONE_NEWUSER));
	IS_DENIED(syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0));
	IS_DENIED(setns(0, 0));
	IS_DENIED(mount("none", "/", "tmpfs", 0, NULL));
	IS_DENIED(chroot("/"));
	IS_DENIED(process_vm_readv(getpid(), &own, 1, &other, 1, 0));
	IS_DENIED(syscall(SYS_keyctl, 0, 0, 0, 0, 0));
	IS_DENIED(syscall(SYS_bpf, 0, NULL, 0));
	IS_DENIED(syscall(SYS_perf_event_open, NULL, 0, 0, 0, 0));
	IS_DENIED(syscall(SYS_init_module, NULL, 0, ""));
	IS_DENIED(syscall(SYS_finit_module, 0, "", 0));
	IS_DENIED(syscall(SYS_kexec_load, 0, 0, NULL, 0));
	IS_DENIED(syscall(SYS_capset, NULL, NULL));
	IS_DENIED(syscall(SYS_setresuid, 0, 0, 0));
	IS_DENIED(syscall(SYS_setgroups, 0, NULL));
	HOLDS(syscall(SYS_clone3, NULL, 0) < 0 && errno == ENOSYS);
	HOLDS(syscall(SYS_io_uring_setup, 1, NULL) < 0 && errno == ENOSYS);
}

static void a_sandboxed_engine_can_change_nothing_else(void **state)
{
	in_sandbox(&(PrSandbox){.filter = TRUE}, nothing_else_is_reached);
}

static gpointer give_back(gpointer opaque)
{
	return opaque;
}

/* The end-to-end tests run whole migrations in the sandbox. This test finds a denied call
 * sooner. */
static void its_work_is_done(void)
{
	struct sockaddr_in any = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
	int own = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	int memfd = memfd_create("test", MFD_CLOEXEC);
	void *map;

	HOLDS(own >= 0 && memfd >= 0);
	HOLDS(bind(own, (struct sockaddr *)&any, sizeof(any)) == 0 && listen(own, 1) == 0);
	HOLDS(ftruncate(memfd, 4096) == 0);
	map = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
	HOLDS(map != MAP_FAILED && madvise(map, 4096, MADV_DONTDUMP) == 0);
	HOLDS(g_thread_join(g_thread_new("later", give_back, map)) == map);
	HOLDS(g_file_test("/proc/self/pagemap", G_FILE_TEST_EXISTS));
	HOLDS(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC) >= 0);
}

static void a_sandboxed_engine_can_do_its_work(void **state)
{
	in_sandbox(&(PrSandbox){.filter = TRUE}, its_work_is_done);
}

static void programs_can_be_started(void)
{
	HOLDS(prctl(PR_GET_SECCOMP, 0, 0, 0, 0) == 0);
	HOLDS(prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1);
	HOLDS(g_spawn_command_line_sync("true", NULL, NULL, NULL, NULL));
}

static void without_the_option_only_the_filter_is_missing(void **state)
{
	in_sandbox(&(PrSandbox){.filter = FALSE}, programs_can_be_started);
}

/* Reads a number from the calling thread's status file. */
static guint64 own_status(const char *name, guint base)
{
	g_autofree char *text = NULL;
	const char *at;

	HOLDS(g_file_get_contents("/proc/thread-self/status", &text, NULL, NULL));
	at = strstr(text, name);
	HOLDS(at);
	return g_ascii_strtoull(at + strlen(name), NULL, base);
}

static void few_capabilities_are_left(void)
{
	HOLDS(geteuid() == 0);
	HOLDS((own_status("\nCapEff:\t", 16) & ~KEPT) == 0);
	HOLDS((own_status("\nCapPrm:\t", 16) & ~KEPT) == 0);
	HOLDS((own_status("\nCapBnd:\t", 16) & ~KEPT) == 0);
	/* no CAP_SYS_ADMIN, no CAP_CHOWN */
	HOLDS(sethostname("x", 1) < 0 && errno == EPERM);
	HOLDS(chown("/", 1, 1) < 0 && errno == EPERM);
}

static void root_keeps_few_capabilities(void **state)
{
	if (geteuid() != 0)
		skip();
	in_sandbox(&(PrSandbox){.filter = FALSE}, few_capabilities_are_left);
}

static void nothing_of_root_is_left(void)
{
	struct rlimit limit;
	gid_t groups[64];

	HOLDS(getpwnam("nobody") && geteuid() == getpwnam("nobody")->pw_uid);
	HOLDS(getegid() == getpwnam("nobody")->pw_gid);
	HOLDS(own_status("\nCapEff:\t", 16) == 0 && own_status("\nCapPrm:\t", 16) == 0);
	HOLDS(setuid(0) < 0 && seteuid(0) < 0 && setgid(0) < 0);
	for (int i = getgroups(G_N_ELEMENTS(groups), groups); i-- > 0;)
		HOLDS(groups[i] != 0);
	HOLDS(access("/etc/shadow", R_OK) < 0);
	HOLDS(open("/etc/shadow", O_RDONLY) < 0);
	HOLDS(prctl(PR_GET_DUMPABLE, 0, 0, 0, 0) == 1);
	HOLDS(getrlimit(RLIMIT_MEMLOCK, &limit) == 0);
	its_work_is_done();
}

static void all_threads_change_the_user(void **state)
{
	if (geteuid() != 0)
		skip();
	in_sandbox(&(PrSandbox){.user = "nobody", .filter = TRUE}, nothing_of_root_is_left);
	in_sandbox(&(PrSandbox){.user = "nobody", .filter = FALSE}, nothing_of_root_is_left);
}

static void expect_refusal(const PrSandbox *sandbox, uid_t as, const char *words)
{
	pid_t child = fork();
	int status;

	assert_true(child >= 0);
	if (child == 0) {
		g_autoptr(GError) error = NULL;

		HOLDS(as == geteuid() || setresuid(as, as, as) == 0);
		HOLDS(!pr_sandbox_prepare(sandbox, &error));
		HOLDS(g_error_matches(error, PR_SANDBOX_ERROR, PR_SANDBOX_ERROR_USER));
		HOLDS(strstr(error->message, words));
		_exit(0);
	}
	assert_int_equal(waitpid(child, &status, 0), child);
	assert_true(WIFEXITED(status));
	assert_int_equal(WEXITSTATUS(status), 0);
}

static void a_wrong_user_is_named(void **state)
{
	if (geteuid() != 0)
		skip();
	expect_refusal(&(PrSandbox){.user = "no-such-user"}, 0, "--user 'no-such-user'");
	expect_refusal(&(PrSandbox){.user = "nobody", .group = "no-such-group"}, 0,
		       "--group 'no-such-group'");
	expect_refusal(&(PrSandbox){.user = "nobody"}, 65534,
		       "only root can change to another user");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_sandboxed_engine_starts_no_program),
		cmocka_unit_test(a_sandboxed_engine_can_change_nothing_else),
		cmocka_unit_test(a_sandboxed_engine_can_do_its_work),
		cmocka_unit_test(without_the_option_only_the_filter_is_missing),
		cmocka_unit_test(root_keeps_few_capabilities),
		cmocka_unit_test(all_threads_change_the_user),
		cmocka_unit_test(a_wrong_user_is_named),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
