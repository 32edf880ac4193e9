/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Capability verify: the engine detects and counts pages that a path has corrupted, and reads them
 * again. The guest never sees a corrupted page.
 */
#include <string.h>

#include "tests/integration/cases.h"

#define MIB	    (1024ull * 1024)
#define PAGE	    4096
#define PATIENCE_US (60 * G_USEC_PER_SEC)

static void full_speed(Pair *pair)
{
	g_assert_true(pr_params_set(&pair->destination.params, "max-postcopy-bandwidth", 0, NULL));
}

/* All transferred pages were compared, and `corrupt` of them were wrong when they arrived. */
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

static void verification_needs_the_capability_on_both_sides(void **state)
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

/* Shows what the capability is for: without it the engine does not notice a corrupted page. */
static void without_verify_the_guest_reads_a_corrupted_page(void **state)
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

/*
 * The number of the corrupted READ varies, so that it is one for loading, for a guest's fault, or
 * of the bulk pull.
 */
static void a_corrupted_page_is_read_again(void **state)
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

/*
 * The path corrupts every READ. The bandwidth limit leaves one bulk READ, which may bring some
 * correct page together with a corrupted one. All others are READs for faults.
 */
static void a_page_corrupted_three_times_pauses_the_migration(void **state)
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
	full_speed(pair);
	/* A page that has landed corrupted counts as one more strike on the next path. */
	pair_resume_until_completed(pair, G_N_ELEMENTS(touchers));
	for (guint i = 0; i < G_N_ELEMENTS(touchers); i++)
		g_thread_join(touchers[i]);
	pair_check_completed(pair);
	check_verified(pair, corrupt_reads(pair));
}

/* After a recovery, landed pages are kept, and hashes that were requested are requested again. */
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
	full_speed(pair);
	pair_resume_until_completed(pair, 3);
	pair_check_completed(pair);
	check_verified(pair, 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		BOTH(every_page_is_verified),
		BOTH(verification_needs_the_capability_on_both_sides),
		BOTH(without_verify_the_guest_reads_a_corrupted_page),
		BOTH(a_corrupted_page_is_read_again),
		BOTH(a_page_corrupted_three_times_pauses_the_migration),
		BOTH(verified_migrations_recover),
	};

	return RUN_CASES("verify", tests);
}
