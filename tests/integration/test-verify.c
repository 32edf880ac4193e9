/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Capability verify: what a path does to the data in between is found, counted and read again, and no guest sees it. */
#include <string.h>

#include "tests/integration/cases.h"

#define MIB	    (1024ull * 1024)
#define PAGE	    4096
#define PATIENCE_US (60 * G_USEC_PER_SEC)

static void fast(Pair *pair)
{
	g_assert_true(pr_params_set(&pair->destination.params, "max-postcopy-bandwidth", 0, NULL));
}

/* All that has travelled was compared, and this many pages were wrong at first. */
static void check_verified(Pair *pair, guint64 corrupt)
{
	g_auto(PrMigrationInfo) info = {0}, there = {0};

	pr_migration_query(pair->destination.engine, &info);
	pr_migration_query(pair->source.engine, &there);
	assert_true(info.verifies);
	assert_true(there.verifies);
	assert_true(info.normal > 0);
	assert_int_equal(info.verified_pages, info.normal);
	assert_int_equal(info.corrupt_reads, corrupt);
	assert_int_equal(info.last_corrupt != NULL, corrupt > 0);
}

static void every_page_is_verified(void **state)
{
	PairConfig config = {
		.scheme = scheme_of(state), .size = 16 * MIB, .pace_us = 1000, .verify = TRUE};
	g_autoptr(Pair) pair = pair_new(&config);

	pair_migrate(pair);
	pair_wait(pair, PR_STATE_COMPLETED);
	pair_check_completed(pair);
	check_verified(pair, 0);
}

static void both_sides_have_to_want_it(void **state)
{
	for (guint i = 0; i < 2; i++) {
		PairConfig config = {.scheme = scheme_of(state),
				     .size = 4 * MIB,
				     .pace_us = 1000,
				     .verify = TRUE};
		g_autoptr(Pair) pair = pair_new(&config);
		Side *without = i ? &pair->source : &pair->destination;
		g_auto(PrMigrationInfo) info = {0}, there = {0};

		pr_params_set_capability(&without->params, "verify", FALSE, NULL);
		pair_migrate(pair);
		pair_wait(pair, PR_STATE_COMPLETED);
		pair_check_completed(pair);
		pr_migration_query(pair->destination.engine, &info);
		pr_migration_query(pair->source.engine, &there);
		assert_false(info.verifies);
		assert_false(there.verifies);
		assert_int_equal(info.verified_pages, 0);
	}
}

/* What it is for: without it, nobody notices but the guest. */
static void without_it_the_guest_sees_what_a_path_has_flipped(void **state)
{
	PairConfig config = {
		.scheme = scheme_of(state), .size = 4 * MIB, .paused = TRUE, .landing = "bare"};
	g_autoptr(PrFaults) faults = pr_faults_new("bare");
	PrFaultPlan plan = {.corrupt_read = pr_faults_counts(faults).completions + 12};
	g_autoptr(Pair) pair = pair_new(&config);
	guint64 corrupt = 0;

	pr_faults_set_plan(faults, &plan);
	pair_migrate(pair);
	pair_wait(pair, PR_STATE_COMPLETED);
	assert_true(testguest_verify(pair->destination.guest, &corrupt));
	assert_int_equal(corrupt, 1);
}

/* READs of the load, of the guest's faults and of the bulk pull in turn. */
static void a_page_that_comes_in_wrong_is_read_again(void **state)
{
	for (guint read = 1; read < 60; read += 7) {
		PairConfig config = {.scheme = scheme_of(state),
				     .size = 4 * MIB,
				     .pace_us = 1000,
				     .verify = TRUE,
				     .landing = "landing"};
		g_autoptr(PrFaults) faults = pr_faults_new("landing");
		PrFaultCounts before = pr_faults_counts(faults);
		PrFaultPlan plan = {.corrupt_read = before.completions + read};
		g_autoptr(Pair) pair = pair_new(&config);

		g_assert_true(
			pr_params_set(&pair->destination.params, "bulk-read-size", 16384, NULL));
		pr_faults_set_plan(faults, &plan);
		pair_migrate(pair);
		pair_wait(pair, PR_STATE_COMPLETED);
		pair_check_completed(pair);
		assert_int_equal(pr_faults_counts(faults).corrupted - before.corrupted, 1);
		check_verified(pair, 1);
	}
}

/* A thread of the destination's guest that waits for a page. */
static gpointer touch(gpointer at)
{
	return GUINT_TO_POINTER(*(const volatile uint8_t *)at);
}

static uint64_t corrupt_reads(Pair *pair)
{
	g_auto(PrMigrationInfo) info = {0};

	pr_migration_query(pair->destination.engine, &info);
	return info.corrupt_reads;
}

/* Nothing but faults is read, and always comes in wrong: that is the path's fault. Of the bulk pull there is one READ, which
 * may happen to bring one of the pages, right, with another one that is wrong. */
static void a_page_that_is_wrong_three_times_pauses(void **state)
{
	PairConfig config = {.scheme = scheme_of(state),
			     .size = 16 * MIB,
			     .bandwidth = 1,
			     .paused = TRUE,
			     .verify = TRUE,
			     .landing = "thrice"};
	g_autoptr(PrFaults) faults = pr_faults_new("thrice");
	PrFaultPlan never = {0}, always = {.corrupt_read = 1, .corrupt_reads = G_MAXINT64};
	g_autoptr(Pair) pair = pair_new(&config);
	g_auto(PrMigrationInfo) info = {0};
	GThread *touchers[4];

	pair_migrate(pair);
	pair_wait(pair, PR_STATE_POSTCOPY_ACTIVE);
	pr_faults_set_plan(faults, &always);
	uint8_t *map = testguest_block_map(pair->destination.guest, 1);
	for (guint i = 0; i < G_N_ELEMENTS(touchers); i++)
		touchers[i] = g_thread_new("toucher", touch, map + (3 + i * 500) * PAGE);
	pair_wait(pair, PR_STATE_POSTCOPY_PAUSED);
	assert_true(corrupt_reads(pair) >= 3);
	pr_migration_query(pair->destination.engine, &info);
	assert_non_null(strstr(info.reason, "does not bring what the source has"));
	assert_non_null(strstr(info.reason, "RAM block ram1"));

	pr_faults_set_plan(faults, &never);
	fast(pair);
	/* What has landed wrong already is one more strike over the next path. */
	pair_resume_until_completed(pair, G_N_ELEMENTS(touchers));
	for (guint i = 0; i < G_N_ELEMENTS(touchers); i++)
		g_thread_join(touchers[i]);
	pair_check_completed(pair);
	check_verified(pair, corrupt_reads(pair));
}

/* What had landed is kept, what was asked for is asked for again. */
static void verified_migrations_recover(void **state)
{
	PairConfig config = {
		.scheme = scheme_of(state), .size = 16 * MIB, .pace_us = 2000, .verify = TRUE};
	g_autoptr(Pair) pair = pair_new(&config);

	g_assert_true(pr_params_set(&pair->destination.params, "bulk-read-size", 8192, NULL));
	g_assert_true(
		pr_params_set(&pair->destination.params, "max-postcopy-bandwidth", 8 * MIB, NULL));
	pair_migrate(pair);
	for (guint i = 0; i < 12; i++) {
		guint over = 1u << PR_STATE_POSTCOPY_ACTIVE | 1u << PR_STATE_COMPLETED;

		if (side_wait_any(&pair->source, over) == PR_STATE_COMPLETED)
			break;
		PrFaultPlan plan = {.cut_after_messages =
					    pr_faults_counts(pair->faults).messages + 3 + 5 * i};
		pr_faults_set_plan(pair->faults, &plan);
		pr_faults_cut_paths(pair->faults);
		guint settled = 1u << PR_STATE_POSTCOPY_PAUSED | 1u << PR_STATE_COMPLETED;
		if (side_wait_any(&pair->source, settled) == PR_STATE_COMPLETED)
			break;
		side_wait_any(&pair->destination, settled);
		pair_resume(pair);
		side_wait_any(&pair->source, settled | over);
		while (side_state(&pair->source) == PR_STATE_POSTCOPY_PAUSED) {
			pair_resume(pair);
			side_wait_any(&pair->source, settled | over);
		}
	}
	fast(pair);
	pair_resume_until_completed(pair, 3);
	pair_check_completed(pair);
	check_verified(pair, 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		BOTH(every_page_is_verified),
		BOTH(both_sides_have_to_want_it),
		BOTH(without_it_the_guest_sees_what_a_path_has_flipped),
		BOTH(a_page_that_comes_in_wrong_is_read_again),
		BOTH(a_page_that_is_wrong_three_times_pauses),
		BOTH(verified_migrations_recover),
	};

	return RUN_CASES("verify", tests);
}
