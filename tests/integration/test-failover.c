/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Two listed paths: which one is taken when the one in use is lost, and what stands by. */
#include <string.h>

#include "migration/internal.h"
#include "migration/session/messages.h"
#include "tests/integration/cases.h"
#include "tests/rigs/door.h"

#define MIB (1024ull * 1024)

/* Two paths, each with faults of its own. */
typedef struct TwoPaths {
	Pair *pair;
	PrFaults *faults[2];
	char *uri[2];
	char *uris; /* for migrate */
} TwoPaths;

static void two_paths_init(TwoPaths *two, const PairConfig *config)
{
	static int count; /* of the main thread; names the faults of each test */
	g_auto(PrMigrationInfo) info = {0};

	two->pair = pair_new(config);
	pr_migration_query(two->pair->destination.engine, &info);
	assert_int_equal(info.paths->len, 2);
	for (guint i = 0; i < 2; i++) {
		const PrPathInfo *path = g_ptr_array_index(info.paths, i);
		g_autofree char *id = g_strdup_printf("of-two-%d", count++);
		two->faults[i] = pr_faults_new(id);
		two->uri[i] = g_strdup_printf("faulty+%s?fault-id=%s", path->uri, id);
	}
	two->uris = g_strdup_printf("%s,%s", two->uri[0], two->uri[1]);
}

static void two_paths_clear(TwoPaths *two)
{
	pair_free(two->pair);
	pr_faults_free(two->faults[0]);
	pr_faults_free(two->faults[1]);
	g_free(two->uri[0]);
	g_free(two->uri[1]);
	g_free(two->uris);
}
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(TwoPaths, two_paths_clear)

static guint news_so_far(Side *side)
{
	g_mutex_lock(&side->lock);
	guint n = side->path_news->len;
	g_mutex_unlock(&side->lock);
	return n;
}

/* Waits until it was told, behind the first n news, that the path was in this state, if only for a moment.
 * Returns the number of the news up to there. */
static guint wait_path_news_behind(Side *side, guint n, const char *uri, PrPathState state)
{
	gint64 deadline = g_get_monotonic_time() + 60 * G_USEC_PER_SEC;
	gboolean told = FALSE;

	g_mutex_lock(&side->lock);
	while (!told) {
		for (; n < side->path_news->len && !told; n++) {
			const PathNews *news = &g_array_index(side->path_news, PathNews, n);
			told = news->state == state && strcmp(news->uri, uri) == 0;
		}
		if (!told)
			assert_true(g_cond_wait_until(&side->changed, &side->lock, deadline));
	}
	g_mutex_unlock(&side->lock);
	return n;
}

static void wait_path_news(Side *side, const char *uri, PrPathState state)
{
	wait_path_news_behind(side, 0, uri, state);
}

static void start(TwoPaths *two, void **state)
{
	PairConfig config = {.scheme = scheme_of(state), PAIR_LASTS, .more = {scheme_of(state)}};

	two_paths_init(two, &config);
	/* Probes follow each other fast here. */
	assert_true(pr_params_set(&two->pair->destination.params, "probe-interval", 20, NULL));
	assert_true(pr_migration_start(two->pair->source.engine, two->uris, FALSE, NULL));
	pair_wait(two->pair, PR_STATE_POSTCOPY_ACTIVE);
}

static void finish(TwoPaths *two)
{
	pr_params_set(&two->pair->destination.params, "max-postcopy-bandwidth", 0, NULL);
	pair_wait(two->pair, PR_STATE_COMPLETED);
	pair_check_completed(two->pair);
}

static void a_standby_takes_over_without_a_new_connection(void **state)
{
	g_auto(TwoPaths) two = {0};
	Side *source = NULL;

	start(&two, state);
	source = &two.pair->source;
	side_wait_path(source, two.uri[1], PR_PATH_STANDBY);
	guint64 paths = pr_faults_counts(two.faults[1]).paths;
	pr_faults_cut_paths(two.faults[0]);
	pair_wait_recovered(two.pair, 1);
	side_check_path(source, two.uri[1], PR_PATH_ACTIVE);
	assert_int_equal(pr_faults_counts(two.faults[1]).paths, paths);
	wait_path_news(source, two.uri[0], PR_PATH_FAILED);
	finish(&two);
	side_wait_path(source, two.uri[1], PR_PATH_IDLE);
}

static void a_standby_that_dies_is_known_and_disturbs_nobody(void **state)
{
	g_auto(TwoPaths) two = {0};
	g_auto(PrMigrationInfo) info = {0};

	start(&two, state);
	side_wait_path(&two.pair->source, two.uri[1], PR_PATH_STANDBY);
	pr_faults_cut_paths(two.faults[1]);
	wait_path_news(&two.pair->source, two.uri[1], PR_PATH_FAILED);
	/* It is connected again, and not trusted yet. */
	wait_path_news(&two.pair->source, two.uri[1], PR_PATH_PROBATION);
	finish(&two);
	pr_migration_query(two.pair->source.engine, &info);
	assert_int_equal(info.pauses, 0);
}

/* Waits until the path stands by and has answered a probe: from then on it may be taken. */
static void wait_probed(Side *side, const char *uri)
{
	gint64 deadline = g_get_monotonic_time() + 60 * G_USEC_PER_SEC;

	while (side_path(side, uri).data_rtt_us == 0) {
		assert_true(g_get_monotonic_time() < deadline);
		g_usleep(500); /* between two looks at the condition */
	}
}

/* The first path and the second are lost by turns, n times. The other is taken as it stands by, not connected anew. */
static void lose_by_turns(TwoPaths *two, guint n)
{
	Side *source = &two->pair->source;

	for (guint i = 0; i < n; i++) {
		guint lost = i % 2, left = 1 - lost;
		wait_probed(source, two->uri[left]);
		guint64 connected = pr_faults_counts(two->faults[left]).paths;
		pr_faults_cut_paths(two->faults[lost]);
		pair_wait_recovered(two->pair, i + 1);
		side_check_path(source, two->uri[left], PR_PATH_ACTIVE);
		assert_int_equal(pr_faults_counts(two->faults[left]).paths, connected);
	}
}

static void a_path_on_probation_is_taken_where_there_is_no_better_one(void **state)
{
	g_auto(TwoPaths) two = {0};

	start(&two, state);
	lose_by_turns(&two, 4);
	finish(&two);
}

static void of_two_on_probation_the_first_to_be_trusted_is_taken(void **state)
{
	g_auto(TwoPaths) two = {0};
	Side *source = NULL;

	start(&two, state);
	source = &two.pair->source;
	lose_by_turns(&two, 2);
	pr_params_set_capability(&source->params, "auto-recover", FALSE, NULL);
	pr_faults_cut_paths(two.faults[0]);
	pair_wait(two.pair, PR_STATE_POSTCOPY_PAUSED);
	wait_probed(source, two.uri[0]);
	wait_probed(source, two.uri[1]);
	pr_params_set_capability(&source->params, "auto-recover", TRUE, NULL);
	pair_wait_recovered(two.pair, 3);
	side_check_path(source, two.uri[1], PR_PATH_ACTIVE);
	finish(&two);
}

static void no_standby_is_kept_when_that_is_switched_off(void **state)
{
	g_auto(TwoPaths) two = {0};
	PairConfig config = {.scheme = scheme_of(state), PAIR_LASTS, .more = {scheme_of(state)}};

	two_paths_init(&two, &config);
	assert_true(
		pr_params_set_capability(&two.pair->source.params, "standby-paths", FALSE, NULL));
	assert_true(pr_migration_start(two.pair->source.engine, two.uris, FALSE, NULL));
	pair_wait(two.pair, PR_STATE_POSTCOPY_ACTIVE);
	for (guint i = 0; i < 3; i++) {
		guint64 paths = pr_faults_counts(two.faults[(i + 1) % 2]).paths;
		pr_faults_cut_paths(two.faults[i % 2]);
		pair_wait_recovered(two.pair, i + 1);
		assert_int_equal(pr_faults_counts(two.faults[(i + 1) % 2]).paths, paths + 1);
	}
	assert_int_equal(pr_faults_counts(two.faults[0]).paths, 2);
	finish(&two);
}

/* The destination says over the standby that it has lost the path in use. */
static void say_lost(Pair *pair, uint64_t epoch)
{
	PrMigration *m = pair->destination.engine;
	g_autoptr(GError) why = g_error_new_literal(PR_PATH_ERROR, PR_PATH_ERROR_LOST, "a test");

	g_mutex_lock(&m->session.lock);
	assert_int_equal(m->session.standbys->len, 1);
	pr_send_lost_nowait(&m->session, epoch, why);
	g_mutex_unlock(&m->session.lock);
}

static void news_over_a_standby_pauses_and_old_news_does_not(void **state)
{
	g_auto(TwoPaths) two = {0};
	g_auto(PrMigrationInfo) info = {0};

	start(&two, state);
	side_wait_path(&two.pair->source, two.uri[1], PR_PATH_STANDBY);
	PrMigration *m = two.pair->source.engine;
	g_mutex_lock(&m->session.lock);
	uint64_t epoch = m->session.conn->epoch;
	g_mutex_unlock(&m->session.lock);
	say_lost(two.pair, epoch + 1);
	say_lost(two.pair, epoch);
	pair_wait_recovered(two.pair, 1);
	side_wait_path(&two.pair->source, two.uri[1], PR_PATH_ACTIVE);
	/* That was one pause, not two. */
	finish(&two);
	pr_migration_query(two.pair->source.engine, &info);
	assert_int_equal(info.pauses, 1);
}

/* A human names the path that stands by: its standby is used, also when automatic recovery is off. */
static void a_human_uses_the_standby_too(void **state)
{
	g_auto(TwoPaths) two = {0};
	g_autoptr(GError) error = NULL;

	start(&two, state);
	assert_true(
		pr_params_set_capability(&two.pair->source.params, "auto-recover", FALSE, NULL));
	side_wait_path(&two.pair->source, two.uri[1], PR_PATH_STANDBY);
	guint64 paths = pr_faults_counts(two.faults[1]).paths;
	pr_faults_cut_paths(two.faults[0]);
	pair_wait(two.pair, PR_STATE_POSTCOPY_PAUSED);
	pr_migration_start(two.pair->source.engine, two.uri[1], /* resume= */ TRUE, &error);
	g_assert_no_error(error);
	pair_wait_recovered(two.pair, 1);
	assert_int_equal(pr_faults_counts(two.faults[1]).paths, paths);
	finish(&two);
}

static void fails_over_twenty_times_in_one_migration(void **state)
{
	g_auto(TwoPaths) two = {0};

	start(&two, state);
	for (guint i = 0; i < 20; i++) {
		/* Whichever is in use. */
		guint used =
			side_path(&two.pair->source, two.uri[0]).state == PR_PATH_ACTIVE ? 0 : 1;
		if (i % 3)
			pr_faults_cut_paths(two.faults[used]);
		else
			pr_faults_cut_next_message(two.faults[used]);
		pair_wait_recovered(two.pair, i + 1);
	}
	finish(&two);
}

/* It is the source that would come by itself. */
static void wait_held(Pair *pair)
{
	PrMigration *m = pair->source.engine;
	gint64 deadline = g_get_monotonic_time() + 60 * G_USEC_PER_SEC;

	g_mutex_lock(&m->session.lock);
	while (!m->session.paused_by_operator || m->session.sm.state != PR_STATE_POSTCOPY_PAUSED)
		assert_true(g_cond_wait_until(&m->session.changed, &m->session.lock, deadline));
	g_mutex_unlock(&m->session.lock);
}

static guint count_told(Side *side, PrState state)
{
	guint n = 0;

	g_mutex_lock(&side->lock);
	for (guint i = 0; i < side->states->len; i++)
		n += g_array_index(side->states, PrState, i) == state;
	g_mutex_unlock(&side->lock);
	return n;
}

/* A pause that a human asked for is ended by a human, from whichever side it came. */
static void stays_paused_when_a_human_paused(void **state)
{
	g_auto(TwoPaths) two = {0};
	g_autoptr(GError) error = NULL;

	start(&two, state);
	for (guint i = 0; i < 2; i++) {
		Side *asked = i ? &two.pair->source : &two.pair->destination;
		assert_true(pr_migration_pause(asked->engine, NULL));
		/* A source that did not hear why tries once, and is told. */
		wait_held(two.pair);
		pair_wait(two.pair, PR_STATE_POSTCOPY_PAUSED);
		guint attempts = count_told(&two.pair->source, PR_STATE_POSTCOPY_RECOVER_SETUP);
		/* No attempt may come for as long: there is no condition to wait for. */
		g_usleep(400 * 1000);
		wait_held(two.pair);
		assert_int_equal(count_told(&two.pair->source, PR_STATE_POSTCOPY_RECOVER_SETUP),
				 attempts);
		pr_migration_start(two.pair->source.engine, two.uris, /* resume= */ TRUE, &error);
		g_assert_no_error(error);
		pair_wait_recovered(two.pair, i + 1);
	}
	/* Switched off, a lost path waits for a human, too; switched on again, it is recovered. */
	assert_true(
		pr_params_set_capability(&two.pair->source.params, "auto-recover", FALSE, NULL));
	pr_faults_cut_paths(two.faults[0]);
	pair_wait(two.pair, PR_STATE_POSTCOPY_PAUSED);
	assert_true(pr_params_set_capability(&two.pair->source.params, "auto-recover", TRUE, NULL));
	pair_wait_recovered(two.pair, 3);
	finish(&two);
}

static guint16 port_of(const char *text)
{
	g_autoptr(PrUri) uri = pr_uri_parse(text, FALSE, NULL);

	return uri->port;
}

/* An attempt to connect a standby has no answer; meanwhile its path is connected otherwise, and used. What becomes of the
 * attempt says nothing of the path then. */
static void a_late_attempt_for_a_standby_says_nothing_of_the_path_in_use(void **state)
{
	PairConfig config = {.scheme = "tcp", PAIR_LASTS};
	g_autoptr(Pair) pair = pair_new(&config);
	g_auto(PrMigrationInfo) info = {0};
	Side *source = &pair->source;

	pr_migration_query(pair->destination.engine, &info);
	const PrPathInfo *listening = g_ptr_array_index(info.paths, 0);
	g_autoptr(Door) door = door_new(port_of(listening->uri));
	g_autofree char *second = g_strdup_printf("tcp:127.0.0.1:%u", door_port(door));
	g_autofree char *uris = g_strdup_printf("%s,%s", pair->uri, second);

	assert_true(pr_params_set(&source->params, "handshake-timeout", 600000, NULL));
	assert_true(pr_migration_start(source->engine, uris, FALSE, NULL));
	pair_wait(pair, PR_STATE_POSTCOPY_ACTIVE);
	door_wait_knocked(door);
	guint news = news_so_far(source);
	pr_faults_cut_paths(pair->faults);
	pair_wait_recovered(pair, 1);
	side_check_path(source, second, PR_PATH_ACTIVE);

	wait_path_news_behind(source, news, pair->uri, PR_PATH_PROBATION);
	door_turn_away(door);
	/* Another standby comes and goes: by then the keeper has taken notice. */
	news = news_so_far(source);
	pr_faults_cut_paths(pair->faults);
	news = wait_path_news_behind(source, news, pair->uri, PR_PATH_FAILED);
	wait_path_news_behind(source, news, pair->uri, PR_PATH_PROBATION);
	side_check_path(source, second, PR_PATH_ACTIVE);
	pr_params_set(&pair->destination.params, "max-postcopy-bandwidth", 0, NULL);
	pair_wait(pair, PR_STATE_COMPLETED);
	pair_check_completed(pair);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_late_attempt_for_a_standby_says_nothing_of_the_path_in_use),
		BOTH(a_standby_takes_over_without_a_new_connection),
		BOTH(a_standby_that_dies_is_known_and_disturbs_nobody),
		BOTH(a_path_on_probation_is_taken_where_there_is_no_better_one),
		BOTH(of_two_on_probation_the_first_to_be_trusted_is_taken),
		BOTH(no_standby_is_kept_when_that_is_switched_off),
		BOTH(news_over_a_standby_pauses_and_old_news_does_not),
		BOTH(a_human_uses_the_standby_too),
		BOTH(fails_over_twenty_times_in_one_migration),
		BOTH(stays_paused_when_a_human_paused),
	};

	return RUN_CASES("failover", tests);
}
