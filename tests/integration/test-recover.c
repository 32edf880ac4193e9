/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Path failures at every point of a migration: after each recovery no page is lost. */
#include <string.h>
#include <unistd.h>

#include "migration/memory/bitmap.h"
#include "migration/internal.h"
#include "tests/integration/cases.h"

#define MIB (1024ull * 1024)

/* ---- cuts of the control channel, at each message in turn ---- */

/*
 * Migrates with the control channel cut at the N-th message. Returns FALSE if the migration had
 * fewer messages.
 */
static gboolean cut_at_message(const char *scheme, guint64 message)
{
	PairConfig config = {.scheme = scheme, .size = 4 * MIB, .pace_us = 100};
	PrFaultPlan plan = {.cut_after_messages = message};
	guint settled =
		1u << PR_STATE_FAILED | 1u << PR_STATE_POSTCOPY_PAUSED | 1u << PR_STATE_COMPLETED;
	g_autoptr(Pair) pair = pair_new(&config);

	pr_faults_set_plan(pair->faults, &plan);
	pair_migrate(pair);
	PrState ended = side_wait_any(&pair->source, settled);
	gboolean fired = pr_faults_counts(pair->faults).fired > 0;

	if (ended == PR_STATE_FAILED) {
		/* The cut came before RUN, so the source's guest has resumed. */
		pair_check_undone(pair);
		pair_wait_taken_back(pair);
		assert_false(testguest_running(pair->destination.guest));
		pair_migrate(pair);
	}
	pair_resume_until_completed(pair, 1);
	pair_check_completed(pair);
	return fired;
}

static void recovers_from_a_cut_at_every_message(void **state)
{
	guint64 message = 1;

	while (cut_at_message(scheme_of(state), message)) {
		assert_true(message < 1000);
		message++;
	}
	/* From HELLO to SHUT at least these messages are sent. */
	assert_true(message > 12);
}

/*
 * Pauses during the pull, then cuts the N-th message of the recovery. Returns FALSE if the recovery
 * had fewer messages.
 */
static gboolean cut_at_recovery_message(const char *scheme, guint64 message)
{
	/* The migration takes some seconds, longer than a stall of a busy machine. */
	PairConfig config = {.scheme = scheme,
			     .size = 2 * MIB,
			     .bandwidth = MIB / 16,
			     .n_threads = 2,
			     .pace_us = 100000};
	g_autoptr(Pair) pair = pair_new(&config);

	pair_migrate(pair);
	pair_wait(pair, PR_STATE_POSTCOPY_ACTIVE);
	pr_faults_cut_paths(pair->faults);
	pair_wait(pair, PR_STATE_POSTCOPY_PAUSED);
	pr_params_set(&pair->destination.params, "max-postcopy-bandwidth", 0, NULL);

	guint64 before = pr_faults_counts(pair->faults).fired;
	PrFaultPlan plan = {.cut_after_messages =
				    pr_faults_counts(pair->faults).messages + message};
	pr_faults_set_plan(pair->faults, &plan);
	pair_resume_until_completed(pair, 2);
	pair_check_completed(pair);
	return pr_faults_counts(pair->faults).fired > before;
}

static void recovers_from_a_cut_at_every_message_of_a_recovery(void **state)
{
	guint64 message = 1;

	while (cut_at_recovery_message(scheme_of(state), message)) {
		assert_true(message < 1000);
		message++;
	}
	assert_true(message > 9);
}

/* Whether the destination has all pages from `start` to `end`, in bytes. */
static gboolean have_arrived(const PrRamBlock *block, uint64_t start, uint64_t end)
{
	for (uint64_t page = start / block->page_size; page < end / block->page_size; page++)
		if (!pr_bitmap_test(block->received, page))
			return FALSE;
	return TRUE;
}

/* Whether the destination has all pages that are holes in the source's memfds. */
static gboolean holes_have_arrived(Pair *pair)
{
	const PrRam *ram = pair->source.engine->session.ram;
	const PrRam *there = pair->destination.engine->session.ram;

	for (guint i = 0; i < ram->n_blocks; i++) {
		const PrRamBlock *block = &ram->blocks[i];
		uint64_t at = 0;
		PrExtent data;

		for (; pr_ram_next_data(block, at, block->size, &data); at = data.end)
			if (!have_arrived(&there->blocks[i], at, data.start))
				return FALSE;
		if (!have_arrived(&there->blocks[i], at, block->size))
			return FALSE;
	}
	return TRUE;
}

/*
 * Migrates a paused guest with almost no bulk pull, and cuts the channel at the N-th message.
 * Returns FALSE if the cut came before RUN, where there is nothing to recover.
 */
static gboolean holes_arrive_despite_cut(const char *scheme, guint64 message)
{
	PairConfig config = {.scheme = scheme, .size = 64 * MIB, .bandwidth = 1, .paused = TRUE};
	PrFaultPlan plan = {.cut_after_messages = message};
	gint64 deadline = g_get_monotonic_time() + 60 * G_USEC_PER_SEC;
	g_autoptr(Pair) pair = pair_new(&config);

	pr_params_set_capability(&pair->source.params, "zero-pages", FALSE, NULL);
	pr_faults_set_plan(pair->faults, &plan);
	pair_migrate(pair);
	if (side_wait_any(&pair->source, 1u << PR_STATE_FAILED | 1u << PR_STATE_POSTCOPY_PAUSED) ==
	    PR_STATE_FAILED)
		return FALSE;
	pair_resume(pair);
	/* The few READs that the limit allows bring at most some of the holes. */
	while (!holes_have_arrived(pair)) {
		assert_true(g_get_monotonic_time() < deadline);
		g_usleep(500); /* between two checks of the condition */
	}
	pr_params_set(&pair->destination.params, "max-postcopy-bandwidth", 0, NULL);
	pair_wait(pair, PR_STATE_COMPLETED);
	return TRUE;
}

static void holes_arrive_despite_a_cut_at_any_message(void **state)
{
	guint recovered = 0;

	for (guint64 message = 1; message < 24; message++)
		recovered += holes_arrive_despite_cut(scheme_of(state), message);
	assert_true(recovered > 5);
}

/*
 * The guest is paused and there is almost no bulk pull. So these pages can only arrive as zero
 * ranges from the source.
 */
static void zero_pages_arrive_without_reads(void **state)
{
	PairConfig config = {
		.scheme = scheme_of(state), .size = 64 * MIB, .bandwidth = 1, .paused = TRUE};
	const uint64_t start = 8 * MIB, end = 12 * MIB;
	gint64 deadline = g_get_monotonic_time() + 60 * G_USEC_PER_SEC;
	g_autofree uint8_t *zeros = g_malloc0(end - start);
	g_autoptr(Pair) pair = pair_new(&config);
	int memfd = testguest_block_memfd(pair->source.guest, 0);

	assert_int_equal(pwrite(memfd, zeros, end - start, (off_t)start), end - start);
	pair_migrate(pair);
	pair_wait(pair, PR_STATE_POSTCOPY_ACTIVE);
	while (!have_arrived(&pair->destination.engine->session.ram->blocks[0], start, end)) {
		assert_true(g_get_monotonic_time() < deadline);
		g_usleep(500); /* between two checks of the condition */
	}
	pr_params_set(&pair->destination.params, "max-postcopy-bandwidth", 0, NULL);
	pair_wait(pair, PR_STATE_COMPLETED);
}

/* ---- cuts of the data path ---- */

static void recovers_from_cuts_at_random_reads(void **state)
{
	g_autoptr(GRand) random = g_rand_new_with_seed(20171117);
	PairConfig config = {.scheme = scheme_of(state), .size = 32 * MIB};
	g_autoptr(Pair) pair = pair_new(&config);

	PrFaultPlan plan = {.cut_after_reads = (guint64)g_rand_int_range(random, 1, 20)};
	pr_faults_set_plan(pair->faults, &plan);
	pair_migrate(pair);
	for (guint i = 0; i < 8; i++) {
		guint settled = 1u << PR_STATE_POSTCOPY_PAUSED | 1u << PR_STATE_COMPLETED;
		if (side_wait_any(&pair->source, settled) == PR_STATE_COMPLETED)
			break;
		side_wait(&pair->destination, PR_STATE_POSTCOPY_PAUSED);
		plan.cut_after_reads = pr_faults_counts(pair->faults).reads +
				       (guint64)g_rand_int_range(random, 1, 40);
		pr_faults_set_plan(pair->faults, &plan);
		pair_resume(pair);
	}
	pair_resume_until_completed(pair, 2);
	pair_check_completed(pair);
}

static void recovers_forty_times_in_one_migration(void **state)
{
	PairConfig config = {.scheme = scheme_of(state), PAIR_LASTS};
	g_autoptr(Pair) pair = pair_new(&config);

	pair_migrate(pair);
	pair_wait(pair, PR_STATE_POSTCOPY_ACTIVE);
	for (guint i = 0; i < 40; i++) {
		if (i % 2)
			pr_faults_cut_paths(pair->faults);
		else
			pr_faults_cut_next_message(pair->faults);
		pair_wait(pair, PR_STATE_POSTCOPY_PAUSED);
		pair_resume(pair);
		pair_wait(pair, PR_STATE_POSTCOPY_ACTIVE);
	}
	pr_params_set(&pair->destination.params, "max-postcopy-bandwidth", 0, NULL);
	pair_resume_until_completed(pair, 1);
	pair_check_completed(pair);

	g_auto(PrMigrationInfo) info = {0};
	pr_migration_query(pair->destination.engine, &info);
	assert_int_equal(info.recoveries, 40);
}

/*
 * During the pause the guest reads every page that has arrived. Pulled pages are mapped. Holes are
 * mapped on the first access, so the engine has to serve those faults while it is paused.
 */
static void the_guest_runs_while_the_migration_is_paused(void **state)
{
	PairConfig config = {
		.scheme = scheme_of(state), .size = 16 * MIB, .bandwidth = MIB, .paused = TRUE};
	g_autoptr(Pair) pair = pair_new(&config);
	guint64 pages = 0;

	pair_migrate(pair);
	pair_wait(pair, PR_STATE_POSTCOPY_ACTIVE);
	pr_faults_cut_paths(pair->faults);
	pair_wait(pair, PR_STATE_POSTCOPY_PAUSED);

	const PrRamBlock *block = &pair->destination.engine->session.ram->blocks[0];
	const volatile uint8_t *map = testguest_block_map(pair->destination.guest, 0);
	for (uint64_t page = 0; page < block->n_pages; page++)
		if (pr_bitmap_test(block->received, page)) {
			(void)map[page * block->page_size]; /* hangs if the fault is not served */
			pages++;
		}
	assert_true(pages > 0);
	assert_int_equal(side_state(&pair->destination), PR_STATE_POSTCOPY_PAUSED);

	pr_params_set(&pair->destination.params, "max-postcopy-bandwidth", 0, NULL);
	pair_resume_until_completed(pair, 1);
	pair_check_completed(pair);
}

/*
 * READs are never answered and nothing fails by itself. The operator pauses, and the fence must not
 * wait for these READs.
 */
static void recovers_when_reads_are_never_answered(void **state)
{
	PairConfig config = {.scheme = scheme_of(state), PAIR_LASTS};
	g_autoptr(Pair) pair = pair_new(&config);

	pair_migrate(pair);
	pair_wait(pair, PR_STATE_POSTCOPY_ACTIVE);
	pr_faults_stall_paths(pair->faults);
	assert_true(pr_migration_pause(pair->source.engine, NULL));
	pair_wait(pair, PR_STATE_POSTCOPY_PAUSED);
	pr_params_set(&pair->destination.params, "max-postcopy-bandwidth", 0, NULL);
	pair_resume_until_completed(pair, 1);
	pair_check_completed(pair);
}

static void recovers_over_a_new_listener(void **state)
{
	PairConfig config = {.scheme = scheme_of(state), PAIR_LASTS};
	const char *other = strcmp(scheme_of(state), "tcp") == 0 ? "ofi" : "tcp";
	g_autofree char *incoming = g_strdup_printf("%s:127.0.0.1:0", other);
	g_autoptr(Pair) pair = pair_new(&config);
	g_auto(PrMigrationInfo) info = {0};
	g_autoptr(GError) error = NULL;

	pair_migrate(pair);
	pair_wait(pair, PR_STATE_POSTCOPY_ACTIVE);
	pr_faults_cut_paths(pair->faults);
	pair_wait(pair, PR_STATE_POSTCOPY_PAUSED);
	pr_params_set(&pair->destination.params, "max-postcopy-bandwidth", 0, NULL);
	pr_migration_recover(pair->destination.engine, incoming, NULL, &error);
	g_assert_no_error(error);
	pr_migration_query(pair->destination.engine, &info);
	assert_int_equal(info.paths->len, 2);
	const PrPathInfo *second = g_ptr_array_index(info.paths, 1);
	pr_migration_start(pair->source.engine, second->uri, /* resume= */ TRUE, &error);
	g_assert_no_error(error);
	pair_wait(pair, PR_STATE_COMPLETED);
	pair_check_completed(pair);
}

static void failed_recoveries_go_back_to_paused(void **state)
{
	PairConfig config = {.scheme = scheme_of(state), PAIR_LASTS};
	g_autoptr(Pair) pair = pair_new(&config);

	pair_migrate(pair);
	pair_wait(pair, PR_STATE_POSTCOPY_ACTIVE);
	pr_faults_cut_paths(pair->faults);
	pair_wait(pair, PR_STATE_POSTCOPY_PAUSED);
	for (guint i = 0; i < 5; i++) {
		/*
		 * The kernel refuses the connection at once. The two state changes tell when the
		 * attempt is over.
		 */
		guint reported = pair->source.states->len;
		assert_true(pr_migration_start(pair->source.engine, "tcp:127.0.0.1:1", TRUE, NULL));
		g_mutex_lock(&pair->source.lock);
		while (pair->source.states->len < reported + 2)
			g_cond_wait(&pair->source.changed, &pair->source.lock);
		assert_int_equal(pair->source.state, PR_STATE_POSTCOPY_PAUSED);
		g_mutex_unlock(&pair->source.lock);
	}
	pr_params_set(&pair->destination.params, "max-postcopy-bandwidth", 0, NULL);
	pair_resume_until_completed(pair, 1);
	pair_check_completed(pair);

	g_auto(PrMigrationInfo) info = {0};
	pr_migration_query(pair->source.engine, &info);
	assert_int_equal(info.pauses, 1);
	assert_int_equal(info.recoveries, 1);
}

/* ---- other peers ---- */

static PrControl *connect_with_hello(Pair *pair, const PrHello *hello, PrHelloAck *ack,
				     GError **error)
{
	g_auto(PrMigrationInfo) info = {0};

	pr_migration_query(pair->destination.engine, &info);
	const PrPathInfo *path = g_ptr_array_index(info.paths, 0);
	g_autoptr(PrUri) uri = pr_uri_parse(path->uri, FALSE, NULL);
	return pr_control_connect(uri, pair->tls, hello, 20000, 20000, NULL, ack, error);
}

/* The HELLO with which the source would resume, with the epoch of the present connection. */
static PrHello resume_hello(Pair *pair, const char *scheme)
{
	PrMigration *m = pair->source.engine;
	PrHello hello = {
		.version = PR_WIRE_VERSION, .role = PR_HELLO_SOURCE, .resume = PR_RESUME_ASKED};

	g_mutex_lock(&m->session.lock);
	memcpy(hello.uuid, m->session.binding.uuid, PR_UUID_BYTES);
	memcpy(hello.secret, m->session.binding.secret, PR_SECRET_BYTES);
	hello.epoch = m->session.binding.epoch;
	hello.n_blocks = m->session.ram->n_blocks;
	hello.blocks = pr_ram_wire_blocks(m->session.ram);
	g_mutex_unlock(&m->session.lock);
	g_strlcpy(hello.scheme, scheme, sizeof(hello.scheme));
	return hello;
}

static void assert_refused(Pair *pair, const PrHello *hello, const char *reason)
{
	g_autoptr(GError) error = NULL;
	PrHelloAck ack;
	g_autoptr(PrControl) control = connect_with_hello(pair, hello, &ack, &error);

	assert_null(control);
	assert_true(g_error_matches(error, PR_PATH_ERROR, PR_PATH_ERROR_REFUSED));
	if (!strstr(error->message, reason))
		fail_msg("\"%s\" does not mention \"%s\"", error->message, reason);
	assert_int_equal(side_state(&pair->destination), PR_STATE_POSTCOPY_ACTIVE);
}

static void refuses_hellos_of_other_migrations_and_old_epochs(void **state)
{
	PairConfig config = {.scheme = scheme_of(state), PAIR_LASTS};
	g_autoptr(Pair) pair = pair_new(&config);

	pair_migrate(pair);
	pair_wait(pair, PR_STATE_POSTCOPY_ACTIVE);

	g_auto(PrHello) old = resume_hello(pair, scheme_of(state));
	assert_refused(pair, &old, "epoch");
	g_auto(PrHello) foreign = resume_hello(pair, scheme_of(state));
	foreign.epoch += 5;
	foreign.uuid[3] ^= 1;
	assert_refused(pair, &foreign, "no such migration");
	g_auto(PrHello) liar = resume_hello(pair, scheme_of(state));
	liar.epoch += 5;
	liar.secret[3] ^= 1;
	assert_refused(pair, &liar, "no such migration");
	g_auto(PrHello) fresh = resume_hello(pair, scheme_of(state));
	fresh.resume = PR_RESUME_NO;
	fresh.uuid[3] ^= 1;
	assert_refused(pair, &fresh, "another migration");

	pr_params_set(&pair->destination.params, "max-postcopy-bandwidth", 0, NULL);
	pair_wait(pair, PR_STATE_COMPLETED);
	pair_check_completed(pair);
	g_auto(PrMigrationInfo) info = {0};
	pr_migration_query(pair->destination.engine, &info);
	assert_int_equal(info.pauses, 0);
}

/*
 * The source may reconnect before the destination has noticed a failure. A connection with a higher
 * epoch pauses the destination, and fences the old path.
 */
static void newer_epoch_takes_over(void **state)
{
	PairConfig config = {.scheme = scheme_of(state), PAIR_LASTS};
	g_autoptr(Pair) pair = pair_new(&config);
	g_autoptr(GError) error = NULL;
	PrHelloAck ack;

	pair_migrate(pair);
	pair_wait(pair, PR_STATE_POSTCOPY_ACTIVE);
	g_auto(PrHello) newer = resume_hello(pair, scheme_of(state));
	newer.epoch += 1;
	g_autoptr(PrControl) control = connect_with_hello(pair, &newer, &ack, &error);
	g_assert_no_error(error);
	assert_int_equal(ack.status, PR_HELLO_OK);
	side_wait(&pair->source, PR_STATE_POSTCOPY_PAUSED);
	g_clear_pointer(&control, pr_control_free);
	side_wait(&pair->destination, PR_STATE_POSTCOPY_PAUSED);

	/*
	 * The destination has used the source's next epoch already, so the first resume fails. The
	 * one after it succeeds.
	 */
	pr_params_set(&pair->destination.params, "max-postcopy-bandwidth", 0, NULL);
	pair_resume_until_completed(pair, 3);
	pair_check_completed(pair);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		BOTH(recovers_from_a_cut_at_every_message),
		BOTH(recovers_from_a_cut_at_every_message_of_a_recovery),
		BOTH(holes_arrive_despite_a_cut_at_any_message),
		BOTH(zero_pages_arrive_without_reads),
		BOTH(recovers_from_cuts_at_random_reads),
		BOTH(recovers_forty_times_in_one_migration),
		BOTH(the_guest_runs_while_the_migration_is_paused),
		BOTH(recovers_when_reads_are_never_answered),
		BOTH(recovers_over_a_new_listener),
		BOTH(failed_recoveries_go_back_to_paused),
		BOTH(refuses_hellos_of_other_migrations_and_old_epochs),
		BOTH(newer_epoch_takes_over),
	};

	return RUN_CASES("recover", tests);
}
