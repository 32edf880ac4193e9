/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Paths whose source grants ranges while the guest runs at the destination already, as rdma: does.
 * The faulty path reports each READ of a range that was not granted.
 */
#include <string.h>

#include "tests/integration/cases.h"

#define MIB	 (1024ull * 1024)
#define SIZE	 (256 * MIB)
#define US_A_MIB 6000

/* Granting all memory takes 1.5 s. */
static const PairConfig slow = {
	.scheme = "tcp", .size = SIZE, .incremental_grants_us = US_A_MIB, .pace_us = 1000};
/* The same grants, and a pull that takes far longer, until full_speed(). */
static const PairConfig lasting = {.scheme = "tcp",
				   .size = SIZE,
				   .incremental_grants_us = US_A_MIB,
				   .bandwidth = MIB,
				   .pace_us = 200000};

static void full_speed(Pair *pair)
{
	pr_params_set(&pair->destination.params, "max-postcopy-bandwidth", 0, NULL);
}

/* Returns the time from the source's stop until the guest may run, in us. */
static gint64 down_us(Pair *pair)
{
	return side_reported_at(&pair->destination, PR_STATE_POSTCOPY_ACTIVE) -
	       side_reported_at(&pair->destination, PR_STATE_DEVICE);
}

/* Returns whether the guest ran long before the last grant. */
static gboolean runs_early(void)
{
	g_autoptr(Pair) pair = pair_new(&slow);

	pair_migrate(pair);
	pair_wait(pair, PR_STATE_COMPLETED);
	pair_check_completed(pair);
	gint64 granting = side_reported_at(&pair->destination, PR_STATE_COMPLETED) -
			  side_reported_at(&pair->destination, PR_STATE_DEVICE);
	assert_true(granting >= (gint64)(SIZE / MIB) * US_A_MIB);
	return down_us(pair) < granting * 3 / 4;
}

/*
 * The pages that loading touches (see PairConfig) are granted first, and the guest does not wait
 * for the rest. A busy machine may delay the guest, though not in all of five tries.
 */
static void guest_runs_before_all_ram_is_granted(void **state)
{
	gboolean early = FALSE;

	for (guint i = 0; i < 5 && !early; i++)
		early = runs_early();
	assert_true(early);
}

static void moves_a_paused_guest_byte_for_byte(void **state)
{
	PairConfig config = {
		.scheme = "tcp", .size = 64 * MIB, .paused = TRUE, .incremental_grants_us = 300};
	g_autoptr(Pair) pair = pair_new(&config);
	g_autofree char *difference = NULL;

	pair_migrate(pair);
	pair_wait(pair, PR_STATE_COMPLETED);
	pair_check_completed(pair);
	if (!testguest_equal(pair->source.guest, pair->destination.guest, &difference))
		fail_msg("%s", difference);
}

static void recovers_from_a_path_lost_before_all_ram_is_granted(void **state)
{
	g_autoptr(Pair) pair = pair_new(&lasting);

	pair_migrate(pair);
	pair_wait(pair, PR_STATE_POSTCOPY_ACTIVE);
	pr_faults_cut_paths(pair->faults);
	pair_wait(pair, PR_STATE_POSTCOPY_PAUSED);
	g_auto(PrMigrationInfo) info = {0};
	pr_migration_query(pair->destination.engine, &info);
	assert_true(info.remaining > 0);
	full_speed(pair);
	pair_resume(pair);
	pair_wait(pair, PR_STATE_COMPLETED);
	pair_check_completed(pair);
}

static void a_path_lost_before_run_leaves_the_guest_at_the_source(void **state)
{
	g_autoptr(Pair) pair = pair_new(&lasting);

	pair_migrate(pair);
	side_wait_reported(&pair->destination, PR_STATE_DEVICE);
	pr_faults_cut_next_message(pair->faults);
	PrState end = side_wait_any(&pair->source,
				    1u << PR_STATE_FAILED | 1u << PR_STATE_POSTCOPY_PAUSED);
	full_speed(pair);
	if (end == PR_STATE_POSTCOPY_PAUSED) { /* the cut message came after RUN */
		side_wait(&pair->destination, PR_STATE_POSTCOPY_PAUSED);
		pair_resume(pair);
		pair_wait(pair, PR_STATE_COMPLETED);
		pair_check_completed(pair);
		return;
	}
	pair_check_undone(pair);
	/*
	 * The source fails first. The destination fails as well, or waits for a RUN that never
	 * comes.
	 */
	PrState there = side_wait_any(&pair->destination,
				      1u << PR_STATE_FAILED | 1u << PR_STATE_POSTCOPY_PAUSED);
	if (there == PR_STATE_POSTCOPY_PAUSED) {
		assert_true(pr_migration_cancel(pair->destination.engine, NULL));
		side_wait(&pair->destination, PR_STATE_CANCELLED);
	}
	pair_migrate(pair);
	pair_wait(pair, PR_STATE_COMPLETED);
	pair_check_completed(pair);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(guest_runs_before_all_ram_is_granted),
		cmocka_unit_test(moves_a_paused_guest_byte_for_byte),
		cmocka_unit_test(recovers_from_a_path_lost_before_all_ram_is_granted),
		cmocka_unit_test(a_path_lost_before_run_leaves_the_guest_at_the_source),
	};

	return RUN_CASES("incremental_grants", tests);
}
