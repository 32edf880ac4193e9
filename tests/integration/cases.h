/* SPDX-License-Identifier: GPL-2.0-or-later */
/* How each program of tests with two engines lists and runs its tests. */
#pragma once

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "tests/rigs/pair.h"

/* A test over one transport: its state is the scheme of the paths. */
#define OVER(scheme_, test_)                                                                       \
	{                                                                                          \
#test_ " over " scheme_, test_, NULL, NULL, scheme_                                \
	}
#define BOTH(test_) OVER("tcp", test_), OVER("ofi", test_)

static inline const char *scheme_of(void **state)
{
	return *state;
}

/* What main() returns. TEST_FILTER in the environment chooses tests. */
#define RUN_CASES(group_, tests_)                                                                  \
	(cmocka_set_test_filter(g_getenv("TEST_FILTER")),                                          \
	 cmocka_run_group_tests_name(group_, tests_, NULL, NULL))
