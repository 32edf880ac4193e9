/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Paths over which the source tells what may be read while the guest runs at the destination already, as rdma: does. The
 * path itself complains of every READ that was not granted. */
#include <string.h>

#include "tests/integration/cases.h"

#define MIB	 (1024ull * 1024)
#define SIZE	 (256 * MIB)
#define US_A_MIB 6000

/* All of it takes 1.5 s to be told. */
static const PairConfig slow = {
	.scheme = "tcp", .size = SIZE, .incremental_grants_us = US_A_MIB, .pace_us = 1000};
/* The same, and its pages take far longer to move, until full_speed(). */
static const PairConfig lasting = {.scheme = "tcp",
				   .size = SIZE,
				   .incremental_grants_us = US_A_MIB,
				   .bandwidth = MIB,
				   .pace_us = 200000};

static void full_speed(Pair *pair)
{
	pr_params_set(&pair->destination.params, "max-postcopy-bandwidth", 0, NULL);
}

/* From the source's stop to when the guest may run, us. */
static gint64 down_us(Pair *pair)
{
	return side_told_at(&pair->destination, PR_STATE_POSTCOPY_ACTIVE) -
	       side_told_at(&pair->destination, PR_STATE_DEVICE);
}

/* Whether the guest ran long before all was told. */
static gboolean runs_early(void)
{
	g_autoptr(Pair) pair = pair_new(&slow);

	pair_migrate(pair);
	pair_wait(pair, PR_STATE_COMPLETED);
	pair_check_completed(pair);
	gint64 telling = side_told_at(&pair->destination, PR_STATE_COMPLETED) -
			 side_told_at(&pair->destination, PR_STATE_DEVICE);
	assert_true(telling >= (gint64)(SIZE / MIB) * US_A_MIB);
	return down_us(pair) < telling * 3 / 4;
}

/* Loading touches RAM (PairConfig), which is told first then; the guest does not wait for the rest. A stall of this
 * machine may make it late, though not every time. */
static void guest_runs_before_its_ram_was_told(void **state)
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

static void path_that_is_lost_while_ram_is_told_is_recovered_from(void **state)
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

static void path_that_is_lost_before_run_leaves_the_guest_at_the_source(void **state)
{
	g_autoptr(Pair) pair = pair_new(&lasting);

	pair_migrate(pair);
	side_wait_told(&pair->destination, PR_STATE_DEVICE);
	pr_faults_cut_next_message(pair->faults);
	PrState end = side_wait_any(&pair->source,
				    1u << PR_STATE_FAILED | 1u << PR_STATE_POSTCOPY_PAUSED);
	full_speed(pair);
	if (end == PR_STATE_POSTCOPY_PAUSED) { /* the message was one behind RUN */
		side_wait(&pair->destination, PR_STATE_POSTCOPY_PAUSED);
		pair_resume(pair);
		pair_wait(pair, PR_STATE_COMPLETED);
		pair_check_completed(pair);
		return;
	}
	pair_check_undone(pair);
	/* The source knows first. The destination has failed as well, or waits for a RUN that never comes. */
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
		cmocka_unit_test(guest_runs_before_its_ram_was_told),
		cmocka_unit_test(moves_a_paused_guest_byte_for_byte),
		cmocka_unit_test(path_that_is_lost_while_ram_is_told_is_recovered_from),
		cmocka_unit_test(path_that_is_lost_before_run_leaves_the_guest_at_the_source),
	};

	return RUN_CASES("incremental_grants", tests);
}
