/* SPDX-License-Identifier: GPL-2.0-or-later */
#include <poll.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/resource.h>

#include <cmocka.h>

#include "util/try-alloc.h"
#include "util/waker.h"

static gboolean is_awake(const PrWaker *waker, int timeout_ms)
{
	struct pollfd ready = {.fd = pr_waker_fd(waker), .events = POLLIN};

	return poll(&ready, 1, timeout_ms) == 1 && ready.revents == POLLIN;
}

static void stays_awake_until_it_is_drained(void **state)
{
	PrWaker waker;

	assert_true(pr_waker_init(&waker, NULL));
	assert_false(is_awake(&waker, 0));
	pr_waker_wake(&waker);
	pr_waker_wake(&waker);
	assert_true(is_awake(&waker, 0));
	assert_true(is_awake(&waker, 0));
	pr_waker_drain(&waker);
	assert_false(is_awake(&waker, 0));
	/* It was drained, so this must not block. */
	pr_waker_drain(&waker);
	pr_waker_clear(&waker);
	pr_waker_clear(&waker);
	assert_int_equal(pr_waker_fd(&waker), -1);
}

static gpointer wake(gpointer waker)
{
	pr_waker_wake(waker);
	return NULL;
}

static void another_thread_ends_the_sleep(void **state)
{
	PrWaker waker;
	GThread *thread;

	assert_true(pr_waker_init(&waker, NULL));
	thread = g_thread_new("wake", wake, &waker);
	assert_true(is_awake(&waker, 10000));
	g_thread_join(thread);
	pr_waker_clear(&waker);
}

static void without_descriptors_the_error_names_the_limit(void **state)
{
	g_autoptr(GError) error = NULL;
	struct rlimit before, none;
	PrWaker waker;
	gboolean made;

	assert_int_equal(getrlimit(RLIMIT_NOFILE, &before), 0);
	none = before;
	none.rlim_cur = 0;
	assert_int_equal(setrlimit(RLIMIT_NOFILE, &none), 0);
	made = pr_waker_init(&waker, &error);
	assert_int_equal(setrlimit(RLIMIT_NOFILE, &before), 0);
	assert_false(made);
	assert_true(g_error_matches(error, PR_RESOURCE_ERROR, PR_RESOURCE_ERROR_SCARCE));
	assert_non_null(strstr(error->message, "ulimit -n"));
	/* Like a waker that was never set up. */
	pr_waker_wake(&waker);
	pr_waker_clear(&waker);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(stays_awake_until_it_is_drained),
		cmocka_unit_test(another_thread_ends_the_sleep),
		cmocka_unit_test(without_descriptors_the_error_names_the_limit),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
