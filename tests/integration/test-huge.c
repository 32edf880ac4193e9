/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Guests that use huge pages, or whose memory was allocated before the migration. */
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "migration/internal.h"
#include "tests/integration/cases.h"

#define MIB (1024ull * 1024)

static void expect_equal(Pair *pair)
{
	g_autofree char *difference = NULL;

	if (!testguest_equal(pair->source.guest, pair->destination.guest, &difference))
		fail_msg("%s", difference);
}

static void migrate(Pair *pair)
{
	pair_migrate(pair);
	pair_wait(pair, PR_STATE_COMPLETED);
}

static void host_pages_may_differ(void **state)
{
	static const guint small[] = {0, PAIR_SOURCE, PAIR_DESTINATION};

	for (guint i = 0; i < 2 * G_N_ELEMENTS(small); i++) {
		PairConfig config = {.scheme = scheme_of(state),
				     .size = 8 * MIB,
				     .paused = TRUE,
				     .verify = i % 2,
				     .small_pages = small[i / 2]};
		g_autoptr(Pair) pair = pair_new(&config);

		migrate(pair);
		expect_equal(pair);
	}
}

static void threads_wait_for_the_same_pages(void **state)
{
	static const uint64_t n_threads[] = {1, 4};

	for (guint i = 0; i < G_N_ELEMENTS(n_threads); i++) {
		PairConfig config = {.scheme = scheme_of(state),
				     .size = 16 * MIB,
				     .n_threads = 8,
				     .bandwidth = 8 * MIB};
		g_autoptr(Pair) pair = pair_new(&config);
		g_auto(PrMigrationInfo) info = {0};

		pr_params_set(&pair->destination.params, "fault-threads", n_threads[i], NULL);
		migrate(pair);
		pair_check_completed(pair);
		pr_migration_query(pair->destination.engine, &info);
		assert_true(info.faults > 0);
	}
}

/* Corrupts one 4 KiB piece of a huge page. The other pieces are correct. */
static void a_corrupt_piece_of_a_huge_page_is_read_again(void **state)
{
	for (guint read = 1; read < 12; read += 5) {
		PairConfig config = {.scheme = scheme_of(state),
				     .size = 16 * MIB,
				     .paused = TRUE,
				     .verify = TRUE,
				     .landing = "landing"};
		g_autoptr(PrFaults) faults = pr_faults_new("landing");
		PrFaultPlan plan = {.corrupt_read = pr_faults_counts(faults).completions + read};
		guint64 before = pr_faults_counts(faults).corrupted;
		g_autoptr(Pair) pair = pair_new(&config);

		g_assert_true(
			pr_params_set(&pair->destination.params, "bulk-read-size", 65536, NULL));
		pr_faults_set_plan(faults, &plan);
		migrate(pair);
		expect_equal(pair);
		assert_int_equal(pr_faults_counts(faults).corrupted - before, 1);
	}
}

static uint64_t allocated(TestGuest *guest)
{
	uint64_t bytes = 0;
	struct stat st;

	for (guint i = 0; i < testguest_n_blocks(guest); i++) {
		assert_int_equal(fstat(testguest_block_memfd(guest, i), &st), 0);
		bytes += (uint64_t)st.st_blocks * 512;
	}
	return bytes;
}

static uint64_t size_of(TestGuest *guest)
{
	return testguest_n_blocks(guest) * testguest_block_size(guest);
}

/*
 * The destination's memory has data already, as firmware may leave it. A sixteenth of the source's
 * memory are holes, which must read as zero.
 */
static void old_data_at_the_destination_is_cleared(void **state)
{
	static const guint small[] = {0, PAIR_DESTINATION};

	for (guint i = 0; i < G_N_ELEMENTS(small); i++) {
		PairConfig config = {.scheme = scheme_of(state),
				     .size = 16 * MIB,
				     .paused = TRUE,
				     .small_pages = small[i]};
		g_autoptr(Pair) pair = pair_new(&config);
		TestGuest *there = pair->destination.guest;

		for (guint block = 0; block < testguest_n_blocks(there); block++)
			memset(testguest_block_map(there, block), 0xff,
			       testguest_block_size(there));
		migrate(pair);
		expect_equal(pair);
		assert_int_equal(allocated(there), size_of(there));
	}
}

/*
 * Scanning the source's memory does not fill its holes. With almost no bulk pull the holes can only
 * arrive as zero ranges. Loading the device state reads a few of them.
 */
static void holes_stay_holes(void **state)
{
	PairConfig config = {.scheme = scheme_of(state),
			     .size = 96 * MIB,
			     .n_blocks = 1,
			     .bandwidth = 1,
			     .paused = TRUE};
	g_autoptr(Pair) pair = pair_new(&config);
	TestGuest *here = pair->source.guest;
	uint64_t size = testguest_block_size(here);
	uint8_t *upper = (uint8_t *)testguest_block_map(here, 0) + size / 2;

	assert_int_equal(madvise(upper, size / 2, MADV_REMOVE), 0);
	pair_migrate(pair);
	pair_wait_received(pair, size / 2);
	assert_true(allocated(here) < size / 4 * 3);
	pr_params_set(&pair->destination.params, "max-postcopy-bandwidth", 0, NULL);
	pair_wait(pair, PR_STATE_COMPLETED);
	assert_true(allocated(here) < size / 4 * 3);
	assert_true(allocated(pair->destination.guest) < size / 4 * 3);
	expect_equal(pair);
}

/* The pieces of a huge page that arrived before a cut are not transferred again. */
static void recovers_from_cuts_within_huge_pages(void **state)
{
	PairConfig config = {
		.scheme = scheme_of(state), .size = 64 * MIB, .bandwidth = 2 * MIB, .paused = TRUE};
	g_autoptr(Pair) pair = pair_new(&config);
	uint64_t received;

	g_assert_true(pr_params_set(&pair->destination.params, "bulk-read-size", 65536, NULL));
	pair_migrate(pair);
	for (guint i = 0; i < 5; i++) {
		pair_wait(pair, PR_STATE_POSTCOPY_ACTIVE);
		received = pr_ram_received_bytes(pair->destination.engine->session.ram);
		pair_wait_received(pair, received + MIB / 2 + i * 65536);
		pr_faults_cut_paths(pair->faults);
		pair_wait(pair, PR_STATE_POSTCOPY_PAUSED);
		pair_resume(pair);
	}
	pair_wait(pair, PR_STATE_POSTCOPY_ACTIVE);
	pr_params_set(&pair->destination.params, "max-postcopy-bandwidth", 0, NULL);
	pair_wait(pair, PR_STATE_COMPLETED);
	expect_equal(pair);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		BOTH(host_pages_may_differ),
		BOTH(threads_wait_for_the_same_pages),
		BOTH(a_corrupt_piece_of_a_huge_page_is_read_again),
		BOTH(old_data_at_the_destination_is_cleared),
		BOTH(holes_stay_holes),
		BOTH(recovers_from_cuts_within_huge_pages),
	};

	return RUN_CASES("huge", tests);
}
