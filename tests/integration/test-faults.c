/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The statistics of the fault service: which threads waited for pages, and how many pages were read
 * ahead.
 */
#include <string.h>
#include <unistd.h>

#include "migration/postcopy/readahead.h"
#include "tests/integration/cases.h"

#define MIB	    (1024ull * 1024)
#define PAGE	    4096
#define PATIENCE_US (60 * G_USEC_PER_SEC)

/* A thread of the destination's guest that reads one byte. */
typedef struct Toucher {
	const volatile uint8_t *at;
	gint tid;  /* atomic */
	gint done; /* atomic */
	GThread *thread;
} Toucher;

static gpointer touch(gpointer opaque)
{
	Toucher *toucher = opaque;

	g_atomic_int_set(&toucher->tid, gettid());
	(void)*toucher->at;
	g_atomic_int_set(&toucher->done, TRUE);
	return NULL;
}

/* Returns FALSE if no wait of this thread was counted. */
static gboolean find_thread(const PrMigrationInfo *info, uint32_t tid, PrThreadTime *ret)
{
	for (guint i = 0; info->blocktime.threads && i < info->blocktime.threads->len; i++) {
		*ret = g_array_index(info->blocktime.threads, PrThreadTime, i);
		if (ret->tid == tid)
			return TRUE;
	}
	return FALSE;
}

/* Waits until the engine reports a wait of this thread, with so many completed faults. */
static PrThreadTime wait_for_faults(Pair *pair, Toucher *toucher, uint64_t faults)
{
	gint64 deadline = g_get_monotonic_time() + PATIENCE_US;

	for (;;) {
		g_auto(PrMigrationInfo) info = {0};
		uint32_t tid = (uint32_t)g_atomic_int_get(&toucher->tid);
		PrThreadTime time;

		pr_migration_query(pair->destination.engine, &info);
		if (find_thread(&info, tid, &time) && time.faults == faults && time.blocked_ns > 0)
			return time;
		if (g_get_monotonic_time() > deadline)
			g_error("no wait of thread %u with %" G_GUINT64_FORMAT " pages was counted",
				tid, faults);
		g_usleep(200); /* between two checks of the condition */
	}
}

/* The path is cut first, so that all threads are certain to wait at the same time. */
static void each_waiting_thread_is_counted(void **state)
{
	PairConfig config = {
		.scheme = scheme_of(state), .size = 16 * MIB, .bandwidth = 1, .paused = TRUE};
	g_autoptr(Pair) pair = pair_new(&config);
	Toucher touchers[3] = {0};

	pair_migrate(pair);
	pair_wait(pair, PR_STATE_POSTCOPY_ACTIVE);
	pr_faults_cut_paths(pair->faults);
	pair_wait(pair, PR_STATE_POSTCOPY_PAUSED);
	uint8_t *page = (uint8_t *)testguest_block_map(pair->destination.guest, 1) + 1003 * PAGE;
	for (guint i = 0; i < G_N_ELEMENTS(touchers); i++) {
		touchers[i].at = page + 8 * i;
		touchers[i].thread = g_thread_new("toucher", touch, &touchers[i]);
	}
	for (guint i = 0; i < G_N_ELEMENTS(touchers); i++) {
		wait_for_faults(pair, &touchers[i], 0);
		assert_false(g_atomic_int_get(&touchers[i].done));
	}
	pr_params_set(&pair->destination.params, "max-postcopy-bandwidth", 0, NULL);
	pair_resume(pair);
	for (guint i = 0; i < G_N_ELEMENTS(touchers); i++) {
		g_thread_join(touchers[i].thread);
		PrThreadTime time = wait_for_faults(pair, &touchers[i], 1);
		assert_int_equal(time.latency_ns, time.blocked_ns);
	}
	pair_wait(pair, PR_STATE_COMPLETED);
	pair_check_completed(pair);
}

static uint64_t faults_of_threads(const PrBlocktimeInfo *info)
{
	uint64_t sum = info->other_faults;

	for (guint i = 0; info->threads && i < info->threads->len; i++)
		sum += g_array_index(info->threads, PrThreadTime, i).faults;
	return sum;
}

static void faults_of_threads_add_up_to_the_total(void **state)
{
	PairConfig config = {
		.scheme = scheme_of(state), .size = 64 * MIB, .n_threads = 4, .bandwidth = 8 * MIB};
	g_autoptr(Pair) pair = pair_new(&config);
	gint64 deadline = g_get_monotonic_time() + PATIENCE_US;

	pair_migrate(pair);
	pair_wait(pair, PR_STATE_COMPLETED);
	pair_check_completed(pair);
	/* The fault threads may count their last faults after completion. */
	for (;;) {
		g_auto(PrMigrationInfo) info = {0};

		pr_migration_query(pair->destination.engine, &info);
		assert_false(info.blocktime.vcpus_known);
		assert_true(info.faults > 0);
		/* The four threads of the guest, and the one that has loaded the device state. */
		if (info.blocktime.threads->len >= 4 &&
		    faults_of_threads(&info.blocktime) == info.faults)
			break;
		if (g_get_monotonic_time() > deadline)
			fail_msg("%u threads with %" G_GUINT64_FORMAT " faults, %" G_GUINT64_FORMAT
				 " in all",
				 info.blocktime.threads->len, faults_of_threads(&info.blocktime),
				 info.faults);
		g_usleep(1000); /* between two checks of the condition */
	}
}

/* Reads n pages of the destination's second block in order. */
typedef struct Walker {
	Pair *pair;
	guint first, n;
} Walker;

static gpointer walk(gpointer opaque)
{
	Walker *walker = opaque;
	const volatile uint8_t *map = testguest_block_map(walker->pair->destination.guest, 1);

	for (guint i = 0; i < walker->n; i++)
		(void)map[(uint64_t)(walker->first + i) * PAGE];
	return NULL;
}

/*
 * Returns the statistics of a walk over 2000 pages. The bandwidth limit leaves almost no bulk pull.
 */
static void walk_and_count(const char *scheme, uint64_t limit, PrMigrationInfo *ret)
{
	PairConfig config = {.scheme = scheme, .size = 32 * MIB, .bandwidth = 1, .paused = TRUE};
	g_autoptr(Pair) pair = pair_new(&config);
	Walker walker = {pair, 1000, 2000};
	g_auto(PrMigrationInfo) before = {0};
	g_autofree char *difference = NULL;

	assert_true(pr_params_set(&pair->destination.params, "fault-readahead", limit, NULL));
	pair_migrate(pair);
	pair_wait(pair, PR_STATE_POSTCOPY_ACTIVE);
	pr_migration_query(pair->destination.engine, &before);
	walk(&walker);
	pr_migration_query(pair->destination.engine, ret);
	ret->faults -= before.faults;
	pr_params_set(&pair->destination.params, "max-postcopy-bandwidth", 0, NULL);
	pair_wait(pair, PR_STATE_COMPLETED);
	pair_check_completed(pair);
	if (!testguest_equal(pair->source.guest, pair->destination.guest, &difference))
		fail_msg("%s", difference);
}

static void a_walk_faults_far_less_with_read_ahead(void **state)
{
	g_auto(PrMigrationInfo) without = {0}, with = {0};

	walk_and_count(scheme_of(state), 0, &without);
	walk_and_count(scheme_of(state), 32, &with);
	/*
	 * One page in sixteen is a hole, and one is all zero. The source sends both as zero ranges,
	 * before or after the walk reaches them. The first bulk READs may cover a few more pages.
	 */
	assert_in_range(without.faults, 1500, 2000);
	assert_int_equal(without.readahead_pages, 0);
	assert_true(with.faults < without.faults / 4);
	assert_true(with.readahead_pages > 1000);
	assert_true(with.readahead_waited <= with.faults);
}

/* Pages whose read-ahead was lost with the path are requested again. */
static void read_ahead_survives_lost_paths(void **state)
{
	PairConfig config = {
		.scheme = scheme_of(state), .size = 32 * MIB, .bandwidth = 1, .paused = TRUE};
	g_autoptr(Pair) pair = pair_new(&config);
	Walker walker = {pair, 0, 4096};
	g_auto(PrMigrationInfo) info = {0};
	g_autofree char *difference = NULL;
	uint64_t received;

	pr_params_set(&pair->destination.params, "fault-readahead", PR_READAHEAD_MAX, NULL);
	pair_migrate(pair);
	pair_wait(pair, PR_STATE_POSTCOPY_ACTIVE);
	pr_migration_query(pair->destination.engine, &info);
	received = info.total - info.remaining;
	pr_migration_info_clear(&info);
	GThread *thread = g_thread_new("walker", walk, &walker);
	for (guint i = 1; i <= 6; i++) {
		pair_wait_received(pair, received + i * MIB);
		pr_faults_cut_paths(pair->faults);
		pair_wait(pair, PR_STATE_POSTCOPY_PAUSED);
		pair_resume(pair);
		pair_wait(pair, PR_STATE_POSTCOPY_ACTIVE);
	}
	g_thread_join(thread);
	pr_params_set(&pair->destination.params, "max-postcopy-bandwidth", 0, NULL);
	pair_wait(pair, PR_STATE_COMPLETED);
	pair_check_completed(pair);
	pr_migration_query(pair->destination.engine, &info);
	assert_true(info.readahead_pages > 0);
	assert_int_equal(info.pauses, 6);
	if (!testguest_equal(pair->source.guest, pair->destination.guest, &difference))
		fail_msg("%s", difference);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		BOTH(each_waiting_thread_is_counted),
		BOTH(faults_of_threads_add_up_to_the_total),
		BOTH(a_walk_faults_far_less_with_read_ahead),
		BOTH(read_ahead_survives_lost_paths),
	};

	return RUN_CASES("faults", tests);
}
