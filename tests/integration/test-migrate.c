/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Whole migrations of the test guest: the sequence of states, and the operator's commands. */
#include <string.h>

#include "migration/core/crash-point.h"
#include "tests/integration/cases.h"

#define MIB (1024ull * 1024)

static void moves_a_working_guest(void **state)
{
	/* Slow enough that the guest faults even on a busy machine. */
	PairConfig config = {.scheme = scheme_of(state), .size = 64 * MIB, .bandwidth = 8 * MIB};
	g_autoptr(Pair) pair = pair_new(&config);

	pair_migrate(pair);
	pair_wait(pair, PR_STATE_COMPLETED);
	pair_check_completed(pair);

	g_auto(PrMigrationInfo) info = {0};
	pr_migration_query(pair->destination.engine, &info);
	assert_true(info.faults > 0);
	uint64_t in_buckets = 0;
	for (guint i = 0; i < PR_LATENCY_BUCKETS; i++)
		in_buckets += info.latency_dist[i];
	assert_int_equal(in_buckets, info.faults);
	assert_int_equal(info.pauses, 0);

	g_auto(PrMigrationInfo) source = {0};
	pr_migration_query(pair->source.engine, &source);
	assert_int_equal(source.paths->len, 1);
	const PrPathInfo *path = g_ptr_array_index(source.paths, 0);
	assert_string_equal(path->uri, pair->uri);
	assert_int_equal(path->bytes, source.transferred);
}

static void moves_a_paused_guest_byte_for_byte(void **state)
{
	PairConfig config = {.scheme = scheme_of(state), .size = 32 * MIB, .paused = TRUE};
	g_autoptr(Pair) pair = pair_new(&config);
	g_autofree char *difference = NULL;

	pair_migrate(pair);
	pair_wait(pair, PR_STATE_COMPLETED);
	pair_check_completed(pair);
	assert_false(testguest_running(pair->destination.guest));
	if (!testguest_equal(pair->source.guest, pair->destination.guest, &difference))
		fail_msg("%s", difference);
}

static void passes_through_the_states_in_order(void **state)
{
	static const PrState expected[] = {
		PR_STATE_SETUP,
		PR_STATE_ACTIVE,
		PR_STATE_DEVICE,
		PR_STATE_POSTCOPY_ACTIVE,
		PR_STATE_POSTCOPY_PAUSED,
		PR_STATE_POSTCOPY_RECOVER_SETUP,
		PR_STATE_POSTCOPY_RECOVER,
		PR_STATE_POSTCOPY_ACTIVE,
		PR_STATE_COMPLETED,
	};
	PairConfig config = {.scheme = scheme_of(state), PAIR_LASTS};
	g_autoptr(Pair) pair = pair_new(&config);

	pair_migrate(pair);
	pair_wait(pair, PR_STATE_POSTCOPY_ACTIVE);
	/* More than the holes, a sixteenth of RAM, which arrive first. */
	pair_wait_received(pair, 8 * MIB);
	pr_faults_cut_paths(pair->faults);
	pair_wait(pair, PR_STATE_POSTCOPY_PAUSED);
	pr_params_set(&pair->destination.params, "max-postcopy-bandwidth", 0, NULL);
	pair_resume(pair);
	pair_wait(pair, PR_STATE_COMPLETED);
	pair_check_completed(pair);

	assert_int_equal(pair->source.states->len, G_N_ELEMENTS(expected));
	assert_memory_equal(pair->source.states->data, expected, sizeof(expected));
}

/*
 * The command pauses both sides, on whichever side it is given. The guest continues with the pages
 * that have arrived.
 */
static void a_pause_command_pauses_both_sides(void **state)
{
	PairConfig config = {.scheme = scheme_of(state), PAIR_LASTS};
	g_autoptr(Pair) pair = pair_new(&config);
	Side *sides[] = {&pair->source, &pair->destination};
	g_autoptr(GError) error = NULL;

	pair_migrate(pair);
	pair_wait(pair, PR_STATE_POSTCOPY_ACTIVE);
	for (guint i = 0; i < G_N_ELEMENTS(sides); i++) {
		assert_true(pr_migration_pause(sides[i]->engine, &error));
		pair_wait(pair, PR_STATE_POSTCOPY_PAUSED);
		assert_false(pr_migration_pause(sides[i]->engine, NULL));
		pair_resume(pair);
		pair_wait(pair, PR_STATE_POSTCOPY_ACTIVE);
	}
	pr_params_set(&pair->destination.params, "max-postcopy-bandwidth", 0, NULL);
	pair_wait(pair, PR_STATE_COMPLETED);
	pair_check_completed(pair);

	g_auto(PrMigrationInfo) info = {0};
	pr_migration_query(pair->source.engine, &info);
	assert_int_equal(info.pauses, 2);
	assert_int_equal(info.recoveries, 2);
}

static void refuses_commands_that_do_not_fit_the_state(void **state)
{
	PairConfig config = {.scheme = scheme_of(state), PAIR_LASTS};
	g_autoptr(Pair) pair = pair_new(&config);
	g_autoptr(GError) error = NULL;

	assert_false(
		pr_migration_start(pair->source.engine, pair->uri, /* resume= */ TRUE, &error));
	assert_true(g_error_matches(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_STATE));
	g_clear_error(&error);
	assert_false(pr_migration_start(pair->source.engine, "nonsense", FALSE, &error));
	assert_true(g_error_matches(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_URI));
	g_clear_error(&error);
	assert_false(
		pr_migration_recover(pair->destination.engine, "tcp:127.0.0.1:0", NULL, &error));
	assert_true(g_error_matches(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_STATE));
	g_clear_error(&error);

	pair_migrate(pair);
	pair_wait(pair, PR_STATE_POSTCOPY_ACTIVE);
	assert_false(pr_migration_start(pair->source.engine, pair->uri, FALSE, &error));
	assert_true(g_error_matches(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_BUSY));
	g_clear_error(&error);
	assert_false(pr_migration_cancel(pair->source.engine, &error));
	assert_non_null(error);
	g_clear_error(&error);
	assert_false(pr_migration_cancel(pair->destination.engine, &error));
	g_clear_error(&error);
	pr_params_set(&pair->destination.params, "max-postcopy-bandwidth", 0, NULL);
	pair_wait(pair, PR_STATE_COMPLETED);
	assert_false(pr_migration_start(pair->source.engine, pair->uri, FALSE, &error));
	pair_check_completed(pair);
}

static void names_the_block_that_differs(void **state)
{
	PairConfig config = {
		.scheme = scheme_of(state), .size = 16 * MIB, .destination_size = 24 * MIB};
	g_autoptr(Pair) pair = pair_new(&config);
	g_auto(PrMigrationInfo) info = {0};

	pair_migrate(pair);
	pair_wait(pair, PR_STATE_FAILED);
	pr_migration_query(pair->source.engine, &info);
	assert_non_null(strstr(info.error_desc, "ram0"));
	assert_non_null(strstr(info.error_desc, "bytes"));
	pair_check_undone(pair);
}

static void reports_that_no_destination_listens(void **state)
{
	PairConfig config = {.scheme = scheme_of(state), .size = 8 * MIB};
	g_autoptr(Pair) pair = pair_new(&config);
	g_autofree char *nowhere = g_strdup_printf("%s:127.0.0.1:1", scheme_of(state));
	g_autofree char *both = g_strdup_printf("%s,%s", nowhere, pair->uri);
	g_auto(PrMigrationInfo) info = {0};

	assert_true(pr_migration_start(pair->source.engine, nowhere, FALSE, NULL));
	side_wait(&pair->source, PR_STATE_FAILED);
	pr_migration_query(pair->source.engine, &info);
	assert_non_null(strstr(info.error_desc, nowhere));
	pair_check_undone(pair);

	/* If the first path of a list is not reachable, the engine uses the second one. */
	assert_true(pr_migration_start(pair->source.engine, both, FALSE, NULL));
	pair_wait(pair, PR_STATE_COMPLETED);
	pair_check_completed(pair);
}

/* Used by the crash-point hook. There is one pair at a time. */
static Pair *to_cancel;
static PrCrashPoint cancel_at;
static gint cancels; /* atomic: the number of accepted commands */

static void cancel_hook(PrCrashPoint point)
{
	if (point == cancel_at && pr_migration_cancel(to_cancel->source.engine, NULL))
		g_atomic_int_inc(&cancels);
}

static void cancel_once(Pair *pair, PrCrashPoint point)
{
	to_cancel = pair;
	cancel_at = point;
	g_atomic_int_set(&cancels, 0);
	__atomic_store_n(&pr_crash_hook, cancel_hook, __ATOMIC_RELEASE);
	pair_migrate(pair);
	side_wait(&pair->source, PR_STATE_CANCELLED);
	__atomic_store_n(&pr_crash_hook, NULL, __ATOMIC_RELEASE);
	assert_int_equal(g_atomic_int_get(&cancels), 1);
}

/*
 * Cancels at each crash point before the hand-over. The source's own thread gives the command, so
 * it is never too late.
 */
static void cancel_leaves_the_guest_at_the_source(void **state)
{
	static const PrCrashPoint points[] = {PR_CRASH_SOURCE_STOPPED, PR_CRASH_SOURCE_RAM_TOLD,
					      PR_CRASH_SOURCE_STATE_SENT, PR_CRASH_SOURCE_LOADED};

	for (guint i = 0; i < G_N_ELEMENTS(points); i++) {
		PairConfig config = {.scheme = scheme_of(state), .size = 8 * MIB};
		g_autoptr(Pair) pair = pair_new(&config);

		cancel_once(pair, points[i]);
		pair_check_undone(pair);
		pair_wait_taken_back(pair);
		pair_migrate(pair);
		pair_wait(pair, PR_STATE_COMPLETED);
		pair_check_completed(pair);
	}
}

/* Checks the upper bound only, as a busy machine may be slower. */
static void pulls_no_faster_than_the_bandwidth_limit(void **state)
{
	PairConfig config = {.scheme = scheme_of(state),
			     .size = 24 * MIB,
			     .paused = TRUE,
			     .bandwidth = 16 * MIB};
	g_autoptr(Pair) pair = pair_new(&config);
	g_auto(PrMigrationInfo) info = {0};

	pair_migrate(pair);
	pair_wait(pair, PR_STATE_COMPLETED);
	pair_check_completed(pair);
	pr_migration_query(pair->destination.engine, &info);
	gint64 took = side_reported_at(&pair->destination, PR_STATE_COMPLETED) -
		      side_reported_at(&pair->destination, PR_STATE_DEVICE);
	/* READs for faults are not limited. Loading the device state causes a few faults. */
	assert_in_range(info.postcopy_requests, 0, 16);
	assert_true(info.transferred > 20 * MIB);
	assert_true(took >= G_USEC_PER_SEC);
	assert_true((double)info.transferred * G_USEC_PER_SEC / (double)took < 1.15 * 16 * MIB);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		BOTH(moves_a_working_guest),
		BOTH(moves_a_paused_guest_byte_for_byte),
		BOTH(passes_through_the_states_in_order),
		BOTH(a_pause_command_pauses_both_sides),
		BOTH(refuses_commands_that_do_not_fit_the_state),
		OVER("tcp", names_the_block_that_differs),
		BOTH(reports_that_no_destination_listens),
		BOTH(cancel_leaves_the_guest_at_the_source),
		BOTH(pulls_no_faster_than_the_bandwidth_limit),
	};

	return RUN_CASES("migrate", tests);
}
