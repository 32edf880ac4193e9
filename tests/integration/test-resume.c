/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * One engine follows another one in the same process. This covers points where no engine can be
 * killed, and runs with the sanitizers. tests/e2e/test_resume.py and test_crash_points.py test
 * killed engines.
 */
#include <glib/gstdio.h>
#include <string.h>

#include "migration/core/crash-point.h"
#include "tests/integration/cases.h"

#define MIB (1024ull * 1024)

/* A pair whose source keeps a hand-over record. */
typedef struct Rig {
	Pair *pair;
	char *dir;
	char *listening; /* the destination's URI, without fault injection */
} Rig;

static void keep_record(Rig *rig)
{
	g_autoptr(GError) error = NULL;
	Side *side = &rig->pair->source;

	pr_migration_keep_record(side->engine, rig->dir, testguest_spec(side->guest), &error);
	g_assert_no_error(error);
}

static Rig *rig_new(const PairConfig *config)
{
	Rig *rig = g_new0(Rig, 1);
	g_auto(PrMigrationInfo) info = {0};

	rig->pair = pair_new(config);
	rig->dir = g_dir_make_tmp("resume-XXXXXX", NULL);
	assert_non_null(rig->dir);
	pr_migration_query(rig->pair->destination.engine, &info);
	rig->listening = g_strdup(((PrPathInfo *)g_ptr_array_index(info.paths, 0))->uri);
	keep_record(rig);
	return rig;
}

static void rig_free(Rig *rig)
{
	g_autofree char *remove = g_strdup_printf("rm -rf '%s'", rig->dir);

	pair_free(rig->pair);
	g_spawn_command_line_sync(remove, NULL, NULL, NULL, NULL);
	g_free(rig->dir);
	g_free(rig->listening);
	g_free(rig);
}
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Rig, rig_free)

static void resume(Side *side, PrRole wanted)
{
	g_autoptr(GError) error = NULL;
	PrRole role;

	pr_migration_resume(side->engine, /* asked= */ TRUE, &role, &error);
	g_assert_no_error(error);
	assert_int_equal(role, wanted);
}

static void replace_destination(Rig *rig)
{
	Side *side = &rig->pair->destination;
	g_autoptr(GError) error = NULL;

	side_end_engine(side);
	side_begin_engine(side);
	resume(side, PR_ROLE_DESTINATION);
	pr_migration_incoming(side->engine, rig->listening, NULL, &error);
	g_assert_no_error(error);
}

static void replace_source(Rig *rig)
{
	side_end_engine(&rig->pair->source);
	side_begin_engine(&rig->pair->source);
	keep_record(rig);
	resume(&rig->pair->source, PR_ROLE_SOURCE);
}

static void start_midway(Rig *rig)
{
	pair_migrate(rig->pair);
	pair_wait(rig->pair, PR_STATE_POSTCOPY_ACTIVE);
	pair_wait_received(rig->pair, 4 * MIB);
}

static void full_speed(Rig *rig)
{
	pr_params_set(&rig->pair->destination.params, "max-postcopy-bandwidth", 0, NULL);
}

/*
 * Replaces the source's engine, the destination's, or both, six times. The received bitmap has to
 * survive all of it.
 */
static void engines_follow_each_other(void **state)
{
	PairConfig config = {.scheme = *state, PAIR_LASTS};
	g_autoptr(Rig) rig = rig_new(&config);
	uint64_t epoch = 0;

	start_midway(rig);
	for (guint i = 0; i < 6; i++) {
		g_auto(PrMigrationInfo) there = {0}, here = {0};

		if (i % 3 != 1)
			replace_destination(rig);
		if (i % 3 != 0)
			replace_source(rig);
		pair_wait(rig->pair, PR_STATE_POSTCOPY_PAUSED);
		pair_resume(rig->pair);
		pair_wait(rig->pair, PR_STATE_POSTCOPY_ACTIVE);
		pr_migration_query(rig->pair->source.engine, &there);
		assert_true(there.epoch > epoch);
		epoch = there.epoch;
		pr_migration_query(rig->pair->destination.engine, &here);
		assert_true(here.remaining < here.total - 4 * MIB);
		assert_int_not_equal(here.remaining, 0);
	}
	full_speed(rig);
	pair_wait(rig->pair, PR_STATE_COMPLETED);
	pair_check_completed(rig->pair);
}

static void assert_requires_resume(Side *side, const char *why)
{
	g_autoptr(GError) error = NULL;
	PrRole role;

	assert_false(pr_migration_resume(side->engine, /* asked= */ FALSE, &role, &error));
	assert_non_null(strstr(error->message, "--resume"));
	if (!strstr(error->message, why))
		fail_msg("\"%s\" does not say \"%s\"", error->message, why);
}

static void a_new_engine_requires_the_resume_option(void **state)
{
	PairConfig config = {.scheme = "tcp", PAIR_LASTS};
	g_autoptr(Rig) rig = rig_new(&config);
	Pair *pair = rig->pair;

	start_midway(rig);
	side_end_engine(&pair->source);
	side_begin_engine(&pair->source);
	keep_record(rig);
	assert_requires_resume(&pair->source, "belongs to the destination");
	assert_false(testguest_running(pair->source.guest));
	side_end_engine(&pair->destination);
	side_begin_engine(&pair->destination);
	assert_requires_resume(&pair->destination, "in the middle of its migration");

	/* The two refusals have changed nothing. */
	replace_source(rig);
	replace_destination(rig);
	full_speed(rig);
	pair_resume_until_completed(pair, 3);
	pair_check_completed(pair);
	/*
	 * After completion the source still refuses, as its guest has left for good. The
	 * destination's engine starts without --resume, as the guest is its own.
	 */
	side_end_engine(&pair->source);
	side_begin_engine(&pair->source);
	keep_record(rig);
	assert_requires_resume(&pair->source, "has moved to another host for good");
	side_end_engine(&pair->destination);
	side_begin_engine(&pair->destination);
	g_autoptr(GError) error = NULL;
	PrRole role;
	pr_migration_resume(pair->destination.engine, /* asked= */ FALSE, &role, &error);
	g_assert_no_error(error);
	assert_int_equal(role, PR_ROLE_NONE);
}

static void a_completed_migration_is_known_after_a_restart(void **state)
{
	PairConfig config = {.scheme = "tcp", .size = 8 * MIB};
	g_autoptr(Rig) rig = rig_new(&config);
	g_autoptr(GError) error = NULL;

	pair_migrate(rig->pair);
	pair_wait(rig->pair, PR_STATE_COMPLETED);
	replace_source(rig);
	replace_destination(rig);
	pair_wait(rig->pair, PR_STATE_COMPLETED);
	assert_false(pr_migration_start(rig->pair->source.engine, rig->listening, FALSE, &error));
	assert_non_null(strstr(error->message, "has moved to the destination"));
	assert_false(testguest_running(rig->pair->source.guest));
	assert_true(testguest_running(rig->pair->destination.guest));
}

/* Used by the crash-point hooks. There is one test at a time. */
static struct {
	Rig *rig;
	guint cancelled, revoked,
		paused; /* counts; written by the source's thread, read after it has ended */
} seen;

static void cancel_when_recorded(PrCrashPoint point)
{
	g_autoptr(GError) error = NULL;
	Side *source = &seen.rig->pair->source;

	if (point == PR_CRASH_SOURCE_HANDED_OVER_NOTED) {
		seen.cancelled += pr_migration_cancel(source->engine, &error);
		return;
	}
	if (point != PR_CRASH_SOURCE_TAKEN_BACK_NOTED)
		return;
	/* The record as a new engine would find it now. */
	g_autoptr(GDir) dir = g_dir_open(seen.rig->dir, 0, NULL);
	const char *name = dir ? g_dir_read_name(dir) : NULL;
	g_autofree char *path = name ? g_build_filename(seen.rig->dir, name, NULL) : NULL;
	g_autofree char *text = NULL;
	seen.revoked += path && g_file_get_contents(path, &text, NULL, NULL) &&
			strstr(text, "stage=stopping") && !testguest_running(source->guest);
}

/*
 * Cancels the migration after the record says that RUN may have been sent, and before RUN is sent.
 */
static void a_cancel_before_run_is_recorded_before_the_guest_resumes(void **state)
{
	PairConfig config = {.scheme = "tcp", .size = 4 * MIB};
	g_autoptr(Rig) rig = rig_new(&config);

	memset(&seen, 0, sizeof(seen));
	seen.rig = rig;
	__atomic_store_n(&pr_crash_hook, cancel_when_recorded, __ATOMIC_RELEASE);
	pair_migrate(rig->pair);
	side_wait(&rig->pair->source, PR_STATE_CANCELLED);
	__atomic_store_n(&pr_crash_hook, NULL, __ATOMIC_RELEASE);
	assert_int_equal(seen.cancelled, 1);
	assert_int_equal(seen.revoked, 1);
	pair_check_undone(rig->pair);
	assert_false(testguest_running(rig->pair->destination.guest));
	/* There is nothing to resume. */
	side_end_engine(&rig->pair->source);
	side_begin_engine(&rig->pair->source);
	keep_record(rig);
	resume(&rig->pair->source, PR_ROLE_NONE);
	pair_check_undone(rig->pair);
}

static void pause_before_run(PrCrashPoint point)
{
	g_autoptr(GError) error = NULL;

	if (point == PR_CRASH_SOURCE_ACTIVE)
		pr_migration_pause(seen.rig->pair->source.engine, &error);
}

/*
 * RUN was never sent, but the record says that the guest was handed over. Ending both engines must
 * not lose the guest.
 */
static void engines_that_end_before_run_do_not_lose_the_guest(void **state)
{
	PairConfig config = {.scheme = "tcp", .size = 8 * MIB};
	g_autoptr(Rig) rig = rig_new(&config);

	memset(&seen, 0, sizeof(seen));
	seen.rig = rig;
	__atomic_store_n(&pr_crash_hook, pause_before_run, __ATOMIC_RELEASE);
	pair_migrate(rig->pair);
	pair_wait(rig->pair, PR_STATE_POSTCOPY_PAUSED);
	__atomic_store_n(&pr_crash_hook, NULL, __ATOMIC_RELEASE);
	assert_false(testguest_running(rig->pair->destination.guest));
	replace_destination(rig);
	replace_source(rig);
	pair_wait(rig->pair, PR_STATE_POSTCOPY_PAUSED);
	assert_false(testguest_running(rig->pair->source.guest));
	assert_false(testguest_running(rig->pair->destination.guest));
	pair_resume_until_completed(rig->pair, 3);
	pair_check_completed(rig->pair);
	assert_true(testguest_running(rig->pair->destination.guest));
}

static void a_guest_does_not_leave_without_a_record(void **state)
{
	PairConfig config = {.scheme = "tcp", .size = 4 * MIB};
	g_autoptr(Rig) rig = rig_new(&config);
	g_auto(PrMigrationInfo) info = {0};

	assert_int_equal(g_rmdir(rig->dir), 0);
	assert_true(g_file_set_contents(rig->dir, "in the way", -1, NULL));
	pair_migrate(rig->pair);
	side_wait(&rig->pair->source, PR_STATE_FAILED);
	pr_migration_query(rig->pair->source.engine, &info);
	assert_non_null(strstr(info.error_desc, rig->dir));
	assert_non_null(strstr(info.error_desc, "--state-dir"));
	pair_check_undone(rig->pair);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		BOTH(engines_follow_each_other),
		cmocka_unit_test(a_new_engine_requires_the_resume_option),
		cmocka_unit_test(a_completed_migration_is_known_after_a_restart),
		cmocka_unit_test(a_cancel_before_run_is_recorded_before_the_guest_resumes),
		cmocka_unit_test(engines_that_end_before_run_do_not_lose_the_guest),
		cmocka_unit_test(a_guest_does_not_leave_without_a_record),
	};

	return RUN_CASES("resume", tests);
}
