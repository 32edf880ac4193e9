/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The fence: which accesses the agent's write protection stops, which it allows, and how long it
 * lasts. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "guest/agent-client.h"
#include "guest/guest.h"
#include "tests/guest/testguest.h"

#define PAGE	4096
#define TIMEOUT 20000 /* ms; the machine may be busy with other tests */
#define A_WHILE 200   /* ms; an event that has not come by then counts as not coming */
#define HOLE	(16 * PAGE)

/* The RAM of a process without a VMM. Both blocks have pages and holes. */
static TestGuest *new_guest(void)
{
	const TestGuestConfig config = {
		.size = 4 << 20, .n_blocks = 2, .n_threads = 2, .paused = TRUE};
	g_autoptr(GError) error = NULL;
	TestGuest *guest = testguest_new(&config, &error);

	g_assert_no_error(error);
	testguest_start(guest);
	return guest;
}

static PrGuest *attach(TestGuest *guest)
{
	g_autoptr(GError) error = NULL;
	PrGuest *engine = pr_guest_open(testguest_spec(guest), NULL, TIMEOUT, &error);

	g_assert_no_error(error);
	return engine;
}

static void fence_or_skip(PrGuest *engine)
{
	g_autoptr(GError) error = NULL;

	if (engine->ops->fence(engine, &error))
		return;
	if (!g_error_matches(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PERMISSION) &&
	    !g_error_matches(error, PR_GUEST_ERROR, PR_GUEST_ERROR_UNSUPPORTED))
		g_assert_no_error(error);
	print_message("skipped: %s\n", error->message);
	skip();
}

static void unfence(PrGuest *engine)
{
	g_autoptr(GError) error = NULL;

	engine->ops->unfence(engine, &error);
	g_assert_no_error(error);
}

/* A thread of the guest's process that writes a byte. */
typedef struct Writer {
	atomic_uchar *at;
	GThread *thread;
	atomic_bool done;
} Writer;

/*
 * The order is relaxed. ThreadSanitizer holds an internal lock during other stores, and this store
 * may block.
 */
static guint8 byte_at(const Writer *writer)
{
	return atomic_load_explicit(writer->at, memory_order_relaxed);
}

static gpointer write_thread(gpointer opaque)
{
	Writer *writer = opaque;

	atomic_store_explicit(writer->at, 0xa5, memory_order_relaxed);
	atomic_store(&writer->done, TRUE);
	return NULL;
}

static void writer_begin(Writer *writer, TestGuest *guest, guint block, gsize offset)
{
	*writer = (Writer){.at = (atomic_uchar *)testguest_block_map(guest, block) + offset};
	writer->thread = g_thread_new("writer", write_thread, writer);
}

static gboolean has_written(Writer *writer, guint timeout_ms)
{
	gint64 deadline = g_get_monotonic_time() + timeout_ms * G_TIME_SPAN_MILLISECOND;

	while (!atomic_load(&writer->done) && g_get_monotonic_time() < deadline)
		g_usleep(500); /* between two checks of the condition */
	return atomic_load(&writer->done);
}

static guint8 in_memfd(TestGuest *guest, guint block, gsize offset)
{
	guint8 byte;

	assert_int_equal(pread(testguest_block_memfd(guest, block), &byte, 1, offset), 1);
	return byte;
}

/* The writer has not written yet. */
static void assert_waits(Writer *writer, TestGuest *guest, guint block, gsize offset)
{
	assert_false(has_written(writer, A_WHILE));
	assert_int_not_equal(in_memfd(guest, block, offset), 0xa5);
	assert_int_not_equal(byte_at(writer), 0xa5);
}

static void assert_goes_on(Writer *writer)
{
	assert_true(has_written(writer, TIMEOUT));
	g_thread_join(writer->thread);
	assert_int_equal(byte_at(writer), 0xa5);
}

static void writers_wait_and_readers_pass(void **state)
{
	static const struct {
		guint block;
		gsize offset;
	} places[] = {{0, 3 * PAGE + 7}, {1, 5 * PAGE}, {0, HOLE}};
	g_autoptr(TestGuest) guest = new_guest();
	g_autoptr(PrGuest) engine = attach(guest);
	Writer writers[G_N_ELEMENTS(places)];
	guint64 sum = 0;

	fence_or_skip(engine);
	for (guint i = 0; i < G_N_ELEMENTS(places); i++)
		writer_begin(&writers[i], guest, places[i].block, places[i].offset);
	for (guint i = 0; i < G_N_ELEMENTS(places); i++)
		assert_waits(&writers[i], guest, places[i].block, places[i].offset);
	for (guint block = 0; block < 2; block++)
		for (gsize at = 0; at < testguest_block_size(guest); at += PAGE)
			sum += atomic_load_explicit(
				(atomic_uchar *)testguest_block_map(guest, block) + at,
				memory_order_relaxed);
	assert_int_not_equal(sum, 0);
	unfence(engine);
	for (guint i = 0; i < G_N_ELEMENTS(places); i++)
		assert_goes_on(&writers[i]);
	/* The fence is off, and to turn it off again is harmless. */
	unfence(engine);
	writer_begin(&writers[0], guest, 1, 9 * PAGE);
	assert_goes_on(&writers[0]);
}

static gboolean says_fenced(TestGuest *guest)
{
	g_autoptr(GError) error = NULL;
	g_autoptr(PrAgentClient) client =
		pr_agent_client_open(testguest_socket(guest), TIMEOUT, &error);

	g_assert_no_error(error);
	return pr_agent_client_was_fenced(client);
}

/* The engine that has fenced dies. HELLO tells the next one, which may fence again or end the
 * fence. */
static void the_fence_outlives_the_engine(void **state)
{
	g_autoptr(TestGuest) guest = new_guest();
	PrGuest *first = attach(guest);
	Writer writer;

	fence_or_skip(first);
	pr_guest_close(first);
	writer_begin(&writer, guest, 0, 2 * PAGE);
	assert_waits(&writer, guest, 0, 2 * PAGE);
	assert_true(says_fenced(guest));

	g_autoptr(PrGuest) second = attach(guest);
	fence_or_skip(second);
	assert_waits(&writer, guest, 0, 2 * PAGE);
	unfence(second);
	assert_goes_on(&writer);
	pr_guest_close(g_steal_pointer(&second));
	assert_false(says_fenced(guest));
}

/*
 * A writer runs between two fences. The second fence blocks it again, so the destination reads the
 * page without the later write.
 */
static void a_second_fence_blocks_writers_again(void **state)
{
	g_autoptr(TestGuest) guest = new_guest();
	g_autoptr(PrGuest) engine = attach(guest);
	Writer writer;

	fence_or_skip(engine);
	unfence(engine);
	writer_begin(&writer, guest, 0, 2 * PAGE);
	assert_goes_on(&writer);
	fence_or_skip(engine);
	writer_begin(&writer, guest, 0, 2 * PAGE + 1);
	assert_waits(&writer, guest, 0, 2 * PAGE + 1);
	unfence(engine);
	assert_goes_on(&writer);
}

/*
 * Lets the guest's threads run until the fence blocks one of them. Then they can't be parked any
 * more.
 */
static gboolean reaches_a_write(TestGuest *guest)
{
	gint64 deadline = g_get_monotonic_time() + TIMEOUT * G_TIME_SPAN_MILLISECOND;

	do
		testguest_resume(guest);
	while (testguest_pause(guest, A_WHILE) && g_get_monotonic_time() < deadline);
	return testguest_running(guest);
}

/* The guest's process can free the agent while the fence blocks writers. */
static void freeing_the_agent_wakes_all_writers(void **state)
{
	TestGuest *guest = new_guest();
	PrGuest *engine = attach(guest);

	fence_or_skip(engine);
	assert_true(reaches_a_write(guest));
	pr_guest_close(engine);
	testguest_free(guest);
}

static void memory_and_standard_error_are_opened_for_the_engine(void **state)
{
	g_autoptr(TestGuest) guest = new_guest();
	g_autoptr(GError) error = NULL;
	g_autoptr(PrAgentClient) client =
		pr_agent_client_open(testguest_socket(guest), TIMEOUT, &error);
	guint8 *page = testguest_block_map(guest, 0);
	g_autofree char *name = NULL;
	guint8 byte;

	g_assert_no_error(error);
	int fd = pr_agent_client_memory(client, &error);
	g_assert_no_error(error);
	assert_int_equal(pwrite(fd, "\x5a", 1, (off_t)(gsize)(page + 11)), 1);
	assert_int_equal(page[11], 0x5a);
	assert_int_equal(pread(fd, &byte, 1, (off_t)(gsize)(page + 11)), 1);
	assert_int_equal(byte, 0x5a);
	close(fd);

	/* Redirects standard error to a file for a moment. */
	int kept = dup(STDERR_FILENO), file = g_file_open_tmp("stderr-XXXXXX", &name, &error);
	char text[8] = {0};
	g_assert_no_error(error);
	assert_int_equal(write(file, "it says", 7), 7);
	assert_int_equal(dup2(file, STDERR_FILENO), STDERR_FILENO);
	fd = pr_agent_client_stderr(client, &error);
	assert_int_equal(dup2(kept, STDERR_FILENO), STDERR_FILENO);
	g_assert_no_error(error);
	assert_int_equal(pread(fd, text, 7, 0), 7);
	assert_string_equal(text, "it says");
	assert_int_equal(write(fd, "x", 1), -1);
	close(fd);
	close(file);
	unlink(name);
	/* No other process may read a pipe. */
	int ends[2];
	assert_int_equal(pipe(ends), 0);
	assert_int_equal(dup2(ends[1], STDERR_FILENO), STDERR_FILENO);
	fd = pr_agent_client_stderr(client, &error);
	assert_int_equal(dup2(kept, STDERR_FILENO), STDERR_FILENO);
	g_assert_no_error(error);
	assert_int_equal(fd, -1);
	close(ends[0]);
	close(ends[1]);
	close(kept);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(writers_wait_and_readers_pass),
		cmocka_unit_test(the_fence_outlives_the_engine),
		cmocka_unit_test(a_second_fence_blocks_writers_again),
		cmocka_unit_test(freeing_the_agent_wakes_all_writers),
		cmocka_unit_test(memory_and_standard_error_are_opened_for_the_engine),
	};

	return cmocka_run_group_tests_name("fence", tests, NULL, NULL);
}
