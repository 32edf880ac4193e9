/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The attach helper, with a process that the test has started (attach-guest.h). Needs root. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "guest/agent-client.h"
#include "guest/attach/attach.h"
#include "guest/attach/internal.h"
#include "guest/attach/crash-point.h"
#include "tests/rigs/attach-guest.h"

#define TIMEOUT 20000 /* ms; the machine may be busy with other tests */
#define ROUNDS	200

typedef struct Attached {
	PrAgentClient *client;
	pid_t helper;
} Attached;

static PrAgentClient *try_attach(pid_t pid, pid_t *ret_helper, GError **error)
{
	PrGuestHelper helper = PR_GUEST_HELPER_NONE;
	int pidfd = (int)syscall(SYS_pidfd_open, pid, 0);

	assert_true(pidfd >= 0);
	helper.fd = pr_attach_fork(TRUE, &helper.pid);
	assert_true(helper.fd >= 0);
	*ret_helper = helper.pid;
	return pr_agent_client_attach(&helper, pid, pidfd, TIMEOUT, error);
}

static Attached attach(AttachGuest *guest)
{
	g_autoptr(GError) error = NULL;
	Attached attached;

	attached.client = try_attach(attach_guest_pid(guest), &attached.helper, &error);
	if (error)
		print_error("%s\n", error->message);
	assert_non_null(attached.client);
	return attached;
}

static void detach(Attached *attached)
{
	g_clear_pointer(&attached->client, pr_agent_client_free);
}
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(Attached, detach)

static void check(gboolean ok, GError *error)
{
	if (error)
		print_error("%s\n", error->message);
	assert_true(ok);
	assert_null(error);
}

static const PrGuestBlock *find_at(GArray *regions, uint64_t base)
{
	for (guint i = 0; i < regions->len; i++) {
		const PrGuestBlock *block = &g_array_index(regions, PrGuestBlock, i);

		if (block->base == base)
			return block;
	}
	return NULL;
}

/* Chooses the memfd as the guest's RAM, but not the file in the tmpfs. Returns the memfd. */
static int choose(Attached *attached, AttachGuest *guest)
{
	g_autoptr(GError) error = NULL;
	g_autoptr(GArray) regions = pr_agent_client_regions(attached->client, &error);
	const PrGuestBlock *block;
	int memfd;

	check(regions != NULL, error);
	block = find_at(regions, attach_guest_memfd(guest));
	assert_non_null(block);
	check(pr_agent_client_choose(attached->client, block, 1, &error), error);
	memfd = fcntl(block->memfd, F_DUPFD_CLOEXEC, 3);
	assert_true(memfd >= 0);
	return memfd;
}

static int uffd_enable(Attached *attached)
{
	g_autoptr(GError) error = NULL;
	int uffd = pr_agent_client_uffd_enable(attached->client, &error);

	check(uffd >= 0, error);
	return uffd;
}

/* The helper may close descriptors after a reply. It does so before the next one. */
static void wait_closed(Attached *attached)
{
	g_autoptr(GError) error = NULL;
	int fd = pr_agent_client_fetch_state(attached->client, &error);

	if (fd >= 0)
		close(fd);
	check(TRUE, error);
}

static void uffd_disable(Attached *attached)
{
	g_autoptr(GError) error = NULL;

	check(pr_agent_client_uffd_disable(attached->client, &error), error);
	wait_closed(attached);
}

static void fence_on(Attached *attached)
{
	g_autoptr(GError) error = NULL;

	check(pr_agent_client_fence_on(attached->client, &error), error);
}

static void fence_off(Attached *attached)
{
	g_autoptr(GError) error = NULL;

	check(pr_agent_client_fence_off(attached->client, &error), error);
	wait_closed(attached);
}

static void wait_readable(int fd)
{
	struct pollfd entry = {.fd = fd, .events = POLLIN};

	assert_int_equal(poll(&entry, 1, TIMEOUT), 1);
}

/* Serves a fault as an engine does: writes the page, then CONTINUE. */
static void serve_fault(int uffd, AttachGuest *guest, int memfd, uint64_t at, uint8_t value)
{
	struct uffdio_continue go = {
		.range = {.start = at & ~(uint64_t)(ATTACH_PAGE - 1), .len = ATTACH_PAGE}};
	struct uffd_msg msg;

	wait_readable(uffd);
	assert_int_equal(read(uffd, &msg, sizeof(msg)), sizeof(msg));
	assert_int_equal(msg.event, UFFD_EVENT_PAGEFAULT);
	assert_int_equal(msg.arg.pagefault.address & ~(uint64_t)(ATTACH_PAGE - 1), go.range.start);
	assert_int_equal(pwrite(memfd, &value, 1,
				(off_t)(at - attach_guest_memfd(guest) + ATTACH_MEMFD_OFFSET)),
			 1);
	assert_int_equal(ioctl(uffd, UFFDIO_CONTINUE, &go), 0);
}

/* Reads a page that had data, and one that never existed. */
static void check_faults(Attached *attached, AttachGuest *guest, int memfd)
{
	int uffd = uffd_enable(attached);

	for (guint page = 0; page < ATTACH_MEMFD_PAGES; page += ATTACH_MEMFD_PAGES - 1) {
		uint64_t at = attach_guest_memfd(guest) + page * ATTACH_PAGE + 7;
		pid_t thread = attach_guest_read(guest, at);
		uint8_t value;

		serve_fault(uffd, guest, memfd, at, 40 + page);
		assert_int_equal(attach_guest_done(guest, &value), thread);
		assert_int_equal(value, 40 + page);
	}
	close(uffd);
}

/* Tests */

static void shared_memory_is_found_and_joined(void **state)
{
	g_autoptr(AttachGuest) guest = attach_guest_new();
	g_auto(Attached) attached = attach(guest);
	g_autoptr(GError) error = NULL;
	g_autoptr(GArray) regions = pr_agent_client_regions(attached.client, &error);
	const PrGuestBlock *memfd, *tmpfs;
	uint8_t value = 0;

	check(regions != NULL, error);
	memfd = find_at(regions, attach_guest_memfd(guest));
	tmpfs = find_at(regions, attach_guest_tmpfs(guest));
	assert_non_null(memfd);
	assert_non_null(tmpfs);
	assert_int_equal(regions->len, 2);
	assert_int_equal(memfd->size, ATTACH_MEMFD_PAGES * ATTACH_PAGE);
	assert_int_equal(memfd->memfd_offset, ATTACH_MEMFD_OFFSET);
	assert_int_equal(memfd->page_size, ATTACH_PAGE);
	assert_int_equal(tmpfs->size, ATTACH_TMPFS_PAGES * ATTACH_PAGE);
	attach_guest_write(guest, memfd->base + 5, 77);
	attach_guest_done(guest, NULL);
	assert_int_equal(pread(memfd->memfd, &value, 1, ATTACH_MEMFD_OFFSET + 5), 1);
	assert_int_equal(value, 77);
}

static void faults_are_served(void **state)
{
	g_autoptr(AttachGuest) guest = attach_guest_new();
	g_auto(Attached) attached = attach(guest);
	uint64_t base = attach_guest_memfd(guest);
	g_autoptr(GError) error = NULL;
	guint files;
	int memfd = choose(&attached, guest);

	attach_guest_write(guest, base, 3);
	attach_guest_done(guest, NULL);
	files = attach_guest_files(guest);
	check(pr_agent_client_probe(attached.client, &error), error);
	assert_int_equal(attach_guest_files(guest), files);
	check_faults(&attached, guest, memfd);
	assert_int_equal(attach_guest_files(guest), files + 1);
	/* Regions that were not chosen are not registered. */
	assert_int_equal(attach_guest_value(guest, attach_guest_tmpfs(guest)), 0);
	uffd_disable(&attached);
	assert_int_equal(attach_guest_files(guest), files);
	assert_int_equal(attach_guest_value(guest, base + 9 * ATTACH_PAGE), 0);
	close(memfd);
}

/* A thread that waits for a page continues when the fault mode is turned off. */
static void uffd_disable_wakes_waiting_threads(void **state)
{
	g_autoptr(AttachGuest) guest = attach_guest_new();
	g_auto(Attached) attached = attach(guest);
	int memfd = choose(&attached, guest);
	int uffd = uffd_enable(&attached);
	pid_t thread = attach_guest_read(guest, attach_guest_memfd(guest));

	attach_guest_wait_faulting(guest, thread);
	uffd_disable(&attached);
	assert_int_equal(attach_guest_done(guest, NULL), thread);
	close(uffd);
	close(memfd);
}

static void kill_helper(Attached *attached)
{
	kill(attached->helper, SIGKILL);
}

static ino_t inode_of(int fd)
{
	struct stat st;

	assert_int_equal(fstat(fd, &st), 0);
	return st.st_ino;
}

static int new_state(char mark)
{
	int fd = memfd_create(PR_AGENT_STATE_NAME, MFD_CLOEXEC);

	assert_true(fd >= 0);
	assert_int_equal(write(fd, &mark, 1), 1);
	return fd;
}

static void store_state(Attached *attached, int fd)
{
	g_autoptr(GError) error = NULL;

	check(pr_agent_client_store_state_fd(attached->client, fd, &error), error);
}

static int fetch_state(Attached *attached)
{
	g_autoptr(GError) error = NULL;
	int fd = pr_agent_client_fetch_state(attached->client, &error);

	assert_null(error);
	return fd;
}

static void parked_descriptors_outlive_helpers(void **state)
{
	g_autoptr(AttachGuest) guest = attach_guest_new();
	g_auto(Attached) first = attach(guest);
	g_auto(Attached) second = {0};
	uint64_t at = attach_guest_memfd(guest) + 3 * ATTACH_PAGE;
	int memfd = choose(&first, guest), stored = new_state('1'), fetched, uffd;
	guint files = attach_guest_files(guest);
	uint8_t value;

	assert_int_equal(fetch_state(&first), -1);
	store_state(&first, stored);
	close(uffd_enable(&first));
	attach_guest_read(guest, at);
	kill_helper(&first);
	detach(&first);

	second = attach(guest);
	assert_true(pr_agent_client_was_faulting(second.client));
	fetched = fetch_state(&second);
	assert_int_equal(inode_of(fetched), inode_of(stored));
	close(choose(&second, guest));
	uffd = uffd_enable(&second);
	serve_fault(uffd, guest, memfd, at, 99);
	attach_guest_done(guest, &value);
	assert_int_equal(value, 99);
	uffd_disable(&second);
	store_state(&second, -1);
	assert_int_equal(attach_guest_files(guest), files);
	assert_int_equal(fetch_state(&second), -1);
	detach(&second);
	second = attach(guest);
	assert_false(pr_agent_client_was_faulting(second.client));
	close(uffd);
	close(fetched);
	close(stored);
	close(memfd);
}

static void a_newer_state_replaces_the_older(void **state)
{
	g_autoptr(AttachGuest) guest = attach_guest_new();
	g_auto(Attached) attached = attach(guest);
	guint files = attach_guest_files(guest);

	for (guint i = 0; i < 3; i++) {
		int stored = new_state((char)('1' + i)), fetched;

		store_state(&attached, stored);
		fetched = fetch_state(&attached);
		assert_int_equal(inode_of(fetched), inode_of(stored));
		assert_int_equal(attach_guest_files(guest), files + 1);
		close(fetched);
		close(stored);
	}
}

static void the_fence_blocks_writers_but_not_readers(void **state)
{
	g_autoptr(AttachGuest) guest = attach_guest_new();
	g_auto(Attached) attached = attach(guest);
	uint64_t base = attach_guest_memfd(guest);
	guint files = attach_guest_files(guest);
	int memfd = choose(&attached, guest);
	pid_t old, fresh;

	attach_guest_write(guest, base, 1);
	attach_guest_done(guest, NULL);
	fence_on(&attached);
	fence_on(&attached);
	assert_int_equal(attach_guest_files(guest), files + 1);
	old = attach_guest_write(guest, base, 2);
	fresh = attach_guest_write(guest, base + 20 * ATTACH_PAGE, 2);
	attach_guest_wait_faulting(guest, old);
	attach_guest_wait_faulting(guest, fresh);
	assert_int_equal(attach_guest_value(guest, base), 1);
	assert_int_equal(attach_guest_value(guest, base + 20 * ATTACH_PAGE), 0);
	/* Memory that is not the guest's RAM is not fenced. */
	attach_guest_write(guest, attach_guest_tmpfs(guest), 5);
	attach_guest_done(guest, NULL);
	kill_helper(&attached);
	detach(&attached);
	assert_int_equal(attach_guest_value(guest, base), 1);

	attached = attach(guest);
	close(choose(&attached, guest));
	fence_off(&attached);
	attach_guest_done(guest, NULL);
	attach_guest_done(guest, NULL);
	assert_int_equal(attach_guest_value(guest, base), 2);
	assert_int_equal(attach_guest_files(guest), files);
	fence_off(&attached);
	close(memfd);
}

/* FENCE_OFF must work although a main thread that the fence blocks can't be stopped. */
static void a_main_thread_that_waits_at_the_fence_is_released(void **state)
{
	g_autoptr(AttachGuest) guest = attach_guest_new();
	g_auto(Attached) attached = attach(guest);
	uint64_t base = attach_guest_memfd(guest);
	guint files = attach_guest_files(guest);
	pid_t thread;

	close(choose(&attached, guest));
	fence_on(&attached);
	thread = attach_guest_write_in_main(guest, base, 6);
	attach_guest_wait_faulting(guest, thread);
	fence_off(&attached);
	assert_int_equal(attach_guest_done(guest, NULL), thread);
	assert_int_equal(attach_guest_value(guest, base), 6);
	assert_int_equal(attach_guest_files(guest), files);
}

static void assert_refused(pid_t pid, int code, const char *words)
{
	g_autoptr(GError) error = NULL;
	pid_t helper;

	assert_null(try_attach(pid, &helper, &error));
	if (!strstr(error->message, words))
		print_error("expected '%s' in: %s\n", words, error->message);
	assert_true(g_error_matches(error, PR_GUEST_ERROR, code));
	assert_non_null(strstr(error->message, words));
}

/* An engine whose helper has ended keeps the lock, as it may still write to the guest's memory. */
static void one_engine_at_a_time(void **state)
{
	g_autoptr(AttachGuest) guest = attach_guest_new();
	g_auto(Attached) first = attach(guest);
	g_auto(Attached) second = {0};
	pid_t pid = attach_guest_pid(guest);

	assert_refused(pid, PR_GUEST_ERROR_REFUSED, "another engine is attached");
	kill_helper(&first);
	assert_refused(pid, PR_GUEST_ERROR_REFUSED, "another engine is attached");
	detach(&first);
	second = attach(guest);
}

static void assert_probe_refused(Attached *attached, const char *words)
{
	g_autoptr(GError) error = NULL;

	assert_false(pr_agent_client_probe(attached->client, &error));
	if (!strstr(error->message, words))
		print_error("expected '%s' in: %s\n", words, error->message);
	assert_non_null(strstr(error->message, words));
}

static void a_process_that_is_gone_is_refused(void **state)
{
	pid_t pid = fork();

	if (pid == 0)
		_exit(0);
	/* A zombie: the process has ended, but its pid is still in use. */
	siginfo_t info;
	waitid(P_PID, pid, &info, WEXITED | WNOWAIT);
	assert_refused(pid, PR_GUEST_ERROR_REFUSED, "is gone");
	waitpid(pid, NULL, 0);
}

static void a_stopped_process_is_refused_with_the_remedy(void **state)
{
	g_autoptr(AttachGuest) guest = attach_guest_new();
	g_auto(Attached) attached = attach(guest);
	pid_t pid = attach_guest_pid(guest);
	g_autoptr(GError) error = NULL;

	close(choose(&attached, guest));
	kill(pid, SIGSTOP);
	assert_probe_refused(&attached, "kill -CONT");
	kill(pid, SIGCONT);
	check(pr_agent_client_probe(attached.client, &error), error);
}

/* Returns the pid of a process that traces this one. */
static pid_t start_debugger(pid_t pid)
{
	int pair[2];
	char byte;
	pid_t debugger;

	assert_int_equal(pipe(pair), 0);
	debugger = fork();
	if (debugger == 0) {
		if (ptrace(PTRACE_SEIZE, pid, 0, 0) == 0 && write(pair[1], "", 1) == 1)
			pause();
		_exit(1);
	}
	close(pair[1]);
	assert_int_equal(read(pair[0], &byte, 1), 1);
	close(pair[0]);
	return debugger;
}

static void a_debugger_is_named(void **state)
{
	g_autoptr(AttachGuest) guest = attach_guest_new();
	g_auto(Attached) attached = attach(guest);
	g_autoptr(GError) error = NULL;
	pid_t debugger = start_debugger(attach_guest_pid(guest));
	g_autofree char *words = g_strdup_printf("traced by process %d", (int)debugger);

	close(choose(&attached, guest));
	assert_probe_refused(&attached, words);
	kill(debugger, SIGKILL);
	waitpid(debugger, NULL, 0);
	check(pr_agent_client_probe(attached.client, &error), error);
}

static void a_main_thread_that_never_rests_in_poll_is_refused(void **state)
{
	g_autoptr(AttachGuest) guest = attach_guest_new();
	g_auto(Attached) attached = attach(guest);

	close(choose(&attached, guest));
	attach_guest_leave_poll(guest);
	assert_probe_refused(&attached, "never slept in ppoll");
}

typedef struct SignalSender {
	pid_t pid;
	gint stop; /* atomic */
	guint sent;
} SignalSender;

static gpointer send_signals(gpointer data)
{
	SignalSender *sender = data;

	while (!g_atomic_int_get(&sender->stop)) {
		sender->sent += syscall(SYS_tgkill, sender->pid, sender->pid, SIGUSR1) == 0;
		g_usleep(100);
	}
	return NULL;
}

/* Signals arrive as without a tracer, and no system call is lost or made twice. */
static void signals_are_delivered_and_no_call_is_lost(void **state)
{
	g_autoptr(AttachGuest) guest = attach_guest_new();
	g_auto(Attached) attached = attach(guest);
	guint files = attach_guest_files(guest);
	SignalSender sender = {.pid = attach_guest_pid(guest)};
	int stored = new_state('1');
	GThread *thread = g_thread_new("sender", send_signals, &sender);

	for (guint i = 0; i < ROUNDS; i++)
		store_state(&attached, stored);
	g_atomic_int_set(&sender.stop, 1);
	g_thread_join(thread);
	assert_true(attach_guest_signals(guest) > 0);
	assert_int_equal(attach_guest_files(guest), files + 1);
	close(choose(&attached, guest));
	assert_int_equal(attach_guest_value(guest, attach_guest_memfd(guest)), 0);
	close(stored);
}

typedef struct Death {
	GMutex lock;
	GCond cond;
	guint calls;  /* lock */
	char *reason; /* lock */
} Death;

static void on_died(const char *reason, void *opaque)
{
	Death *death = opaque;

	g_mutex_lock(&death->lock);
	death->calls++;
	death->reason = g_strdup(reason);
	g_cond_broadcast(&death->cond);
	g_mutex_unlock(&death->lock);
}

static void assert_alive(Death *death)
{
	g_mutex_lock(&death->lock);
	assert_int_equal(death->calls, 0);
	g_mutex_unlock(&death->lock);
}

static void wait_death(Death *death)
{
	gint64 deadline = g_get_monotonic_time() + TIMEOUT * G_TIME_SPAN_MILLISECOND;

	g_mutex_lock(&death->lock);
	while (!death->calls)
		assert_true(g_cond_wait_until(&death->cond, &death->lock, deadline));
	assert_int_equal(death->calls, 1);
	assert_non_null(strstr(death->reason, "the process has ended"));
	g_mutex_unlock(&death->lock);
	g_free(death->reason);
}

static void the_end_of_the_process_is_reported(void **state)
{
	g_autoptr(AttachGuest) guest = attach_guest_new();
	g_auto(Attached) attached = attach(guest);
	g_autoptr(GError) error = NULL;
	Death death = {0};

	pr_agent_client_on_death(attached.client, on_died, &death);
	kill(attach_guest_pid(guest), SIGKILL);
	wait_death(&death);
	assert_false(pr_agent_client_uffd_disable(attached.client, &error));
	assert_true(g_error_matches(error, PR_GUEST_ERROR, PR_GUEST_ERROR_DIED));
}

/* After the helper has ended calls fail. The guest's end is reported only when it comes. */
static void the_end_of_the_helper_is_not_reported_as_the_guests(void **state)
{
	g_autoptr(AttachGuest) guest = attach_guest_new();
	g_auto(Attached) attached = attach(guest);
	Death death = {0};

	pr_agent_client_on_death(attached.client, on_died, &death);
	kill_helper(&attached);
	for (guint i = 0; i < 2; i++) {
		g_autoptr(GError) error = NULL;

		assert_false(pr_agent_client_uffd_disable(attached.client, &error));
		assert_true(g_error_matches(error, PR_GUEST_ERROR, PR_GUEST_ERROR_UNREACHABLE));
		assert_non_null(strstr(error->message, "--resume"));
	}
	assert_int_equal(attach_guest_value(guest, attach_guest_memfd(guest)), 0);
	assert_alive(&death);
	kill(attach_guest_pid(guest), SIGKILL);
	wait_death(&death);
}

/* Crash points */

static PrAttachCrashPoint wanted; /* constant in a helper */

static void die_at_wanted_point(PrAttachCrashPoint point)
{
	if (point == wanted)
		kill(getpid(), SIGKILL);
}

static void run_all_steps(Attached *attached, AttachGuest *guest, int stored, int ret_uffd[1])
{
	PrAgentClient *client = attached->client;
	g_autoptr(GArray) regions = pr_agent_client_regions(client, NULL);

	ret_uffd[0] = -1;
	if (regions)
		pr_agent_client_choose(client, find_at(regions, attach_guest_memfd(guest)), 1,
				       NULL);
	pr_agent_client_store_state_fd(client, stored, NULL);
	pr_agent_client_store_state_fd(client, stored, NULL);
	ret_uffd[0] = pr_agent_client_uffd_enable(client, NULL);
	pr_agent_client_uffd_disable(client, NULL);
	pr_agent_client_fence_on(client, NULL);
	pr_agent_client_fence_off(client, NULL);
	pr_agent_client_store_state_fd(client, -1, NULL);
}

static void assert_killed(pid_t helper, PrAttachCrashPoint point)
{
	gint64 deadline = g_get_monotonic_time() + TIMEOUT * G_TIME_SPAN_MILLISECOND;
	siginfo_t info = {0};

	while (waitid(P_PID, helper, &info, WEXITED | WNOWAIT | WNOHANG) == 0 && !info.si_pid &&
	       g_get_monotonic_time() < deadline)
		g_usleep(1000);
	if (info.si_code != CLD_KILLED)
		print_error("the helper was not killed at %s\n", pr_attach_crash_point_name(point));
	assert_int_equal(info.si_code, CLD_KILLED);
}

static void kill_helper_at(AttachGuest *guest, PrAttachCrashPoint point)
{
	int stored = new_state('1'), uffd;
	Attached attached;

	wanted = point;
	pr_attach_crash_hook = die_at_wanted_point;
	attached = attach(guest);
	pr_attach_crash_hook = NULL;
	run_all_steps(&attached, guest, stored, &uffd);
	assert_killed(attached.helper, point);
	detach(&attached);
	if (uffd >= 0)
		close(uffd);
	close(stored);
}

/* The process goes on running, and the next helper can work with it. */
static void a_process_survives_a_helper_killed_at_any_crash_point(void **state)
{
	for (PrAttachCrashPoint point = 0; point < PR_ATTACH_N_CRASH_POINTS; point++) {
		g_autoptr(AttachGuest) guest = attach_guest_new();
		g_auto(Attached) attached = {0};
		int memfd, stored = new_state('2'), fetched;

		kill_helper_at(guest, point);
		attached = attach(guest);
		memfd = choose(&attached, guest);
		uffd_disable(&attached);
		store_state(&attached, stored);
		fetched = fetch_state(&attached);
		assert_int_equal(inode_of(fetched), inode_of(stored));
		check_faults(&attached, guest, memfd);
		uffd_disable(&attached);
		fence_on(&attached);
		fence_off(&attached);
		attach_guest_write(guest, attach_guest_memfd(guest), 9);
		attach_guest_done(guest, NULL);
		assert_int_equal(attach_guest_value(guest, attach_guest_memfd(guest)), 9);
		close(fetched);
		close(memfd);
		close(stored);
	}
}

/* The killed helper has parked a userfaultfd, and has registered only some regions. */
static void the_next_helper_completes_a_partial_uffd_enable(void **state)
{
	static const PrAttachCrashPoint points[] = {PR_ATTACH_CRASH_UFFD_MADE,
						    PR_ATTACH_CRASH_UFFD_READY,
						    PR_ATTACH_CRASH_REGISTERED,
						    PR_ATTACH_CRASH_ENTRIES_DROPPED};

	for (guint i = 0; i < G_N_ELEMENTS(points); i++) {
		g_autoptr(AttachGuest) guest = attach_guest_new();
		g_auto(Attached) attached = {0};
		guint files = attach_guest_files(guest);
		int memfd;

		attach_guest_write(guest, attach_guest_memfd(guest), 1);
		attach_guest_done(guest, NULL);
		kill_helper_at(guest, points[i]);
		attached = attach(guest);
		memfd = choose(&attached, guest);
		check_faults(&attached, guest, memfd);
		uffd_disable(&attached);
		store_state(&attached, -1);
		/* The killed helper may have left the descriptor of the device open. */
		assert_in_range(attach_guest_files(guest), files, files + 1);
		close(memfd);
	}
}

static void the_memory_is_opened_for_the_engine(void **state)
{
	g_autoptr(AttachGuest) guest = attach_guest_new();
	g_auto(Attached) attached = attach(guest);
	g_autoptr(GError) error = NULL;
	uint64_t at = attach_guest_tmpfs(guest) + 12;
	int memory = pr_agent_client_memory(attached.client, &error);
	uint8_t value = 123;

	check(memory >= 0, error);
	assert_int_equal(pwrite(memory, &value, 1, (off_t)at), 1);
	assert_int_equal(attach_guest_value(guest, at), 123);
	close(memory);
	/* The process inherited this test's standard error, which may be a file or not. */
	close(pr_agent_client_stderr(attached.client, &error));
	assert_null(error);
}

#define TEST(name) cmocka_unit_test(name)

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		TEST(shared_memory_is_found_and_joined),
		TEST(faults_are_served),
		TEST(uffd_disable_wakes_waiting_threads),
		TEST(parked_descriptors_outlive_helpers),
		TEST(a_newer_state_replaces_the_older),
		TEST(the_fence_blocks_writers_but_not_readers),
		TEST(a_main_thread_that_waits_at_the_fence_is_released),
		TEST(one_engine_at_a_time),
		TEST(a_process_that_is_gone_is_refused),
		TEST(a_stopped_process_is_refused_with_the_remedy),
		TEST(a_debugger_is_named),
		TEST(a_main_thread_that_never_rests_in_poll_is_refused),
		TEST(signals_are_delivered_and_no_call_is_lost),
		TEST(the_end_of_the_process_is_reported),
		TEST(the_end_of_the_helper_is_not_reported_as_the_guests),
		TEST(a_process_survives_a_helper_killed_at_any_crash_point),
		TEST(the_next_helper_completes_a_partial_uffd_enable),
		TEST(the_memory_is_opened_for_the_engine),
	};

	attach_guest_main(argc, argv);
	if (geteuid() != 0 || !attach_has_injector) {
		print_message("skipped: needs root, and an architecture with an injector\n");
		return 77;
	}
	cmocka_set_test_filter(g_getenv("TEST_FILTER"));
	return cmocka_run_group_tests(tests, NULL, NULL);
}
