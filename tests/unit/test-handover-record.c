/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A new engine finds the record as the source has saved it, or as it was before, but never half of
 * a change.
 */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <glib/gstdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "migration/core/crash-point.h"
#include "migration/source/handover-record.h"

#define SPEC	"qemu:qmp=/run/vm/qmp,agent=/run/vm/agent"
#define PROCESS "12 34 56 boot"

typedef struct Fixture {
	char *dir;
	char *sub; /* a directory that does not exist yet */
} Fixture;

static int set_up(void **state)
{
	Fixture *fixture = g_new0(Fixture, 1);

	fixture->dir = g_dir_make_tmp("record-XXXXXX", NULL);
	fixture->sub = g_build_filename(fixture->dir, "state", NULL);
	*state = fixture;
	return fixture->dir ? 0 : -1;
}

static int tear_down(void **state)
{
	Fixture *fixture = *state;
	g_autofree char *pattern = g_strdup_printf("rm -rf '%s'", fixture->dir);

	if (!g_spawn_command_line_sync(pattern, NULL, NULL, NULL, NULL))
		return -1;
	g_free(fixture->dir);
	g_free(fixture->sub);
	g_free(fixture);
	return 0;
}

static PrHandoverRecord *open_record(const Fixture *fixture, const char *process)
{
	g_autoptr(GError) error = NULL;
	PrHandoverRecord *record = pr_handover_record_open(fixture->sub, SPEC, process, &error);

	g_assert_no_error(error);
	return record;
}

static void fill(PrHandoverRecord *record)
{
	const PrGuestBlock blocks[] = {
		{.idstr = (char *)"ram0",
		 .size = 1 << 20,
		 .page_size = 4096,
		 .base = 0x7f0012345000},
		{.idstr = (char *)"odd;=name\n",
		 .size = 4 << 20,
		 .page_size = 2 << 20,
		 .base = 1ull << 46},
	};

	pr_handover_record_set_blocks(record, blocks, G_N_ELEMENTS(blocks));
	pr_handover_record_set_uris(record, "rdma:10.0.1.2:4444,ofi:[fe80::1]:5555?bind=10.0.0.1");
	memset(record->uuid, 0xa5, PR_UUID_BYTES);
	memset(record->secret, 0x5a, PR_SECRET_BYTES);
	record->was_running = TRUE;
	record->paused_by_operator = TRUE;
	record->incarnation = 3;
}

static void save(PrHandoverRecord *record, PrHandoverStage stage)
{
	g_autoptr(GError) error = NULL;

	pr_handover_record_save(record, stage, &error);
	g_assert_no_error(error);
}

static void a_saved_record_is_read_back(void **state)
{
	Fixture *fixture = *state;
	g_autoptr(PrHandoverRecord) record = open_record(fixture, PROCESS);
	struct stat st;

	assert_int_equal(record->stage, PR_HANDOVER_NONE);
	fill(record);
	save(record, PR_HANDOVER_STOPPING);
	save(record, PR_HANDOVER_HANDED_OVER);
	g_autoptr(PrHandoverRecord) found = open_record(fixture, PROCESS);
	assert_int_equal(found->stage, PR_HANDOVER_HANDED_OVER);
	assert_memory_equal(found->uuid, record->uuid, PR_UUID_BYTES);
	assert_memory_equal(found->secret, record->secret, PR_SECRET_BYTES);
	assert_int_equal(found->incarnation, 3);
	assert_true(found->was_running && found->paused_by_operator);
	assert_string_equal(found->uris, record->uris);
	assert_int_equal(found->n_blocks, 2);
	assert_string_equal(found->blocks[1].idstr, "odd;=name\n");
	assert_int_equal(found->blocks[1].base, 1ull << 46);
	assert_int_equal(found->blocks[1].page_size, 2 << 20);
	/* The record has a secret, so only its owner may read it. */
	assert_int_equal(stat(found->path, &st), 0);
	assert_int_equal(st.st_mode & 0777, 0600);
	assert_int_equal(stat(fixture->sub, &st), 0);
	assert_int_equal(st.st_mode & 0777, 0700);

	assert_true(pr_handover_record_remove(found, NULL));
	g_autoptr(PrHandoverRecord) none = open_record(fixture, PROCESS);
	assert_int_equal(none->stage, PR_HANDOVER_NONE);
}

/* A new process may use the same socket names, but it is another guest. */
static void another_process_has_no_record(void **state)
{
	g_autoptr(PrHandoverRecord) record = open_record(*state, PROCESS);

	fill(record);
	save(record, PR_HANDOVER_HANDED_OVER);
	g_autoptr(PrHandoverRecord) other = open_record(*state, "12 35 56 boot");
	assert_int_equal(other->stage, PR_HANDOVER_NONE);
}

static void an_invalid_record_is_refused(void **state)
{
	static const char *const texts[] = {
		"\n",
		"rubbish",
		"[postroad source]\nversion=1\n",
		"[postroad source]\nversion=2\nprocess=" PROCESS "\nstage=handed-over\n",
		"[postroad source]\nversion=1\nprocess=" PROCESS "\nstage=perhaps\n",
		"[postroad source]\nversion=1\nprocess=" PROCESS "\nstage=stopping\nuuid=xy\n",
	};
	g_autoptr(PrHandoverRecord) record = open_record(*state, PROCESS);
	g_autofree char *whole = NULL;

	fill(record);
	save(record, PR_HANDOVER_HANDED_OVER);
	assert_true(g_file_get_contents(record->path, &whole, NULL, NULL));
	for (guint i = 0; i <= G_N_ELEMENTS(texts); i++) {
		g_autoptr(GError) error = NULL;

		/* The last text is a record that is cut off in the middle. */
		if (i == G_N_ELEMENTS(texts))
			whole[strlen(whole) / 2] = '\0';
		assert_true(g_file_set_contents(
			record->path, i < G_N_ELEMENTS(texts) ? texts[i] : whole, -1, NULL));
		g_autoptr(PrHandoverRecord) found =
			pr_handover_record_open(((Fixture *)*state)->sub, SPEC, PROCESS, &error);
		assert_null(found);
		assert_non_null(strstr(error->message, record->path));
	}
}

/*
 * A crash of the host may leave an empty file, if it was not synced. The guest died with the host.
 */
static void an_empty_file_counts_as_no_record(void **state)
{
	g_autoptr(PrHandoverRecord) record = open_record(*state, PROCESS);

	fill(record);
	save(record, PR_HANDOVER_HANDED_OVER);
	assert_int_equal(truncate(record->path, 0), 0);
	g_autoptr(PrHandoverRecord) none = open_record(*state, PROCESS);
	assert_int_equal(none->stage, PR_HANDOVER_NONE);
}

static PrCrashPoint die_at;

static void die_at_wanted_point(PrCrashPoint point)
{
	if (point == die_at)
		_exit(0);
}

/*
 * The engine may be killed between any two steps of a change. The file is then the old one or the
 * new one.
 */
static void a_change_is_atomic(void **state)
{
	static const struct {
		PrCrashPoint point;
		PrHandoverStage then;
	} deaths[] = {{PR_CRASH_RECORD_WRITTEN, PR_HANDOVER_STOPPING},
		      {PR_CRASH_RECORD_RENAMED, PR_HANDOVER_HANDED_OVER}};

	for (guint i = 0; i < G_N_ELEMENTS(deaths); i++) {
		g_autoptr(PrHandoverRecord) record = open_record(*state, PROCESS);
		int status;

		fill(record);
		save(record, PR_HANDOVER_STOPPING);
		pid_t child = fork();
		if (child == 0) {
			die_at = deaths[i].point;
			pr_crash_hook = die_at_wanted_point;
			pr_handover_record_save(record, PR_HANDOVER_HANDED_OVER, NULL);
			_exit(1);
		}
		assert_int_equal(waitpid(child, &status, 0), child);
		assert_int_equal(status, 0);
		g_autoptr(PrHandoverRecord) found = open_record(*state, PROCESS);
		assert_int_equal(found->stage, deaths[i].then);
		assert_int_equal(found->n_blocks, 2);
	}
}

static void a_directory_that_cannot_be_written_is_named(void **state)
{
	g_autoptr(PrHandoverRecord) record = open_record(*state, PROCESS);
	g_autoptr(GError) error = NULL;

	fill(record);
	assert_true(g_file_set_contents(((Fixture *)*state)->sub, "a file", -1, NULL));
	assert_false(pr_handover_record_save(record, PR_HANDOVER_STOPPING, &error));
	assert_non_null(strstr(error->message, ((Fixture *)*state)->sub));
	assert_non_null(strstr(error->message, "--state-dir"));
	assert_int_equal(record->stage, PR_HANDOVER_NONE);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

int main(void)
{
	const struct CMUnitTest tests[] = {
		TEST(a_saved_record_is_read_back),
		TEST(another_process_has_no_record),
		TEST(an_invalid_record_is_refused),
		TEST(an_empty_file_counts_as_no_record),
		TEST(a_change_is_atomic),
		TEST(a_directory_that_cannot_be_written_is_named),
	};

	return cmocka_run_group_tests_name("record", tests, NULL, NULL);
}
