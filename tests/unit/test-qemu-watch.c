/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Somebody resumes a guest in its QEMU after it was handed over. Against a scripted QMP server and
 * a real agent.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <string.h>

#include "guest/guest.h"
#include "migration/migration.h"
#include "migration/source/handover-record.h"
#include "tests/guest/testguest.h"
#include "tests/rigs/fake-qmp.h"

#define TIMEOUT 20000 /* ms; the machine may be busy with other tests */
/* ms; for an answer that never comes, where others have to come in time */
#define SHORT_TIMEOUT 3000
#define PATIENCE_US   (20 * G_USEC_PER_SEC)

#define RESUMED	      "{\"event\": \"RESUME\"}\n"
#define RESET	      "{\"event\": \"RESET\", \"data\": {\"guest\": false}}\n"
#define RUNS	      "{\"status\": \"running\", \"running\": true}"
#define STANDS	      "{\"status\": \"paused\", \"running\": false}"

/* The parts of a QEMU: the monitor is a fake, memory and agent are those of a test guest. */
typedef struct Qemu {
	FakeQmp *fake;
	TestGuest *memory;
	char *spec;
	PrGuest *guest;

	GMutex lock;
	GCond told;
	GPtrArray *words; /* lock; the reported texts */
} Qemu;

static void ran_again(const char *what, gint64 seen, void *opaque)
{
	Qemu *qemu = opaque;

	g_mutex_lock(&qemu->lock);
	g_ptr_array_add(qemu->words, g_strdup(what));
	g_cond_broadcast(&qemu->told);
	g_mutex_unlock(&qemu->lock);
}

static Qemu *qemu_new(guint timeout_ms)
{
	const TestGuestConfig config = {
		.size = 1 << 20, .n_blocks = 1, .n_threads = 1, .paused = TRUE};
	Qemu *qemu = g_new0(Qemu, 1);
	g_autoptr(GError) error = NULL;

	g_mutex_init(&qemu->lock);
	g_cond_init(&qemu->told);
	qemu->words = g_ptr_array_new_with_free_func(g_free);
	qemu->fake = fake_qmp_new(NULL);
	fake_qmp_set_healthy(qemu->fake);
	fake_qmp_set(qemu->fake, "query-status", STANDS);
	qemu->memory = testguest_new(&config, &error);
	g_assert_no_error(error);
	testguest_start(qemu->memory);
	qemu->spec = g_strdup_printf("qemu:qmp=%s,agent=%s", fake_qmp_path(qemu->fake),
				     testguest_socket(qemu->memory));
	qemu->guest = pr_guest_open(qemu->spec, NULL, timeout_ms, &error);
	g_assert_no_error(error);
	qemu->guest->ops->on_run_again(qemu->guest, ran_again, qemu);
	return qemu;
}

static void qemu_free(Qemu *qemu)
{
	g_clear_pointer(&qemu->guest, pr_guest_close);
	testguest_free(qemu->memory);
	fake_qmp_free(qemu->fake);
	g_ptr_array_unref(qemu->words);
	g_mutex_clear(&qemu->lock);
	g_cond_clear(&qemu->told);
	g_free(qemu->spec);
	g_free(qemu);
}
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Qemu, qemu_free)

/* The kernel may refuse the write protection. The watch works without it. */
static void fence(Qemu *qemu)
{
	g_autoptr(GError) error = NULL;

	if (!qemu->guest->ops->fence(qemu->guest, &error))
		print_message("not fenced: %s\n", error->message);
}

/* Asserts that the n-th report, counted from 0, contains these words. */
static void assert_reported(Qemu *qemu, guint n, const char *words)
{
	gint64 deadline = g_get_monotonic_time() + PATIENCE_US;

	g_mutex_lock(&qemu->lock);
	while (qemu->words->len <= n)
		if (!g_cond_wait_until(&qemu->told, &qemu->lock, deadline))
			g_error("\"%s\" was not reported", words);
	if (!strstr(g_ptr_array_index(qemu->words, n), words))
		g_error("\"%s\" does not say \"%s\"", (char *)g_ptr_array_index(qemu->words, n),
			words);
	g_mutex_unlock(&qemu->lock);
}

static void wait_count(Qemu *qemu, const char *command, guint n)
{
	gint64 deadline = g_get_monotonic_time() + PATIENCE_US;

	while (fake_qmp_count(qemu->fake, command) < n) {
		g_assert_cmpint(g_get_monotonic_time(), <, deadline);
		g_usleep(500); /* between two checks of the condition */
	}
}

static void a_resumed_guest_is_stopped_each_time(void **state)
{
	g_autoptr(Qemu) qemu = qemu_new(TIMEOUT);

	fence(qemu);
	wait_count(qemu, "query-status", 1);
	for (guint i = 0; i < 3; i++) {
		fake_qmp_send(qemu->fake, RESUMED);
		assert_reported(qemu, i, "event RESUME");
		assert_reported(qemu, i, "and has stopped");
		assert_int_equal(fake_qmp_count(qemu->fake, "stop"), i + 1);
	}
}

/* Events from before the watch are ignored, so it has to ask whether the guest runs. */
static void a_guest_that_runs_at_the_start_is_stopped(void **state)
{
	g_autoptr(Qemu) qemu = qemu_new(TIMEOUT);
	g_autoptr(GError) error = NULL;
	gboolean running;

	fake_qmp_set(qemu->fake, "query-status", RUNS);
	fake_qmp_send(qemu->fake, RESUMED);
	/* The answer comes after the event. */
	assert_true(qemu->guest->ops->is_running(qemu->guest, &running, &error));
	assert_true(running);
	assert_int_equal(fake_qmp_count(qemu->fake, "stop"), 0);
	fence(qemu);
	assert_reported(qemu, 0, "lets the guest run already");
	assert_int_equal(fake_qmp_count(qemu->fake, "stop"), 1);
}

static void a_reset_is_reported(void **state)
{
	g_autoptr(Qemu) qemu = qemu_new(TIMEOUT);

	fence(qemu);
	fake_qmp_send(qemu->fake, RESET);
	assert_reported(qemu, 0, "event RESET");
	assert_int_equal(fake_qmp_count(qemu->fake, "stop"), 0);
}

static void a_stop_that_hangs_is_reported_and_blocks_no_caller(void **state)
{
	g_autoptr(Qemu) qemu = qemu_new(SHORT_TIMEOUT);
	g_autoptr(GError) error = NULL;

	fence(qemu);
	wait_count(qemu, "query-status", 1);
	fake_qmp_set(qemu->fake, "stop", FAKE_SILENCE);
	fake_qmp_send(qemu->fake, RESUMED);
	wait_count(qemu, "stop", 1);
	assert_true(qemu->guest->ops->unfence(qemu->guest, &error));
	assert_reported(qemu, 0, "has not yet");
	/* The watch works without the fence, too. */
	fake_qmp_set(qemu->fake, "stop", "{}");
	fake_qmp_send(qemu->fake, RESUMED);
	assert_reported(qemu, 1, "and has stopped");
}

static void a_stop_that_is_refused_is_sent_again(void **state)
{
	g_autoptr(Qemu) qemu = qemu_new(TIMEOUT);

	fence(qemu);
	wait_count(qemu, "query-status", 1);
	fake_qmp_set(qemu->fake, "stop", FAKE_ERROR "not now");
	fake_qmp_send(qemu->fake, RESUMED);
	assert_reported(qemu, 0, "not now");
	fake_qmp_set(qemu->fake, "stop", "{}");
	assert_reported(qemu, 1, "and has stopped");
}

/* The engine itself lets the guest run, which the watch must not undo. */
static void a_guest_that_the_engine_resumes_runs_on(void **state)
{
	g_autoptr(Qemu) qemu = qemu_new(TIMEOUT);
	g_autoptr(GError) error = NULL;
	gboolean running;

	assert_true(qemu->guest->ops->assume_stopped(qemu->guest, TRUE, &error));
	fence(qemu);
	wait_count(qemu, "query-status", 1);
	assert_true(qemu->guest->ops->unfence(qemu->guest, &error));
	assert_true(qemu->guest->ops->resume(qemu->guest, &error));
	fake_qmp_send(qemu->fake, RESUMED);
	assert_true(qemu->guest->ops->is_running(qemu->guest, &running, &error));
	qemu->guest->ops->on_run_again(qemu->guest, NULL, NULL);
	assert_int_equal(fake_qmp_count(qemu->fake, "cont"), 1);
	assert_int_equal(fake_qmp_count(qemu->fake, "stop"), 0);
	assert_int_equal(qemu->words->len, 0);
}

/* A migration with this QEMU, for the tests of --resume. */
typedef struct Engine {
	PrParams params;
	PrMigration *migration;
	char *dir;
} Engine;

static void on_state(PrState state, const char *reason, void *opaque)
{
}

/* Saves the record that a dead engine leaves: the guest is stopped, and not handed over. */
static void leave_record(Qemu *qemu, const char *dir)
{
	const PrGuestBlock block = {
		.idstr = "mem", .size = 1 << 20, .page_size = 4096, .base = 1 << 20};
	g_autofree char *process = qemu->guest->ops->process(qemu->guest);
	g_autoptr(GError) error = NULL;
	g_autoptr(PrHandoverRecord) record =
		pr_handover_record_open(dir, qemu->spec, process, &error);

	g_assert_no_error(error);
	record->was_running = TRUE;
	pr_handover_record_set_blocks(record, &block, 1);
	assert_true(pr_handover_record_save(record, PR_HANDOVER_STOPPING, &error));
}

static void engine_begin(Engine *engine, Qemu *qemu)
{
	const PrMigrationHooks hooks = {.on_state = on_state};
	g_autoptr(GError) error = NULL;

	engine->dir = g_dir_make_tmp("watch-XXXXXX", NULL);
	leave_record(qemu, engine->dir);
	pr_params_init(&engine->params);
	engine->migration = pr_migration_new(qemu->guest, &engine->params, &hooks);
	pr_migration_keep_record(engine->migration, engine->dir, qemu->spec, &error);
	g_assert_no_error(error);
}

static void engine_end(Engine *engine)
{
	g_autofree char *remove = g_strdup_printf("rm -rf '%s'", engine->dir);

	pr_migration_free(engine->migration);
	g_spawn_command_line_sync(remove, NULL, NULL, NULL, NULL);
	g_free(engine->dir);
}

static void wait_state(Engine *engine, PrState state, const char *words)
{
	gint64 deadline = g_get_monotonic_time() + PATIENCE_US;

	for (;;) {
		g_auto(PrMigrationInfo) info = {0};

		pr_migration_query(engine->migration, &info);
		if (info.state == state && info.reason && strstr(info.reason, words))
			return;
		if (g_get_monotonic_time() > deadline)
			g_error("it is %s: %s", pr_state_name(info.state), info.reason);
		g_usleep(500); /* between two checks of the condition */
	}
}

/* QEMU refuses `cont`, as if the destination still had a lock on the disk image. The engine's
 * monitor answers meanwhile and shows that, until QEMU accepts the command. */
static void a_new_engine_retries_until_the_guest_runs(void **state)
{
	g_autoptr(Qemu) qemu = qemu_new(TIMEOUT);
	g_autoptr(GError) error = NULL;
	Engine engine = {0};
	PrRole role;

	fake_qmp_set(qemu->fake, "cont", FAKE_ERROR "Failed to get the write lock");
	engine_begin(&engine, qemu);
	pr_migration_resume(engine.migration, /* asked= */ TRUE, &role, &error);
	g_assert_no_error(error);
	assert_int_equal(role, PR_ROLE_SOURCE);
	wait_state(&engine, PR_STATE_FAILING, "get the write lock");
	wait_count(qemu, "cont", 6);
	assert_false(pr_migration_start(engine.migration, "tcp:127.0.0.1:1", FALSE, &error));
	g_clear_error(&error);
	assert_true(pr_migration_cancel(engine.migration, &error));
	wait_state(&engine, PR_STATE_FAILING, "get the write lock");
	fake_qmp_set(qemu->fake, "cont", "{}");
	wait_state(&engine, PR_STATE_FAILED, "the guest runs on at the source");
	engine_end(&engine);
}

static void an_engine_gives_up_a_guest_whose_qemu_is_gone(void **state)
{
	g_autoptr(Qemu) qemu = qemu_new(TIMEOUT);
	g_autoptr(GError) error = NULL;
	GLogLevelFlags fatal = g_log_set_always_fatal(G_LOG_LEVEL_ERROR);
	Engine engine = {0};
	PrRole role;

	fake_qmp_set(qemu->fake, "cont", FAKE_ERROR "not now");
	engine_begin(&engine, qemu);
	pr_migration_resume(engine.migration, /* asked= */ TRUE, &role, &error);
	g_assert_no_error(error);
	wait_state(&engine, PR_STATE_FAILING, "not now");
	fake_qmp_set(qemu->fake, "cont", FAKE_CLOSE);
	wait_state(&engine, PR_STATE_FAILED, "the guest does not run");
	engine_end(&engine);
	g_log_set_always_fatal(fatal);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_resumed_guest_is_stopped_each_time),
		cmocka_unit_test(a_guest_that_runs_at_the_start_is_stopped),
		cmocka_unit_test(a_reset_is_reported),
		cmocka_unit_test(a_stop_that_hangs_is_reported_and_blocks_no_caller),
		cmocka_unit_test(a_stop_that_is_refused_is_sent_again),
		cmocka_unit_test(a_guest_that_the_engine_resumes_runs_on),
		cmocka_unit_test(a_new_engine_retries_until_the_guest_runs),
		cmocka_unit_test(an_engine_gives_up_a_guest_whose_qemu_is_gone),
	};

	return cmocka_run_group_tests_name("qemu-watch", tests, NULL, NULL);
}
