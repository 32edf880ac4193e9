/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Which pages a thread's faults suggest to read ahead. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "migration/postcopy/readahead.h"

#define N_PAGES 100000u

typedef struct Bench {
	PrReadahead state;
	guint limit;
	uint8_t have[N_PAGES]; /* pages that have been read, for a fault or ahead */
	guint faults, ahead;
} Bench;

static Bench *bench_new(guint limit)
{
	Bench *bench = g_new0(Bench, 1);

	bench->limit = limit;
	return bench;
}

/* A thread touches a page. Suggested pages are there before the next touch. Returns the
 * suggestion. */
static PrReadaheadRun touch(Bench *bench, uint32_t tid, uint64_t page)
{
	PrReadaheadRun run = {0};

	if (bench->have[page])
		return run;
	bench->have[page] = TRUE;
	bench->faults++;
	pr_readahead_fault(&bench->state, tid, 0, page, N_PAGES, bench->limit, &run);
	for (guint i = 0; i < run.n; i++) {
		uint64_t ahead = run.page + i * (uint64_t)run.stride;

		assert_true(ahead < N_PAGES);
		bench->ahead += !bench->have[ahead];
		bench->have[ahead] = TRUE;
	}
	return run;
}

static void expect_run(PrReadaheadRun run, uint64_t page, int64_t stride, guint n)
{
	assert_int_equal(run.n, n);
	if (n == 0)
		return;
	assert_int_equal(run.page, page);
	assert_int_equal(run.stride, stride);
}

static void nothing_is_guessed_from_less_than_two_steps(void **state)
{
	g_autofree Bench *bench = bench_new(32);

	expect_run(touch(bench, 1, 500), 0, 0, 0);
	expect_run(touch(bench, 1, 501), 0, 0, 0);
	expect_run(touch(bench, 1, 502), 503, 1, 2);
}

static void the_window_doubles_up_to_the_limit(void **state)
{
	static const guint windows[] = {2, 4, 8, 16, 16, 16};
	g_autofree Bench *bench = bench_new(16);
	uint64_t page = 12;

	touch(bench, 1, 10);
	touch(bench, 1, 11);
	for (guint i = 0; i < G_N_ELEMENTS(windows); i++) {
		expect_run(touch(bench, 1, page), page + 1, 1, windows[i]);
		page += windows[i] + 1;
	}
}

/*
 * A thread that is faster than the READs faults on pages that are already being read. That confirms
 * the guess, and no page is suggested twice.
 */
static void faults_on_pages_being_read_confirm_the_guess(void **state)
{
	PrReadahead ahead = {0};
	PrReadaheadRun run;

	for (uint64_t page = 10; page < 12; page++)
		pr_readahead_fault(&ahead, 1, 0, page, N_PAGES, 8, &run);
	pr_readahead_fault(&ahead, 1, 0, 12, N_PAGES, 8, &run);
	expect_run(run, 13, 1, 2); /* to 14 */
	pr_readahead_fault(&ahead, 1, 0, 13, N_PAGES, 8, &run);
	expect_run(run, 15, 1, 3); /* to 17 */
	pr_readahead_fault(&ahead, 1, 0, 14, N_PAGES, 8, &run);
	expect_run(run, 18, 1, 5); /* to 22 */
	/*
	 * The window has its largest size now. More pages are suggested when half of the window is
	 * used.
	 */
	for (uint64_t page = 15; page < 18; page++) {
		pr_readahead_fault(&ahead, 1, 0, page, N_PAGES, 8, &run);
		expect_run(run, 0, 0, 0);
	}
	pr_readahead_fault(&ahead, 1, 0, 18, N_PAGES, 8, &run);
	expect_run(run, 23, 1, 4);
}

static void walks_down_and_in_strides(void **state)
{
	static const int64_t strides[] = {-1, 1, 2, -3, 17, 512, -PR_READAHEAD_STRIDE};

	for (guint i = 0; i < G_N_ELEMENTS(strides); i++) {
		g_autofree Bench *bench = bench_new(8);
		uint64_t page = 50000;
		guint touches;

		for (touches = 0; touches < 48 && page < N_PAGES; touches++) {
			touch(bench, 1, page);
			page += (uint64_t)strides[i];
		}
		/*
		 * It takes 3 faults to see the walk, then windows of 2, 4, and 8 pages each. So at
		 * most one touch in 4 faults.
		 */
		assert_in_range(bench->faults, 4, 12);
		assert_in_range(bench->ahead, touches - bench->faults,
				touches - bench->faults + bench->limit);
	}
}

static void a_step_too_large_is_no_stride(void **state)
{
	g_autofree Bench *bench = bench_new(8);

	for (uint64_t page = 0; page < N_PAGES; page += PR_READAHEAD_STRIDE + 1)
		touch(bench, 1, page);
	assert_int_equal(bench->ahead, 0);
}

static void a_fault_off_the_walk_ends_it(void **state)
{
	g_autofree Bench *bench = bench_new(32);

	for (uint64_t page = 100; page < 200; page++)
		touch(bench, 1, page);
	assert_true(bench->ahead > 50);
	bench->ahead = 0;
	/* Near the walk, but neither at the expected page nor at a regular distance. */
	touch(bench, 1, 400);
	touch(bench, 1, 407);
	touch(bench, 1, 403);
	assert_int_equal(bench->ahead, 0);
	/* The walk starts again with the smallest window. */
	touch(bench, 1, 420);
	touch(bench, 1, 421);
	expect_run(touch(bench, 1, 422), 423, 1, PR_READAHEAD_START);
}

static void random_faults_suggest_next_to_nothing(void **state)
{
	g_autofree Bench *bench = bench_new(PR_READAHEAD_MAX);
	uint64_t random = 88172645463325252ull;

	for (guint i = 0; i < 20000; i++) {
		random ^= random << 13;
		random ^= random >> 7;
		random ^= random << 17;
		touch(bench, 1 + i % 3, random % N_PAGES);
	}
	assert_true(bench->faults > 10000);
	assert_true(bench->ahead < bench->faults / 100);
}

/* A copy reads one stream and writes another one, in turn. */
static void two_walks_of_one_thread_are_distinguished(void **state)
{
	g_autofree Bench *bench = bench_new(16);

	for (uint64_t i = 0; i < 1000; i++) {
		touch(bench, 1, 1000 + i);
		touch(bench, 1, 50000 - i);
	}
	assert_true(bench->faults < 2000 / 8);
}

static void threads_do_not_disturb_each_other(void **state)
{
	g_autofree Bench *bench = bench_new(16);

	/* The pages are interleaved, so the faults of all threads together show no sequence. */
	for (uint64_t i = 0; i < 1000; i++)
		for (uint32_t tid = 1; tid <= 3; tid++)
			touch(bench, tid, tid * 20000 + (tid == 2 ? 5000 - i : i));
	assert_true(bench->faults < 3000 / 8);
}

/* With KVM's asynchronous faults any kworker may wait for a vCPU. */
static void faults_without_a_thread_are_followed_by_address(void **state)
{
	g_autofree Bench *bench = bench_new(16);

	/* Eight walks at a time: more than one thread's streams. */
	for (uint64_t i = 0; i < 500; i++)
		for (uint64_t walk = 0; walk < 8; walk++)
			touch(bench, PR_READAHEAD_NO_THREAD, walk * 10000 + 3 * i);
	assert_true(bench->faults < 4000 / 8);
}

static void walks_with_and_without_a_thread_are_distinguished(void **state)
{
	g_autofree Bench *bench = bench_new(16);
	uint64_t random = 88172645463325252ull;

	/* A thread walks, and as many random faults come without a thread. */
	for (uint64_t i = 0; i < 1000; i++) {
		touch(bench, 1, 1000 + i);
		random ^= random << 13;
		random ^= random >> 7;
		random ^= random << 17;
		touch(bench, PR_READAHEAD_NO_THREAD, 3000 + random % (N_PAGES - 3000));
	}
	assert_true(bench->faults < 1000 + 1000 / 8);
}

static void stays_within_the_block(void **state)
{
	g_autofree Bench *bench = bench_new(16);
	guint faults;

	for (uint64_t page = N_PAGES - 40; page < N_PAGES; page++)
		touch(bench, 1, page);
	for (uint64_t page = 40; page-- > 0;)
		touch(bench, 2, page);
	faults = bench->faults;
	assert_true(faults < 20);
	assert_int_equal(bench->ahead, 80 - faults);
}

static void blocks_are_walked_separately(void **state)
{
	PrReadahead ahead = {0};
	PrReadaheadRun run;

	pr_readahead_fault(&ahead, 1, 0, 10, N_PAGES, 8, &run);
	pr_readahead_fault(&ahead, 1, 1, 11, N_PAGES, 8, &run);
	pr_readahead_fault(&ahead, 1, 0, 12, N_PAGES, 8, &run);
	expect_run(run, 0, 0, 0);
	pr_readahead_fault(&ahead, 1, 1, 12, N_PAGES, 8, &run);
	pr_readahead_fault(&ahead, 1, 1, 13, N_PAGES, 8, &run);
	expect_run(run, 14, 1, 2);
	assert_int_equal(run.block, 1);
}

static void a_limit_of_zero_turns_it_off(void **state)
{
	g_autofree Bench *bench = bench_new(0);

	for (uint64_t page = 0; page < 1000; page++)
		touch(bench, 1, page);
	assert_int_equal(bench->faults, 1000);
	/* The limit may change during a walk. */
	bench->limit = 16;
	for (uint64_t page = 1000; page < 2000; page++)
		touch(bench, 1, page);
	bench->limit = 1;
	for (uint64_t page = 2000; page < 2100; page++)
		assert_true(touch(bench, 1, page).n <= 1);
	bench->limit = 0;
	for (uint64_t page = 2100; page < 2200; page++)
		assert_int_equal(touch(bench, 1, page).n, 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(nothing_is_guessed_from_less_than_two_steps),
		cmocka_unit_test(the_window_doubles_up_to_the_limit),
		cmocka_unit_test(faults_on_pages_being_read_confirm_the_guess),
		cmocka_unit_test(walks_down_and_in_strides),
		cmocka_unit_test(a_step_too_large_is_no_stride),
		cmocka_unit_test(a_fault_off_the_walk_ends_it),
		cmocka_unit_test(random_faults_suggest_next_to_nothing),
		cmocka_unit_test(two_walks_of_one_thread_are_distinguished),
		cmocka_unit_test(threads_do_not_disturb_each_other),
		cmocka_unit_test(faults_without_a_thread_are_followed_by_address),
		cmocka_unit_test(walks_with_and_without_a_thread_are_distinguished),
		cmocka_unit_test(stays_within_the_block),
		cmocka_unit_test(blocks_are_walked_separately),
		cmocka_unit_test(a_limit_of_zero_turns_it_off),
	};

	return cmocka_run_group_tests_name("readahead", tests, NULL, NULL);
}
