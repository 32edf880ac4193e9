/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The guest runs on one side: what anybody does to the source's guest after the hand-over does not come to the destination;
 * and before the hand-over the source's guest runs on, however long that takes. */
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

/* Waits until a side's reason has these words. */
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
		g_usleep(500); /* between two looks at the condition */
	}
}

static void full_speed(Pair *pair)
{
	pr_params_set(&pair->destination.params, "max-postcopy-bandwidth", 0, NULL);
}

/* What the hook looks for: there is one pair at a time. */
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
		g_usleep(500); /* between two looks at the condition */
	}
	end_hook();
}

/* Waits until some thread of the guest waits to write: it can't be parked any more. */
static void wait_stuck(TestGuest *guest)
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

/* Its VMM lets the guest run at the source, while its pages are on their way: its threads would write them. They wait
 * until everything has moved, also while the engine is another one. */
static void what_runs_at_the_source_changes_nothing(void **state)
{
	PairConfig config = {.scheme = scheme_of(state), PAIR_LASTS};
	g_autoptr(Pair) pair = pair_new(&config);

	migrate_until_fenced(pair);
	testguest_resume(pair->source.guest);
	wait_stuck(pair->source.guest);
	pr_faults_cut_paths(pair->faults);
	pair_wait(pair, PR_STATE_POSTCOPY_PAUSED);
	assert_false(testguest_pause(pair->source.guest, 500)); /* longer than its threads rest */
	full_speed(pair);
	pair_resume_until_completed(pair, 3);
	wait_parked(pair->source.guest);
	pair_check_completed(pair);
}

/* Another userfaultfd over the source's RAM keeps the fence out. */
static int occupy(TestGuest *guest)
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

static void a_fence_that_cannot_be_had_is_told_on_both_sides(void **state)
{
	PairConfig config = {.scheme = "tcp", PAIR_LASTS};
	g_autoptr(Pair) pair = pair_new(&config);
	int fd = occupy(pair->source.guest);

	pair_migrate(pair);
	wait_reason(&pair->source, "the source's RAM is not write-protected");
	wait_reason(&pair->destination, "the source says: the source's RAM is not write-protected");
	/* Over each new connection, too. */
	pr_faults_cut_paths(pair->faults);
	pair_wait(pair, PR_STATE_POSTCOPY_PAUSED);
	pair_resume(pair);
	wait_reason(&pair->destination, "the source says: the source's RAM is not write-protected");
	/* What was in its way passes. */
	close(fd);
	pair_wait_fenced(pair, TRUE);
	full_speed(pair);
	pair_wait(pair, PR_STATE_COMPLETED);
	pair_wait_fenced(pair, FALSE);
	pair_check_completed(pair);
}

static void the_source_tries_until_its_guest_runs(void **state)
{
	/* Seven tries take about seven seconds: long enough to be seen trying. */
	PairConfig config = {.scheme = "tcp", .size = 4 * MIB, .refused_runs = 7};
	g_autoptr(Pair) pair = pair_new(&config);

	migrate_and_cancel(pair);
	wait_reason(&pair->source, "the guest does not run on here yet");
	assert_int_equal(side_state(&pair->source), PR_STATE_CANCELLING);
	side_wait(&pair->source, PR_STATE_CANCELLED);
	end_hook();
	assert_int_equal(testguest_refused_runs(pair->source.guest), 7);
	pair_check_undone(pair);
	/* And it may leave again. */
	pair_wait_taken_back(pair);
	pair_migrate(pair);
	pair_wait(pair, PR_STATE_COMPLETED);
	pair_check_completed(pair);
}

/* An engine that is to end does not wait for what may never come. */
static void an_engine_ends_while_it_tries(void **state)
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
		BOTH(what_runs_at_the_source_changes_nothing),
		cmocka_unit_test(a_fence_that_cannot_be_had_is_told_on_both_sides),
		cmocka_unit_test(the_source_tries_until_its_guest_runs),
		cmocka_unit_test(an_engine_ends_while_it_tries),
	};

	return RUN_CASES("fenced", tests);
}
