/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What an engine that follows another one learns from the agent. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <string.h>

#include "guest/guest.h"
#include "tests/guest/testguest.h"

#define TIMEOUT 20000 /* ms; the machine may be busy with other tests */

static TestGuest *new_guest(void)
{
	const TestGuestConfig config = {.size = 1 << 20, .n_blocks = 2, .n_threads = 2};
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

static void attach_again(TestGuest *guest, PrGuest **engine)
{
	pr_guest_close(*engine);
	*engine = attach(guest);
}

/* The agent remembers whether the guest ran. The test passes wrong values to the second engine's
 * assume_stopped(). */
static void the_next_engine_resumes_a_guest_that_ran(void **state)
{
	g_autoptr(TestGuest) guest = new_guest();
	g_autoptr(PrGuest) engine = attach(guest);
	g_autoptr(GError) error = NULL;
	gboolean was_running = FALSE;

	assert_true(engine->ops->stop(engine, &was_running, &error));
	attach_again(guest, &engine);
	assert_true(engine->ops->assume_stopped(engine, FALSE, &error));
	assert_true(engine->ops->resume(engine, &error));
	assert_true(testguest_running(guest));

	assert_true(testguest_pause(guest, TIMEOUT));
	assert_true(engine->ops->stop(engine, &was_running, &error));
	attach_again(guest, &engine);
	assert_true(engine->ops->assume_stopped(engine, TRUE, &error));
	assert_true(engine->ops->resume(engine, &error));
	assert_false(testguest_running(guest));
}

static void the_next_engine_finds_the_same_blocks_or_none(void **state)
{
	g_autoptr(TestGuest) guest = new_guest();
	g_autoptr(PrGuest) engine = attach(guest);
	g_autoptr(GError) error = NULL;
	guint n;
	const PrGuestBlock *blocks = engine->ops->prepare(engine, PR_GUEST_SOURCE, &n, &error);
	g_autofree PrGuestBlock *known = g_memdup2(blocks, n * sizeof(*blocks));
	g_autofree char *name = g_strdup(blocks[0].idstr);
	g_autofree char *process = engine->ops->process(engine);

	known[0].idstr = name;
	attach_again(guest, &engine);
	g_autofree char *same = engine->ops->process(engine);
	assert_string_equal(process, same);
	known[0].base += 4096;
	assert_null(engine->ops->adopt(engine, known, 1, &error));
	assert_non_null(strstr(error->message, name));
	g_clear_error(&error);
	known[0].base -= 4096;
	const PrGuestBlock *found = engine->ops->adopt(engine, known, 1, &error);
	assert_non_null(found);
	assert_string_equal(found[0].idstr, name);
	assert_true(found[0].memfd >= 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(the_next_engine_resumes_a_guest_that_ran),
		cmocka_unit_test(the_next_engine_finds_the_same_blocks_or_none),
	};

	return cmocka_run_group_tests_name("agent-follow", tests, NULL, NULL);
}
