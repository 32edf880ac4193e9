/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Several rails at once: standbys carry bulk READs as well, and may fail at any time. */
#include <string.h>

#include "migration/internal.h"
#include "tests/integration/cases.h"

#define MIB	    (1024ull * 1024)
#define PATIENCE_US (60 * G_USEC_PER_SEC)
#define MAX_RAILS   3

/* Paths with fault injection at the destination, which posts the READs. */
typedef struct Rails {
	Pair *pair;
	guint n;
	char *here[MAX_RAILS];	/* URIs at the destination */
	char *there[MAX_RAILS]; /* URIs at the source */
	PrFaults *faults[MAX_RAILS];
	char *uris; /* the list that `migrate` gets */
} Rails;

static void rails_init(Rails *rails, guint n, const char *scheme, PairConfig config)
{
	g_autofree char *faulty = g_strdup_printf("faulty+%s", scheme);
	g_autoptr(GString) uris = g_string_new(NULL);
	g_auto(PrMigrationInfo) info = {0};

	config.scheme = faulty;
	for (guint i = 1; i < n; i++)
		config.more[i - 1] = faulty;
	rails->pair = pair_new(&config);
	rails->n = n;
	pr_migration_query(rails->pair->destination.engine, &info);
	assert_int_equal(info.paths->len, n);
	for (guint i = 0; i < n; i++) {
		const PrPathInfo *path = g_ptr_array_index(info.paths, i);
		rails->here[i] = g_strdup(path->uri);
		rails->there[i] = g_strdup(path->uri + strlen("faulty+"));
		rails->faults[i] = pr_faults_new(path->uri);
		g_string_append_printf(uris, "%s%s", i ? "," : "", rails->there[i]);
	}
	rails->uris = g_strdup(uris->str);
	/* A short interval, so that standbys are trusted soon. */
	assert_true(pr_params_set(&rails->pair->destination.params, "probe-interval", 20, NULL));
}

static void rails_clear(Rails *rails)
{
	if (rails->pair)
		pair_free(rails->pair);
	for (guint i = 0; i < rails->n; i++) {
		pr_faults_free(rails->faults[i]);
		g_free(rails->here[i]);
		g_free(rails->there[i]);
	}
	g_free(rails->uris);
}
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(Rails, rails_clear)

static guint rails_of(Side *side)
{
	g_auto(PrMigrationInfo) info = {0};

	pr_migration_query(side->engine, &info);
	return info.rails;
}

static void wait_rails_at_least(Side *side, guint n)
{
	gint64 deadline = g_get_monotonic_time() + PATIENCE_US;

	while (rails_of(side) < n) {
		assert_true(g_get_monotonic_time() < deadline);
		g_usleep(500); /* between two checks of the condition */
	}
}

static void wait_rails(Side *side, guint n)
{
	gint64 deadline = g_get_monotonic_time() + PATIENCE_US;

	while (rails_of(side) != n) {
		if (g_get_monotonic_time() > deadline)
			g_error("%s: %u rails, not %u", side->name, rails_of(side), n);
		g_usleep(500); /* between two checks of the condition */
	}
}

static uint64_t path_bytes(Rails *rails, guint i)
{
	return side_path(&rails->pair->destination, rails->here[i]).bytes;
}

/* Waits until the destination has pulled so many bytes more over this path. */
static void wait_carries(Rails *rails, guint i, uint64_t more)
{
	gint64 deadline = g_get_monotonic_time() + PATIENCE_US;
	uint64_t before = path_bytes(rails, i);

	while (path_bytes(rails, i) < before + more) {
		if (g_get_monotonic_time() > deadline)
			g_error("path %s does not carry anything", rails->here[i]);
		g_usleep(500); /* between two checks of the condition */
	}
}

static void set_bandwidth(Rails *rails, uint64_t rate)
{
	assert_true(pr_params_set(&rails->pair->destination.params, "max-postcopy-bandwidth", rate,
				  NULL));
}

/*
 * The bytes that a rail has to carry before a test continues. The bandwidth limit is far below what
 * rails can carry.
 */
#define SHARE (128 * 1024)

/* Starts a migration, and waits until the pull uses all n rails. */
static void start(Rails *rails, guint n, void **state)
{
	PairConfig config = {PAIR_LASTS};

	rails_init(rails, n, scheme_of(state), config);
	assert_true(pr_migration_start(rails->pair->source.engine, rails->uris, FALSE, NULL));
	pair_wait(rails->pair, PR_STATE_POSTCOPY_ACTIVE);
	wait_rails(&rails->pair->destination, n);
}

static void finish(Rails *rails, guint64 pauses)
{
	Side *sides[] = {&rails->pair->source, &rails->pair->destination};

	set_bandwidth(rails, 0);
	pair_wait(rails->pair, PR_STATE_COMPLETED);
	pair_check_completed(rails->pair);
	for (guint i = 0; i < 2; i++) {
		g_auto(PrMigrationInfo) info = {0};
		uint64_t sum = 0;
		pr_migration_query(sides[i]->engine, &info);
		assert_int_equal(info.pauses, pauses);
		for (guint k = 0; k < info.paths->len; k++)
			sum += ((PrPathInfo *)g_ptr_array_index(info.paths, k))->bytes;
		assert_int_equal(sum, info.transferred);
	}
}

static void every_rail_carries_its_share(void **state)
{
	g_auto(Rails) rails = {0};

	start(&rails, 3, state);
	for (guint i = 0; i < 3; i++)
		wait_carries(&rails, i, SHARE);
	/* The destination reports the number of rails to the source. */
	wait_rails(&rails.pair->source, 3);
	finish(&rails, 0);
	for (guint i = 0; i < 3; i++) {
		uint64_t here = path_bytes(&rails, i);
		uint64_t there = side_path(&rails.pair->source, rails.there[i]).bytes;
		assert_true(here >= SHARE);
		assert_true(there >= SHARE);
	}
	/* A completed migration has no rails. */
	wait_rails(&rails.pair->source, 0);
}

static void the_pull_goes_on_without_a_cut_rail(void **state)
{
	g_auto(Rails) rails = {0};

	start(&rails, 3, state);
	for (guint i = 1; i < 3; i++) {
		wait_carries(&rails, i, SHARE);
		pr_faults_cut_paths(rails.faults[i]);
		wait_rails(&rails.pair->destination, 3 - i);
		wait_carries(&rails, 0, SHARE);
	}
	finish(&rails, 0);
}

/* READs fail at each stage: when they are posted, and when they complete. */
static void the_pull_goes_on_after_a_rail_fails_at_a_read(void **state)
{
	g_auto(Rails) rails = {0};

	start(&rails, 3, state);
	guint64 posted = pr_faults_counts(rails.faults[1]).reads;
	PrFaultPlan cut = {.cut_after_reads = posted + 4};
	pr_faults_set_plan(rails.faults[1], &cut);
	guint64 done = pr_faults_counts(rails.faults[2]).completions;
	PrFaultPlan fail = {.error_read = done + 4};
	pr_faults_set_plan(rails.faults[2], &fail);
	wait_rails(&rails.pair->destination, 1);
	wait_carries(&rails, 0, SHARE);
	finish(&rails, 0);
}

/*
 * The rail reports no error and no completion. Its outstanding pages are read again over another
 * rail.
 */
static void a_silent_rail_is_dropped(void **state)
{
	g_auto(Rails) rails = {0};

	start(&rails, 2, state);
	assert_true(
		pr_params_set(&rails.pair->destination.params, "heartbeat-timeout", 6000, NULL));
	wait_carries(&rails, 1, SHARE);
	guint64 posted = pr_faults_counts(rails.faults[1]).reads;
	pr_faults_stall_paths(rails.faults[1]);
	wait_rails(&rails.pair->destination, 1);
	assert_true(pr_faults_counts(rails.faults[1]).reads > posted);
	finish(&rails, 0);
}

static void the_path_in_use_is_lost_and_a_rail_takes_over(void **state)
{
	g_auto(Rails) rails = {0};

	start(&rails, 3, state);
	for (guint i = 0; i < 3; i++)
		wait_carries(&rails, i, SHARE);
	pr_faults_cut_paths(rails.faults[0]);
	pair_wait_recovered(rails.pair, 1);
	side_check_path(&rails.pair->destination, rails.here[1], PR_PATH_ACTIVE);
	/* The third path has been a rail all the time. */
	wait_carries(&rails, 1, SHARE);
	wait_carries(&rails, 2, SHARE);
	pr_faults_cut_paths(rails.faults[1]);
	pair_wait_recovered(rails.pair, 2);
	wait_carries(&rails, 2, SHARE);
	finish(&rails, 2);
}

/*
 * When the path in use is fenced, READs of the slow rails are still outstanding. They land long
 * after the fence, on pages that no other rail may have read meanwhile. The first of these rails is
 * activated with READs outstanding.
 */
static void reads_of_slow_rails_outlive_the_path_in_use(void **state)
{
	g_auto(Rails) rails = {0};
	PrFaultPlan slow[] = {{0}, {.delay_ms = 5}, {.delay_ms = 1000}};

	/* The migration lasts until the first READs of the last rail complete, a second each. */
	start(&rails, 3, state);
	for (guint i = 1; i < 3; i++) {
		pr_faults_set_plan(rails.faults[i], &slow[i]);
		wait_carries(&rails, i, SHARE);
	}
	pr_faults_cut_paths(rails.faults[0]);
	pair_wait_recovered(rails.pair, 1);
	/*
	 * Far less than a second later the pull reaches the pages that the last rail still has to
	 * bring.
	 */
	finish(&rails, 1);
}

/* The path in use and one rail fail at the same time, and the third path takes over. */
static void two_of_three_paths_fail_at_once(void **state)
{
	g_auto(Rails) rails = {0};

	start(&rails, 3, state);
	for (guint i = 0; i < 3; i++)
		wait_carries(&rails, i, SHARE);
	pr_faults_cut_paths(rails.faults[1]);
	pr_faults_cut_paths(rails.faults[0]);
	pair_wait_recovered(rails.pair, 1);
	wait_carries(&rails, 2, SHARE);
	finish(&rails, 1);
}

/* Waits until more than `posted` READs have been posted. */
static void wait_reads(PrFaults *faults, guint64 posted)
{
	gint64 deadline = g_get_monotonic_time() + PATIENCE_US;

	while (pr_faults_counts(faults).reads == posted) {
		assert_true(g_get_monotonic_time() < deadline);
		g_usleep(500); /* between two checks of the condition */
	}
}

/*
 * A rail whose READs are not answered can't be activated before these READs have ended. The engine
 * drops that rail and activates another one.
 */
static void a_silent_rail_is_not_activated(void **state)
{
	g_auto(Rails) rails = {0};

	start(&rails, 3, state);
	assert_true(
		pr_params_set(&rails.pair->destination.params, "heartbeat-timeout", 6000, NULL));
	guint64 posted = pr_faults_counts(rails.faults[1]).reads;
	pr_faults_stall_paths(rails.faults[1]);
	wait_reads(rails.faults[1], posted);
	pr_faults_cut_paths(rails.faults[0]);
	pair_wait_recovered(rails.pair, 1);
	side_check_path(&rails.pair->destination, rails.here[2], PR_PATH_ACTIVE);
	finish(&rails, 1);
}

static uint64_t transferred(Rails *rails)
{
	g_auto(PrMigrationInfo) info = {0};

	pr_migration_query(rails->pair->destination.engine, &info);
	return info.transferred;
}

/*
 * Fails if more bytes arrive than the limit allows. Returns whether at least half of what it allows
 * has arrived.
 */
static gboolean arrives_at_rate(Rails *rails, uint64_t rate)
{
	uint64_t slack =
		3 * 8 * 128 * 1024; /* outstanding READs, which are counted when they land */

	/*
	 * The clock is read before the first count and after the second one. So a stall in between
	 * does not increase the measured rate.
	 */
	gint64 began = g_get_monotonic_time();
	uint64_t before = transferred(rails);
	g_usleep(1500 * 1000); /* a rate needs a time to measure it over */
	uint64_t arrived = transferred(rails) - before;
	double allowed = (double)rate * (double)(g_get_monotonic_time() - began) / G_USEC_PER_SEC;
	assert_true((double)arrived < allowed * 1.05 + (double)slack);
	return (double)arrived > allowed * 0.5;
}

/* A busy machine may slow the pull down, though not in all of these windows. */
static void check_rate(Rails *rails, uint64_t rate)
{
	gboolean holds = FALSE;

	set_bandwidth(rails, rate);
	wait_carries(rails, 0, SHARE);
	for (guint i = 0; i < 10 && !holds; i++)
		holds = arrives_at_rate(rails, rate);
	assert_true(holds);
}

static void the_bandwidth_limit_covers_all_rails(void **state)
{
	g_auto(Rails) rails = {0};
	PairConfig config = {.size = 96 * MIB, .bandwidth = 2 * MIB, .paused = TRUE};

	rails_init(&rails, 3, scheme_of(state), config);
	assert_true(pr_migration_start(rails.pair->source.engine, rails.uris, FALSE, NULL));
	pair_wait(rails.pair, PR_STATE_POSTCOPY_ACTIVE);
	wait_rails(&rails.pair->destination, 3);
	/*
	 * Ten windows at these rates need less than the guest's memory, if half of each rate is
	 * reached.
	 */
	check_rate(&rails, 8 * MIB);
	check_rate(&rails, 4 * MIB);
	set_bandwidth(&rails, 0);
	pair_wait(rails.pair, PR_STATE_COMPLETED);
}

static void wait_pull_ended(Rails *rails, guint i)
{
	gint64 deadline = g_get_monotonic_time() + PATIENCE_US;

	while (side_path(&rails->pair->destination, rails->here[i]).pulls) {
		assert_true(g_get_monotonic_time() < deadline);
		g_usleep(500); /* between two checks of the condition */
	}
}

static void a_pause_stops_every_rail(void **state)
{
	g_auto(Rails) rails = {0};
	g_autoptr(GError) error = NULL;

	start(&rails, 3, state);
	for (guint i = 0; i < 3; i++)
		wait_carries(&rails, i, SHARE);
	assert_true(pr_migration_pause(rails.pair->destination.engine, NULL));
	pair_wait(rails.pair, PR_STATE_POSTCOPY_PAUSED);
	/* A rail's thread stops pulling after its outstanding READs have completed. */
	wait_pull_ended(&rails, 1);
	wait_pull_ended(&rails, 2);
	uint64_t before = transferred(&rails);
	/* A check that nothing arrives has no condition to wait for, so it needs this time. */
	g_usleep(300 * 1000);
	assert_int_equal(transferred(&rails), before);
	pr_migration_start(rails.pair->source.engine, rails.uris, /* resume= */ TRUE, &error);
	g_assert_no_error(error);
	pair_wait_recovered(rails.pair, 1);
	/*
	 * The source may have tried to recover over one of the other paths, which is then on
	 * probation. The last path has been a standby all the time.
	 */
	wait_rails_at_least(&rails.pair->destination, 2);
	finish(&rails, 1);
}

static void rails_can_be_switched_off_and_on(void **state)
{
	g_auto(Rails) rails = {0};

	start(&rails, 2, state);
	wait_carries(&rails, 1, SHARE);
	assert_true(pr_params_set_capability(&rails.pair->destination.params, "multi-rail", FALSE,
					     NULL));
	wait_rails(&rails.pair->destination, 1);
	uint64_t before = path_bytes(&rails, 1);
	wait_carries(&rails, 0, 2 * SHARE);
	assert_int_equal(path_bytes(&rails, 1), before);
	side_check_path(&rails.pair->destination, rails.here[1], PR_PATH_STANDBY);
	assert_true(pr_params_set_capability(&rails.pair->destination.params, "multi-rail", TRUE,
					     NULL));
	wait_carries(&rails, 1, SHARE);
	finish(&rails, 0);
}

/* Ends one engine. The other side must pause, and nothing may leak. */
static void either_side_may_quit_in_mid_pull(void **state)
{
	for (guint i = 0; i < 2; i++) {
		g_auto(Rails) rails = {0};
		start(&rails, 3, state);
		Side *quits = i ? &rails.pair->source : &rails.pair->destination;
		Side *left = i ? &rails.pair->destination : &rails.pair->source;
		wait_carries(&rails, 2, SHARE);
		pr_migration_free(g_steal_pointer(&quits->engine));
		side_wait_any(left, 1u << PR_STATE_POSTCOPY_PAUSED |
					    1u << PR_STATE_POSTCOPY_RECOVER_SETUP);
	}
}

/* A path of another transport is only used if all others fail, and is no rail. */
static void a_path_of_another_transport_is_no_rail(void **state)
{
	PairConfig config = {.scheme = "ofi", PAIR_LASTS, .more = {"tcp"}};
	g_autoptr(Pair) pair = pair_new(&config);
	g_auto(PrMigrationInfo) info = {0};

	assert_true(pr_params_set(&pair->destination.params, "probe-interval", 20, NULL));
	pr_migration_query(pair->destination.engine, &info);
	const char *ofi = ((PrPathInfo *)g_ptr_array_index(info.paths, 0))->uri;
	const char *tcp = ((PrPathInfo *)g_ptr_array_index(info.paths, 1))->uri;
	g_autofree char *uris = g_strdup_printf("%s,%s", ofi, tcp);
	assert_true(pr_migration_start(pair->source.engine, uris, FALSE, NULL));
	pair_wait(pair, PR_STATE_POSTCOPY_ACTIVE);
	side_wait_path(&pair->destination, tcp, PR_PATH_STANDBY);
	pair_wait_received(pair, 8 * MIB);
	assert_int_equal(rails_of(&pair->destination), 1);
	assert_true(pr_params_set(&pair->destination.params, "max-postcopy-bandwidth", 0, NULL));
	pair_wait(pair, PR_STATE_COMPLETED);
	assert_int_equal(side_path(&pair->destination, tcp).bytes, 0);
	pair_check_completed(pair);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		BOTH(every_rail_carries_its_share),
		BOTH(the_pull_goes_on_without_a_cut_rail),
		BOTH(the_pull_goes_on_after_a_rail_fails_at_a_read),
		BOTH(a_silent_rail_is_dropped),
		BOTH(the_path_in_use_is_lost_and_a_rail_takes_over),
		BOTH(reads_of_slow_rails_outlive_the_path_in_use),
		BOTH(two_of_three_paths_fail_at_once),
		BOTH(a_silent_rail_is_not_activated),
		BOTH(the_bandwidth_limit_covers_all_rails),
		BOTH(a_pause_stops_every_rail),
		BOTH(rails_can_be_switched_off_and_on),
		BOTH(either_side_may_quit_in_mid_pull),
		cmocka_unit_test(a_path_of_another_transport_is_no_rail),
	};

	/*
	 * To place a page twice is a critical log message (pr_ram_received()), which ends the test.
	 */
	g_log_set_always_fatal(G_LOG_FATAL_MASK | G_LOG_LEVEL_CRITICAL);
	return RUN_CASES("rails", tests);
}
