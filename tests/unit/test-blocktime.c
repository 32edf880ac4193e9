/* SPDX-License-Identifier: GPL-2.0-or-later */
/* How long threads have waited for pages. The tests pass the time in. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "migration/postcopy/blocktime.h"

static const uint32_t two[] = {101, 102};

static PrBlocktimeInfo read_info(PrBlocktime *times, int64_t now_ns)
{
	PrBlocktimeInfo info;

	pr_blocktime_read(times, now_ns, &info);
	return info;
}

static PrThreadTime thread_at(PrBlocktime *times, guint i, int64_t now_ns)
{
	PrBlocktimeInfo info = read_info(times, now_ns);
	PrThreadTime time = g_array_index(info.threads, PrThreadTime, i);

	assert_true(i < info.threads->len);
	g_array_unref(info.threads);
	return time;
}

static guint n_threads(PrBlocktime *times)
{
	PrBlocktimeInfo info = read_info(times, 1);
	guint n = info.threads->len;

	g_array_unref(info.threads);
	return n;
}

static uint64_t all_blocked(PrBlocktime *times, int64_t now_ns)
{
	PrBlocktimeInfo info = read_info(times, now_ns);

	g_array_unref(info.threads);
	return info.all_blocked_ns;
}

static void expect_thread(PrBlocktime *times, guint i, uint64_t blocked_ns, uint64_t faults,
			  uint64_t latency_ns)
{
	PrThreadTime time = thread_at(times, i, 1000000);

	assert_int_equal(time.blocked_ns, blocked_ns);
	assert_int_equal(time.faults, faults);
	assert_int_equal(time.latency_ns, latency_ns);
}

static void sums_up_each_vcpus_waits(void **state)
{
	g_autoptr(PrBlocktime) times = pr_blocktime_new(two, 2);
	PrPageWait wait;

	pr_blocktime_blocked(times, 101, 100, &wait);
	pr_blocktime_woken(times, &wait, 130);
	pr_blocktime_blocked(times, 101, 200, &wait);
	pr_blocktime_woken(times, &wait, 210);
	pr_blocktime_blocked(times, 102, 300, &wait);
	pr_blocktime_woken(times, &wait, 305);

	assert_int_equal(thread_at(times, 0, 400).tid, 101);
	assert_int_equal(thread_at(times, 1, 400).tid, 102);
	expect_thread(times, 0, 40, 2, 20);
	expect_thread(times, 1, 5, 1, 5);
	assert_int_equal(all_blocked(times, 400), 0);
}

/* As QEMU's postcopy-blocktime: from the fault of the last vCPU until the first one is woken. */
static void counts_the_time_when_all_vcpus_wait(void **state)
{
	g_autoptr(PrBlocktime) times = pr_blocktime_new(two, 2);
	PrPageWait a, b;

	pr_blocktime_blocked(times, 101, 100, &a);
	pr_blocktime_blocked(times, 102, 150, &b);
	pr_blocktime_woken(times, &a, 170); /* all: 20 */
	pr_blocktime_blocked(times, 101, 180, &a);
	pr_blocktime_woken(times, &b, 200); /* all: 20 more */
	pr_blocktime_woken(times, &a, 900);
	assert_int_equal(all_blocked(times, 1000), 40);
	expect_thread(times, 0, 70 + 720, 2, 395);
	expect_thread(times, 1, 50, 1, 50);
}

static void others_do_not_count_as_vcpus(void **state)
{
	g_autoptr(PrBlocktime) times = pr_blocktime_new(two, 2);
	PrPageWait vcpu, other, unknown;

	pr_blocktime_blocked(times, 101, 100, &vcpu);
	pr_blocktime_blocked(times, 999, 110, &other);
	pr_blocktime_blocked(times, 0, 120, &unknown);
	pr_blocktime_woken(times, &other, 140);
	pr_blocktime_woken(times, &unknown, 130);
	pr_blocktime_woken(times, &vcpu, 200);

	PrBlocktimeInfo info = read_info(times, 300);
	assert_true(info.vcpus_known);
	assert_int_equal(info.all_blocked_ns, 0);
	assert_int_equal(info.threads->len, 2);
	assert_int_equal(info.other_faults, 2);
	assert_int_equal(info.other_latency_ns, 20);
	g_array_unref(info.threads);
}

static void expect_bounds(PrBlocktime *times, int64_t now_ns, uint64_t all_ns, uint64_t at_most_ns,
			  uint64_t other_ns)
{
	PrBlocktimeInfo info = read_info(times, now_ns);

	assert_int_equal(info.all_blocked_ns, all_ns);
	assert_int_equal(info.at_most_ns, at_most_ns);
	assert_int_equal(info.other_blocked_ns, other_ns);
	g_array_unref(info.threads);
}

/* Kworkers wait for the halted vCPUs of a Linux guest under KVM. */
static void waits_of_others_bound_the_time_from_above(void **state)
{
	g_autoptr(PrBlocktime) times = pr_blocktime_new(two, 2);
	PrPageWait a, b, vcpu;

	pr_blocktime_blocked(times, 901, 100, &a);
	expect_bounds(times, 150, 0, 0, 50);
	pr_blocktime_blocked(times, 902, 200, &b);
	expect_bounds(times, 250, 0, 50, 150);
	pr_blocktime_woken(times, &a, 300);
	expect_bounds(times, 350, 0, 100, 250);
	/* A vCPU that waits by itself beside a kworker. */
	pr_blocktime_blocked(times, 101, 400, &vcpu);
	pr_blocktime_woken(times, &b, 500);
	expect_bounds(times, 600, 0, 200, 400);
	pr_blocktime_woken(times, &vcpu, 700);
	/* Without other threads the upper bound is equal to the known time. */
	pr_blocktime_blocked(times, 101, 1000, &a);
	pr_blocktime_blocked(times, 102, 1100, &b);
	pr_blocktime_woken(times, &a, 1150);
	pr_blocktime_woken(times, &b, 1200);
	expect_bounds(times, 2000, 50, 250, 400);
}

static void waits_of_others_end_with_the_service(void **state)
{
	g_autoptr(PrBlocktime) times = pr_blocktime_new(two, 1);
	PrPageWait wait;

	pr_blocktime_blocked(times, 901, 100, &wait);
	pr_blocktime_close(times, 300);
	expect_bounds(times, 900, 0, 200, 200);
	pr_blocktime_woken(times, &wait, 950);
	expect_bounds(times, 990, 0, 200, 200);
}

static void distinguishes_vcpus_from_other_threads(void **state)
{
	g_autoptr(PrBlocktime) times = pr_blocktime_new(two, 2);
	g_autoptr(PrBlocktime) unknown = pr_blocktime_new(NULL, 0);

	assert_false(pr_blocktime_is_other(times, 101));
	assert_false(pr_blocktime_is_other(times, 102));
	assert_true(pr_blocktime_is_other(times, 103));
	assert_true(pr_blocktime_is_other(times, 0));
	/* Any of these may be a vCPU. */
	assert_false(pr_blocktime_is_other(unknown, 101));
	assert_true(pr_blocktime_is_other(unknown, 0));
}

/*
 * The thread was woken and faults again, before the fault thread has counted the end of the first
 * wait.
 */
static void a_new_wait_ends_the_one_before(void **state)
{
	g_autoptr(PrBlocktime) times = pr_blocktime_new(two, 1);
	PrPageWait first, second;

	pr_blocktime_blocked(times, 101, 100, &first);
	pr_blocktime_blocked(times, 101, 150, &second);
	pr_blocktime_woken(times, &first, 160);
	expect_thread(times, 0, 50 + (1000000 - 150), 1, 50);
	pr_blocktime_woken(times, &second, 170);
	pr_blocktime_woken(times, &second, 180);
	expect_thread(times, 0, 70, 2, 35);
	assert_int_equal(all_blocked(times, 1000), 70);
}

static void a_wait_that_goes_on_counts(void **state)
{
	g_autoptr(PrBlocktime) times = pr_blocktime_new(two, 2);
	PrPageWait a, b;

	pr_blocktime_blocked(times, 101, 100, &a);
	pr_blocktime_blocked(times, 102, 300, &b);
	assert_int_equal(thread_at(times, 0, 500).blocked_ns, 400);
	assert_int_equal(thread_at(times, 0, 500).faults, 0);
	assert_int_equal(thread_at(times, 1, 500).blocked_ns, 200);
	assert_int_equal(all_blocked(times, 500), 200);

	pr_blocktime_close(times, 600);
	assert_int_equal(thread_at(times, 0, 900).blocked_ns, 500);
	assert_int_equal(all_blocked(times, 900), 300);
	pr_blocktime_woken(times, &a, 950);
	assert_int_equal(thread_at(times, 0, 990).blocked_ns, 500);
}

/*
 * The vCPUs of this guest are not known. The first threads that fault are counted one by one, and
 * all others together.
 */
static void follows_the_first_threads_up_to_the_bound(void **state)
{
	g_autoptr(PrBlocktime) times = pr_blocktime_new(NULL, 0);
	PrPageWait wait;

	assert_int_equal(n_threads(times), 0);
	for (guint i = 0; i < PR_BLOCKTIME_LEARN + 10; i++) {
		/* ids that collide in a small table */
		pr_blocktime_blocked(times, 1 + i * 128, 1000 + i, &wait);
		pr_blocktime_woken(times, &wait, 1000 + 2 * i);
	}
	for (guint i = 0; i < PR_BLOCKTIME_LEARN; i++) {
		assert_int_equal(thread_at(times, i, 9999).tid, 1 + i * 128);
		assert_int_equal(thread_at(times, i, 9999).blocked_ns, i);
		assert_int_equal(thread_at(times, i, 9999).faults, 1);
	}
	PrBlocktimeInfo info = read_info(times, 9999);
	assert_false(info.vcpus_known);
	assert_int_equal(info.all_blocked_ns, 0);
	assert_int_equal(info.threads->len, PR_BLOCKTIME_LEARN);
	assert_int_equal(info.other_faults, 10);
	g_array_unref(info.threads);
}

/* -accel tcg,thread=single */
static void vcpus_of_one_thread_wait_together(void **state)
{
	static const uint32_t same[] = {7, 7, 7};
	g_autoptr(PrBlocktime) times = pr_blocktime_new(same, 3);
	PrPageWait wait;

	pr_blocktime_blocked(times, 7, 10, &wait);
	pr_blocktime_woken(times, &wait, 40);
	assert_int_equal(all_blocked(times, 50), 30);
	for (guint i = 0; i < 3; i++)
		expect_thread(times, i, 30, 1, 30);
}

static void knows_hundreds_of_vcpus(void **state)
{
	uint32_t many[512];
	PrPageWait waits[512];

	for (guint i = 0; i < G_N_ELEMENTS(many); i++)
		many[i] = 5000 + i;
	g_autoptr(PrBlocktime) times = pr_blocktime_new(many, G_N_ELEMENTS(many));
	for (guint i = 0; i < G_N_ELEMENTS(many); i++)
		pr_blocktime_blocked(times, many[i], 1000 + i, &waits[i]);
	for (guint i = 0; i < G_N_ELEMENTS(many); i++)
		pr_blocktime_woken(times, &waits[i], 2000 + i);
	for (guint i = 0; i < G_N_ELEMENTS(many); i++)
		expect_thread(times, i, 1000, 1, 1000);
	assert_int_equal(all_blocked(times, 9999), 2000 - 1511);
}

typedef struct Reader {
	PrBlocktime *times;
	gint stop;  /* atomic */
	gint looks; /* atomic */
} Reader;

static gpointer read_on(gpointer opaque)
{
	Reader *reader = opaque;

	while (!g_atomic_int_get(&reader->stop)) {
		PrBlocktimeInfo info = read_info(reader->times, 1000000);
		/* Each wait takes 1. */
		for (guint i = 0; i < info.threads->len; i++)
			g_assert_cmpuint(g_array_index(info.threads, PrThreadTime, i).latency_ns,
					 <=, 1);
		g_array_unref(info.threads);
		g_atomic_int_inc(&reader->looks);
	}
	return NULL;
}

/* Mainly for ThreadSanitizer: one thread reads while another one writes. */
static void can_be_read_by_another_thread(void **state)
{
	Reader reader = {.times = pr_blocktime_new(NULL, 0)};
	GThread *thread = g_thread_new("reader", read_on, &reader);
	PrPageWait wait;
	uint64_t rounds = 0;

	while (g_atomic_int_get(&reader.looks) < 100) {
		pr_blocktime_blocked(reader.times, 1 + rounds % 32, 1 + rounds, &wait);
		pr_blocktime_woken(reader.times, &wait, 2 + rounds);
		rounds++;
	}
	g_atomic_int_set(&reader.stop, TRUE);
	g_thread_join(thread);
	uint64_t faults = 0;
	for (guint i = 0; i < n_threads(reader.times); i++)
		faults += thread_at(reader.times, i, 1).faults;
	assert_int_equal(faults, rounds);
	pr_blocktime_free(reader.times);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(sums_up_each_vcpus_waits),
		cmocka_unit_test(counts_the_time_when_all_vcpus_wait),
		cmocka_unit_test(others_do_not_count_as_vcpus),
		cmocka_unit_test(waits_of_others_bound_the_time_from_above),
		cmocka_unit_test(waits_of_others_end_with_the_service),
		cmocka_unit_test(distinguishes_vcpus_from_other_threads),
		cmocka_unit_test(a_new_wait_ends_the_one_before),
		cmocka_unit_test(a_wait_that_goes_on_counts),
		cmocka_unit_test(follows_the_first_threads_up_to_the_bound),
		cmocka_unit_test(vcpus_of_one_thread_wait_together),
		cmocka_unit_test(knows_hundreds_of_vcpus),
		cmocka_unit_test(can_be_read_by_another_thread),
	};

	return cmocka_run_group_tests_name("blocktime", tests, NULL, NULL);
}
