/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The guest runs on one side only. After the hand-over, writes at the source do not reach the
 * destination. Before the hand-over, a failed migration resumes the source's guest, however long
 * that takes.
 */
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "migration/core/crash-point.h"
#include "tests/integration/cases.h"

#define MIB	    (1024ull * 1024)
#define PAGE	    4096
#define PATIENCE_US (60 * G_USEC_PER_SEC)

/* Waits until the reason in a side's status contains these words. */
static void wait_reason(Side *side, const char *words)
{
	gint64 deadline = g_get_monotonic_time() + PATIENCE_US;

	for (;;) {
		g_auto(PrMigrationInfo) info = {0};

		pr_migration_query(side->engine, &info);
		if (info.reason && strstr(info.reason, words))
			return;
		if (g_get_monotonic_time() > deadline)
			g_error("%s never said \"%s\"; it says \"%s\"", side->name, words,
				info.reason);
		g_usleep(500); /* between two checks of the condition */
	}
}

static void full_speed(Pair *pair)
{
	pr_params_set(&pair->destination.params, "max-postcopy-bandwidth", 0, NULL);
}

/* Used by the crash-point hook. There is one pair at a time. */
static Pair *cancelled;
static gint fenced; /* atomic */

static void hook(PrCrashPoint point)
{
	if (point == PR_CRASH_SOURCE_LOADED && cancelled)
		pr_migration_cancel(cancelled->source.engine, NULL);
	if (point == PR_CRASH_SOURCE_FENCED)
		g_atomic_int_set(&fenced, TRUE);
}

static void begin_hook(Pair *cancel)
{
	cancelled = cancel;
	g_atomic_int_set(&fenced, FALSE);
	__atomic_store_n(&pr_crash_hook, hook, __ATOMIC_RELEASE);
}

static void end_hook(void)
{
	__atomic_store_n(&pr_crash_hook, NULL, __ATOMIC_RELEASE);
}

static void migrate_and_cancel(Pair *pair)
{
	begin_hook(pair);
	pair_migrate(pair);
}

static void migrate_until_fenced(Pair *pair)
{
	gint64 deadline = g_get_monotonic_time() + PATIENCE_US;

	begin_hook(NULL);
	pair_migrate(pair);
	while (!g_atomic_int_get(&fenced)) {
		g_assert_cmpint(g_get_monotonic_time(), <, deadline);
		g_usleep(500); /* between two checks of the condition */
	}
	end_hook();
}

/*
 * Waits until the write protection blocks a thread of the guest. That thread can't be parked any
 * more.
 */
static void wait_blocked(TestGuest *guest)
{
	gint64 deadline = g_get_monotonic_time() + PATIENCE_US;

	while (testguest_pause(guest, 500)) {
		g_assert_cmpint(g_get_monotonic_time(), <, deadline);
		testguest_resume(guest);
	}
}

static void wait_parked(TestGuest *guest)
{
	gint64 deadline = g_get_monotonic_time() + PATIENCE_US;

	while (!testguest_pause(guest, 500))
		g_assert_cmpint(g_get_monotonic_time(), <, deadline);
}

/*
 * After the hand-over the VMM resumes the guest at the source. The fence blocks the threads that
 * write. They stay blocked until the migration has completed, also during a recovery.
 */
static void writes_at_the_source_after_the_hand_over_do_not_arrive(void **state)
{
	PairConfig config = {.scheme = scheme_of(state), PAIR_LASTS};
	g_autoptr(Pair) pair = pair_new(&config);

	migrate_until_fenced(pair);
	testguest_resume(pair->source.guest);
	wait_blocked(pair->source.guest);
	pr_faults_cut_paths(pair->faults);
	pair_wait(pair, PR_STATE_POSTCOPY_PAUSED);
	/* The timeout is longer than the threads sleep between pages. */
	assert_false(testguest_pause(pair->source.guest, 500));
	full_speed(pair);
	pair_resume_until_completed(pair, 3);
	wait_parked(pair->source.guest);
	pair_check_completed(pair);
}

/*
 * Registers another userfaultfd over the source's RAM, so that the engine can't write-protect it.
 */
static int occupy_ram(TestGuest *guest)
{
	struct uffdio_api api = {.api = UFFD_API,
				 .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP |
					     UFFD_FEATURE_WP_HUGETLBFS_SHMEM};
	struct uffdio_register reg = {
		.range = {.start = (uintptr_t)testguest_block_map(guest, 0), .len = PAGE},
		.mode = UFFDIO_REGISTER_MODE_WP,
	};
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	if (fd < 0 || ioctl(fd, UFFDIO_API, &api) < 0) {
		print_message("skipped: no userfaultfd with write protection here\n");
		skip();
	}
	assert_int_equal(ioctl(fd, UFFDIO_REGISTER, &reg), 0);
	return fd;
}

static void a_missing_fence_is_reported_on_both_sides(void **state)
{
	PairConfig config = {.scheme = "tcp", PAIR_LASTS};
	g_autoptr(Pair) pair = pair_new(&config);
	int fd = occupy_ram(pair->source.guest);

	pair_migrate(pair);
	wait_reason(&pair->source, "the source's RAM is not write-protected");
	wait_reason(&pair->destination, "the source says: the source's RAM is not write-protected");
	/* The message is sent again over each new connection. */
	pr_faults_cut_paths(pair->faults);
	pair_wait(pair, PR_STATE_POSTCOPY_PAUSED);
	pair_resume(pair);
	wait_reason(&pair->destination, "the source says: the source's RAM is not write-protected");
	/* Once the other userfaultfd is closed, the engine's next try to fence succeeds. */
	close(fd);
	pair_wait_fenced(pair, TRUE);
	full_speed(pair);
	pair_wait(pair, PR_STATE_COMPLETED);
	pair_wait_fenced(pair, FALSE);
	pair_check_completed(pair);
}

static void a_cancelled_source_retries_until_its_guest_runs(void **state)
{
	/*
	 * Seven tries take about seven seconds, long enough for the test to see the state between
	 * them.
	 */
	PairConfig config = {.scheme = "tcp", .size = 4 * MIB, .refused_runs = 7};
	g_autoptr(Pair) pair = pair_new(&config);

	migrate_and_cancel(pair);
	wait_reason(&pair->source, "the guest does not run on here yet");
	assert_int_equal(side_state(&pair->source), PR_STATE_CANCELLING);
	side_wait(&pair->source, PR_STATE_CANCELLED);
	end_hook();
	assert_int_equal(testguest_refused_runs(pair->source.guest), 7);
	pair_check_undone(pair);
	/* The guest may be migrated again. */
	pair_wait_taken_back(pair);
	pair_migrate(pair);
	pair_wait(pair, PR_STATE_COMPLETED);
	pair_check_completed(pair);
}

/* Ending the engine ends the retries, which might never succeed. */
static void an_engine_can_be_ended_during_these_retries(void **state)
{
	PairConfig config = {.scheme = "tcp", .size = 4 * MIB, .refused_runs = 1000000};
	g_autoptr(Pair) pair = pair_new(&config);

	migrate_and_cancel(pair);
	wait_reason(&pair->source, "the guest does not run on here yet");
	side_end_engine(&pair->source);
	end_hook();
	assert_false(testguest_running(pair->source.guest));
	side_begin_engine(&pair->source);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		BOTH(writes_at_the_source_after_the_hand_over_do_not_arrive),
		cmocka_unit_test(a_missing_fence_is_reported_on_both_sides),
		cmocka_unit_test(a_cancelled_source_retries_until_its_guest_runs),
		cmocka_unit_test(an_engine_can_be_ended_during_these_retries),
	};

	return RUN_CASES("fenced", tests);
}
