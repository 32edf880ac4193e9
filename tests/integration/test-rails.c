/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Several rails at once: the standbys pull along, and may die at any time. */
#include <string.h>

#include "migration/internal.h"
#include "tests/integration/cases.h"

#define MIB	    (1024ull * 1024)
#define PATIENCE_US (60 * G_USEC_PER_SEC)
#define MAX_RAILS   3

/* Paths with faults at the destination's end, where READs are posted. */
typedef struct Rails {
	Pair *pair;
	guint n;
	char *here[MAX_RAILS];	/* what the destination calls them */
	char *there[MAX_RAILS]; /* what the source calls them */
	PrFaults *faults[MAX_RAILS];
	char *uris; /* for migrate */
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
	/* Probes follow each other fast here. */
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
		g_usleep(500); /* between two looks at the condition */
	}
}

static void wait_rails(Side *side, guint n)
{
	gint64 deadline = g_get_monotonic_time() + PATIENCE_US;

	while (rails_of(side) != n) {
		if (g_get_monotonic_time() > deadline)
			g_error("%s: %u rails, not %u", side->name, rails_of(side), n);
		g_usleep(500); /* between two looks at the condition */
	}
}

static uint64_t path_bytes(Rails *rails, guint i)
{
	return side_path(&rails->pair->destination, rails->here[i]).bytes;
}

/* Waits until the destination has pulled so much more over this path. */
static void wait_carries(Rails *rails, guint i, uint64_t more)
{
	gint64 deadline = g_get_monotonic_time() + PATIENCE_US;
	uint64_t before = path_bytes(rails, i);

	while (path_bytes(rails, i) < before + more) {
		if (g_get_monotonic_time() > deadline)
			g_error("path %s does not carry anything", rails->here[i]);
		g_usleep(500); /* between two looks at the condition */
	}
}

static void set_bandwidth(Rails *rails, uint64_t rate)
{
	assert_true(pr_params_set(&rails->pair->destination.params, "max-postcopy-bandwidth", rate,
				  NULL));
}

/* In mid-pull, over all n of them. */
static void start(Rails *rails, guint n, void **state, uint64_t bandwidth)
{
	PairConfig config = {.size = 32 * MIB, .bandwidth = bandwidth, .pace_us = 50000};

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

	start(&rails, 3, state, 4 * MIB);
	for (guint i = 0; i < 3; i++)
		wait_carries(&rails, i, 512 * 1024);
	/* The source hears of it, too. */
	wait_rails(&rails.pair->source, 3);
	finish(&rails, 0);
	for (guint i = 0; i < 3; i++) {
		uint64_t here = path_bytes(&rails, i);
		uint64_t there = side_path(&rails.pair->source, rails.there[i]).bytes;
		assert_true(here > 512 * 1024);
		assert_true(there > 512 * 1024);
	}
	/* What is over is no rail. */
	wait_rails(&rails.pair->source, 0);
}

static void a_rail_that_is_cut_is_not_missed(void **state)
{
	g_auto(Rails) rails = {0};

	start(&rails, 3, state, 4 * MIB);
	for (guint i = 1; i < 3; i++) {
		wait_carries(&rails, i, 256 * 1024);
		pr_faults_cut_paths(rails.faults[i]);
		wait_rails(&rails.pair->destination, 3 - i);
		wait_carries(&rails, 0, 256 * 1024);
	}
	finish(&rails, 0);
}

/* READs die at all places of their lives: when they are posted, and when they complete. */
static void a_rail_that_dies_at_a_read_is_not_missed(void **state)
{
	g_auto(Rails) rails = {0};

	start(&rails, 3, state, 4 * MIB);
	guint64 posted = pr_faults_counts(rails.faults[1]).reads;
	PrFaultPlan cut = {.cut_after_reads = posted + 4};
	pr_faults_set_plan(rails.faults[1], &cut);
	guint64 done = pr_faults_counts(rails.faults[2]).completions;
	PrFaultPlan fail = {.error_read = done + 4};
	pr_faults_set_plan(rails.faults[2], &fail);
	wait_rails(&rails.pair->destination, 1);
	wait_carries(&rails, 0, 256 * 1024);
	finish(&rails, 0);
}

/* Nothing fails, nothing comes: what was asked for over this rail is asked for again over another. */
static void a_rail_that_is_silent_is_given_up(void **state)
{
	g_auto(Rails) rails = {0};

	start(&rails, 2, state, 4 * MIB);
	assert_true(
		pr_params_set(&rails.pair->destination.params, "heartbeat-timeout", 3000, NULL));
	wait_carries(&rails, 1, 256 * 1024);
	guint64 posted = pr_faults_counts(rails.faults[1]).reads;
	pr_faults_stall_paths(rails.faults[1]);
	wait_rails(&rails.pair->destination, 1);
	assert_true(pr_faults_counts(rails.faults[1]).reads > posted);
	finish(&rails, 0);
}

static void the_path_in_use_is_lost_and_a_rail_takes_over(void **state)
{
	g_auto(Rails) rails = {0};

	start(&rails, 3, state, 4 * MIB);
	for (guint i = 0; i < 3; i++)
		wait_carries(&rails, i, 256 * 1024);
	pr_faults_cut_paths(rails.faults[0]);
	pair_wait_recovered(rails.pair, 1);
	assert_int_equal(side_path(&rails.pair->destination, rails.here[1]).state, PR_PATH_ACTIVE);
	/* The third one was a rail all the time. */
	wait_carries(&rails, 1, 256 * 1024);
	wait_carries(&rails, 2, 256 * 1024);
	pr_faults_cut_paths(rails.faults[1]);
	pair_wait_recovered(rails.pair, 2);
	wait_carries(&rails, 2, 256 * 1024);
	finish(&rails, 2);
}

/* READs that are under way over slow rails when the path in use is fenced land long after it, and on pages that
 * nobody else may have read meanwhile. The first of the rails is activated with some outstanding. */
static void reads_of_slow_rails_outlive_the_path_in_use(void **state)
{
	g_auto(Rails) rails = {0};
	PrFaultPlan slow[] = {{0}, {.delay_ms = 5}, {.delay_ms = 1000}};

	/* It lasts until the last rail has brought its first few READs, a second each. */
	start(&rails, 3, state, 4 * MIB);
	for (guint i = 1; i < 3; i++) {
		pr_faults_set_plan(rails.faults[i], &slow[i]);
		wait_carries(&rails, i, 128 * 1024);
	}
	pr_faults_cut_paths(rails.faults[0]);
	pair_wait_recovered(rails.pair, 1);
	/* Far less than a second later the walk comes round to what the last rail has been asked for. */
	finish(&rails, 1);
}

/* The path in use and a rail at the same time; the third one is left. */
static void two_of_three_die_at_once(void **state)
{
	g_auto(Rails) rails = {0};

	start(&rails, 3, state, 4 * MIB);
	for (guint i = 0; i < 3; i++)
		wait_carries(&rails, i, 256 * 1024);
	pr_faults_cut_paths(rails.faults[1]);
	pr_faults_cut_paths(rails.faults[0]);
	pair_wait_recovered(rails.pair, 1);
	wait_carries(&rails, 2, 256 * 1024);
	finish(&rails, 1);
}

/* A rail whose READs stay without an answer can't be activated before they are accounted for; it is given up
 * instead. */
static void a_silent_rail_is_not_activated(void **state)
{
	g_auto(Rails) rails = {0};

	start(&rails, 3, state, 4 * MIB);
	assert_true(
		pr_params_set(&rails.pair->destination.params, "heartbeat-timeout", 3000, NULL));
	guint64 posted = pr_faults_counts(rails.faults[1]).reads;
	pr_faults_stall_paths(rails.faults[1]);
	while (pr_faults_counts(rails.faults[1]).reads == posted)
		g_usleep(500); /* between two looks at the condition */
	pr_faults_cut_paths(rails.faults[0]);
	pair_wait_recovered(rails.pair, 1);
	assert_int_equal(side_path(&rails.pair->destination, rails.here[2]).state, PR_PATH_ACTIVE);
	finish(&rails, 1);
}

static uint64_t transferred(Rails *rails)
{
	g_auto(PrMigrationInfo) info = {0};

	pr_migration_query(rails->pair->destination.engine, &info);
	return info.transferred;
}

/* What comes in within some time at this limit, relative to what may. */
static void check_rate(Rails *rails, uint64_t rate)
{
	uint64_t slack =
		3 * 8 * 128 *
		1024; /* what is outstanding: counted when it lands, not when it is posted */

	set_bandwidth(rails, rate);
	wait_carries(rails, 0, 128 * 1024);
	uint64_t before = transferred(rails);
	gint64 began = g_get_monotonic_time();
	g_usleep(1500 * 1000); /* a rate is taken over time */
	uint64_t came = transferred(rails) - before;
	double allowed = (double)rate * (double)(g_get_monotonic_time() - began) / G_USEC_PER_SEC;
	assert_true((double)came < allowed * 1.05 + (double)slack);
	assert_true((double)came > allowed * 0.5);
}

static void the_bandwidth_is_that_of_all_rails(void **state)
{
	g_auto(Rails) rails = {0};
	PairConfig config = {.size = 96 * MIB, .bandwidth = 2 * MIB, .paused = TRUE};

	rails_init(&rails, 3, scheme_of(state), config);
	assert_true(pr_migration_start(rails.pair->source.engine, rails.uris, FALSE, NULL));
	pair_wait(rails.pair, PR_STATE_POSTCOPY_ACTIVE);
	wait_rails(&rails.pair->destination, 3);
	check_rate(&rails, 16 * MIB);
	check_rate(&rails, 8 * MIB);
	set_bandwidth(&rails, 0);
	pair_wait(rails.pair, PR_STATE_COMPLETED);
}

static void a_pause_holds_every_rail(void **state)
{
	g_auto(Rails) rails = {0};
	g_autoptr(GError) error = NULL;

	start(&rails, 3, state, 4 * MIB);
	for (guint i = 0; i < 3; i++)
		wait_carries(&rails, i, 256 * 1024);
	assert_true(pr_migration_pause(rails.pair->destination.engine, NULL));
	pair_wait(rails.pair, PR_STATE_POSTCOPY_PAUSED);
	/* The stripes are ended where there is nothing to pull for, once their READs are in. */
	while (side_path(&rails.pair->destination, rails.here[1]).pulls ||
	       side_path(&rails.pair->destination, rails.here[2]).pulls)
		g_usleep(500); /* between two looks at the condition */
	uint64_t before = transferred(&rails);
	/* Nothing may come for as long: there is no condition to wait for. */
	g_usleep(300 * 1000);
	assert_int_equal(transferred(&rails), before);
	pr_migration_start(rails.pair->source.engine, rails.uris, /* resume= */ TRUE, &error);
	g_assert_no_error(error);
	pair_wait_recovered(rails.pair, 1);
	/* The source may have tried one of the others, in vain, so that that is on probation now; the last one has
	 * stood by all the time. */
	wait_rails_at_least(&rails.pair->destination, 2);
	finish(&rails, 1);
}

static void can_be_switched_off_and_on(void **state)
{
	g_auto(Rails) rails = {0};

	start(&rails, 2, state, 4 * MIB);
	wait_carries(&rails, 1, 256 * 1024);
	assert_true(pr_params_set_capability(&rails.pair->destination.params, "multi-rail", FALSE,
					     NULL));
	wait_rails(&rails.pair->destination, 1);
	uint64_t before = path_bytes(&rails, 1);
	wait_carries(&rails, 0, 512 * 1024);
	assert_int_equal(path_bytes(&rails, 1), before);
	assert_int_equal(side_path(&rails.pair->destination, rails.here[1]).state, PR_PATH_STANDBY);
	assert_true(pr_params_set_capability(&rails.pair->destination.params, "multi-rail", TRUE,
					     NULL));
	wait_carries(&rails, 1, 256 * 1024);
	finish(&rails, 0);
}

/* Whoever quits leaves the other side paused, and nothing behind. */
static void either_side_may_quit_in_mid_pull(void **state)
{
	for (guint i = 0; i < 2; i++) {
		g_auto(Rails) rails = {0};
		start(&rails, 3, state, 4 * MIB);
		Side *quits = i ? &rails.pair->source : &rails.pair->destination;
		Side *left = i ? &rails.pair->destination : &rails.pair->source;
		wait_carries(&rails, 2, 256 * 1024);
		pr_migration_free(g_steal_pointer(&quits->engine));
		side_wait_any(left, 1u << PR_STATE_POSTCOPY_PAUSED |
					    1u << PR_STATE_POSTCOPY_RECOVER_SETUP);
	}
}

/* A path of another transport is there for when all else fails. */
static void the_path_of_last_resort_is_no_rail(void **state)
{
	PairConfig config = {.scheme = "ofi",
			     .size = 16 * MIB,
			     .bandwidth = 2 * MIB,
			     .pace_us = 50000,
			     .more = {"tcp"}};
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
		BOTH(a_rail_that_is_cut_is_not_missed),
		BOTH(a_rail_that_dies_at_a_read_is_not_missed),
		BOTH(a_rail_that_is_silent_is_given_up),
		BOTH(the_path_in_use_is_lost_and_a_rail_takes_over),
		BOTH(reads_of_slow_rails_outlive_the_path_in_use),
		BOTH(two_of_three_die_at_once),
		BOTH(a_silent_rail_is_not_activated),
		BOTH(the_bandwidth_is_that_of_all_rails),
		BOTH(a_pause_holds_every_rail),
		BOTH(can_be_switched_off_and_on),
		BOTH(either_side_may_quit_in_mid_pull),
		cmocka_unit_test(the_path_of_last_resort_is_no_rail),
	};

	/* A page that is placed twice is one: pr_ram_received(). */
	g_log_set_always_fatal(G_LOG_FATAL_MASK | G_LOG_LEVEL_CRITICAL);
	return RUN_CASES("rails", tests);
}
