/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Failover between two listed paths: which path the engine uses next, and which one is the standby.
 */
#include <string.h>

#include "migration/internal.h"
#include "migration/session/messages.h"
#include "tests/integration/cases.h"
#include "tests/rigs/proxy.h"

#define MIB (1024ull * 1024)

/* A pair with two paths. Each path has its own fault injection. */
typedef struct TwoPaths {
	Pair *pair;
	PrFaults *faults[2];
	char *uri[2];
	char *uris; /* the list that `migrate` gets */
} TwoPaths;

static void two_paths_init(TwoPaths *two, const PairConfig *config)
{
	static int count; /* used by the main thread only; makes the fault IDs unique */
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

static guint count_path_events(Side *side)
{
	g_mutex_lock(&side->lock);
	guint n = side->path_events->len;
	g_mutex_unlock(&side->lock);
	return n;
}

/*
 * Waits for an event with this state of the path, ignoring the first n path events. The path may
 * have left that state again. Returns the number of events up to and including that one.
 */
static guint wait_path_event_after(Side *side, guint n, const char *uri, PrPathState state)
{
	gint64 deadline = g_get_monotonic_time() + 60 * G_USEC_PER_SEC;
	gboolean found = FALSE;

	g_mutex_lock(&side->lock);
	while (!found) {
		for (; n < side->path_events->len && !found; n++) {
			const PathEvent *event = &g_array_index(side->path_events, PathEvent, n);
			found = event->state == state && strcmp(event->uri, uri) == 0;
		}
		if (!found)
			assert_true(g_cond_wait_until(&side->changed, &side->lock, deadline));
	}
	g_mutex_unlock(&side->lock);
	return n;
}

static void wait_path_event(Side *side, const char *uri, PrPathState state)
{
	wait_path_event_after(side, 0, uri, state);
}

static void start(TwoPaths *two, void **state)
{
	PairConfig config = {.scheme = scheme_of(state), PAIR_LASTS, .more = {scheme_of(state)}};

	two_paths_init(two, &config);
	/* A short interval, so that a path is trusted soon. */
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
	wait_path_event(source, two.uri[0], PR_PATH_FAILED);
	finish(&two);
	side_wait_path(source, two.uri[1], PR_PATH_IDLE);
}

static void a_lost_standby_is_reported_and_does_not_pause(void **state)
{
	g_auto(TwoPaths) two = {0};
	g_auto(PrMigrationInfo) info = {0};

	start(&two, state);
	side_wait_path(&two.pair->source, two.uri[1], PR_PATH_STANDBY);
	pr_faults_cut_paths(two.faults[1]);
	wait_path_event(&two.pair->source, two.uri[1], PR_PATH_FAILED);
	/* The source has connected the path again, and does not trust it yet. */
	wait_path_event(&two.pair->source, two.uri[1], PR_PATH_PROBATION);
	finish(&two);
	pr_migration_query(two.pair->source.engine, &info);
	assert_int_equal(info.pauses, 0);
}

/* Waits until the path has answered a probe. Only such a standby may be activated. */
static void wait_probed(Side *side, const char *uri)
{
	gint64 deadline = g_get_monotonic_time() + 60 * G_USEC_PER_SEC;

	while (side_path(side, uri).data_rtt_us == 0) {
		assert_true(g_get_monotonic_time() < deadline);
		g_usleep(500); /* between two checks of the condition */
	}
}

/*
 * Cuts the first path and the second one alternately, n times in all. Each time the engine
 * activates the connected standby, without a new connection.
 */
static void lose_alternately(TwoPaths *two, guint n)
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

static void a_path_on_probation_is_used_if_no_other_is_connected(void **state)
{
	g_auto(TwoPaths) two = {0};

	start(&two, state);
	lose_alternately(&two, 4);
	finish(&two);
}

static void of_two_paths_on_probation_the_one_trusted_first_is_used(void **state)
{
	g_auto(TwoPaths) two = {0};
	Side *source = NULL;

	start(&two, state);
	source = &two.pair->source;
	lose_alternately(&two, 2);
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

static void without_standby_paths_each_failover_connects_anew(void **state)
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

/* The destination reports over the standby that it has lost the path in use. */
static void send_lost(Pair *pair, uint64_t epoch)
{
	PrMigration *m = pair->destination.engine;
	g_autoptr(GError) why = g_error_new_literal(PR_PATH_ERROR, PR_PATH_ERROR_LOST, "a test");

	g_mutex_lock(&m->session.lock);
	assert_int_equal(m->session.standbys->len, 1);
	pr_send_lost_nowait(&m->session, epoch, why);
	g_mutex_unlock(&m->session.lock);
}

static void a_lost_message_over_a_standby_pauses_only_in_its_epoch(void **state)
{
	g_auto(TwoPaths) two = {0};
	g_auto(PrMigrationInfo) info = {0};

	start(&two, state);
	side_wait_path(&two.pair->source, two.uri[1], PR_PATH_STANDBY);
	PrMigration *m = two.pair->source.engine;
	g_mutex_lock(&m->session.lock);
	uint64_t epoch = m->session.conn->epoch;
	g_mutex_unlock(&m->session.lock);
	send_lost(two.pair, epoch + 1);
	send_lost(two.pair, epoch);
	pair_wait_recovered(two.pair, 1);
	side_wait_path(&two.pair->source, two.uri[1], PR_PATH_ACTIVE);
	/* The source has paused once: it has ignored the message of the other epoch. */
	finish(&two);
	pr_migration_query(two.pair->source.engine, &info);
	assert_int_equal(info.pauses, 1);
}

/*
 * The operator recovers over the path of the standby. The engine uses the connected standby, also
 * when automatic recovery is off.
 */
static void a_manual_recovery_uses_the_standby(void **state)
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
		/* Cut the path that is in use at this moment. */
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

/*
 * Waits until the source knows that the operator has paused, as it is the source that starts
 * automatic recoveries.
 */
static void wait_paused_by_operator(Pair *pair)
{
	PrMigration *m = pair->source.engine;
	gint64 deadline = g_get_monotonic_time() + 60 * G_USEC_PER_SEC;

	g_mutex_lock(&m->session.lock);
	while (!m->session.paused_by_operator || m->session.sm.state != PR_STATE_POSTCOPY_PAUSED)
		assert_true(g_cond_wait_until(&m->session.changed, &m->session.lock, deadline));
	g_mutex_unlock(&m->session.lock);
}

static guint count_reported(Side *side, PrState state)
{
	guint n = 0;

	g_mutex_lock(&side->lock);
	for (guint i = 0; i < side->states->len; i++)
		n += g_array_index(side->states, PrState, i) == state;
	g_mutex_unlock(&side->lock);
	return n;
}

/* After `migrate_pause` on either side, only the operator starts a recovery. */
static void a_pause_by_the_operator_is_not_ended_automatically(void **state)
{
	g_auto(TwoPaths) two = {0};
	g_autoptr(GError) error = NULL;

	start(&two, state);
	for (guint i = 0; i < 2; i++) {
		Side *asked = i ? &two.pair->source : &two.pair->destination;
		assert_true(pr_migration_pause(asked->engine, NULL));
		/*
		 * A source that has lost the path before it got the reason tries to recover once.
		 * The destination refuses that and sends the reason.
		 */
		wait_paused_by_operator(two.pair);
		pair_wait(two.pair, PR_STATE_POSTCOPY_PAUSED);
		guint attempts = count_reported(&two.pair->source, PR_STATE_POSTCOPY_RECOVER_SETUP);
		/*
		 * A check that no attempt follows has no condition to wait for, so it needs this
		 * time.
		 */
		g_usleep(400 * 1000);
		wait_paused_by_operator(two.pair);
		assert_int_equal(count_reported(&two.pair->source, PR_STATE_POSTCOPY_RECOVER_SETUP),
				 attempts);
		pr_migration_start(two.pair->source.engine, two.uris, /* resume= */ TRUE, &error);
		g_assert_no_error(error);
		pair_wait_recovered(two.pair, i + 1);
	}
	/*
	 * With auto-recover off a lost path also waits for the operator. Switching it on starts the
	 * recovery.
	 */
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

/* Cuts the first path until the source recovers over this one. Where the source's owner is slow, a
 * new standby of the first path may be up in time, and is preferred. Returns the number of path
 * events before the last cut. */
static guint fail_over_to(Pair *pair, const char *uri)
{
	guint n_events = 0;

	for (guint n = 1; n <= 20; n++) {
		n_events = count_path_events(&pair->source);
		pr_faults_cut_paths(pair->faults);
		pair_wait_recovered(pair, n);
		if (side_path(&pair->source, uri).state == PR_PATH_ACTIVE)
			return n_events;
	}
	side_check_path(&pair->source, uri, PR_PATH_ACTIVE);
	return n_events;
}

/*
 * The destination does not answer a connection attempt for a standby. Meanwhile the destination's
 * recovery uses the same path over another connection. The failure of the late attempt must not
 * change the state of that path.
 */
static void a_late_standby_attempt_does_not_change_the_active_path(void **state)
{
	PairConfig config = {.scheme = "tcp", PAIR_LASTS};
	g_autoptr(Pair) pair = pair_new(&config);
	g_auto(PrMigrationInfo) info = {0};
	Side *source = &pair->source;

	pr_migration_query(pair->destination.engine, &info);
	const PrPathInfo *listening = g_ptr_array_index(info.paths, 0);
	g_autoptr(Proxy) proxy = proxy_new(port_of(listening->uri));
	g_autofree char *second = g_strdup_printf("tcp:127.0.0.1:%u", proxy_port(proxy));
	g_autofree char *uris = g_strdup_printf("%s,%s", pair->uri, second);

	assert_true(pr_params_set(&source->params, "handshake-timeout", 600000, NULL));
	assert_true(pr_migration_start(source->engine, uris, FALSE, NULL));
	pair_wait(pair, PR_STATE_POSTCOPY_ACTIVE);
	proxy_wait_connected(proxy);
	guint n_events = fail_over_to(pair, second);

	wait_path_event_after(source, n_events, pair->uri, PR_PATH_PROBATION);
	proxy_close_first(proxy);
	/*
	 * Then another standby is lost and connected again. By that event the path's keeper
	 * (source/standby.c) has also handled the end of the late attempt.
	 */
	n_events = count_path_events(source);
	pr_faults_cut_paths(pair->faults);
	n_events = wait_path_event_after(source, n_events, pair->uri, PR_PATH_FAILED);
	wait_path_event_after(source, n_events, pair->uri, PR_PATH_PROBATION);
	side_check_path(source, second, PR_PATH_ACTIVE);
	pr_params_set(&pair->destination.params, "max-postcopy-bandwidth", 0, NULL);
	pair_wait(pair, PR_STATE_COMPLETED);
	pair_check_completed(pair);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_late_standby_attempt_does_not_change_the_active_path),
		BOTH(a_standby_takes_over_without_a_new_connection),
		BOTH(a_lost_standby_is_reported_and_does_not_pause),
		BOTH(a_path_on_probation_is_used_if_no_other_is_connected),
		BOTH(of_two_paths_on_probation_the_one_trusted_first_is_used),
		BOTH(without_standby_paths_each_failover_connects_anew),
		BOTH(a_lost_message_over_a_standby_pauses_only_in_its_epoch),
		BOTH(a_manual_recovery_uses_the_standby),
		BOTH(fails_over_twenty_times_in_one_migration),
		BOTH(a_pause_by_the_operator_is_not_ended_automatically),
	};

	return RUN_CASES("failover", tests);
}
