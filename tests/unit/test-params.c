/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <string.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "migration/core/params.h"

static void defaults_are_within_their_ranges(void **state)
{
	PrParams params;

	pr_params_init(&params);
	for (guint i = 0; i < PR_N_PARAMS; i++) {
		const PrParamInfo *info = pr_param_info(i);

		assert_true(info->min <= info->def && info->def <= info->max);
		assert_true(info->help && info->unit);
		assert_int_equal(pr_param(&params, i), info->def);
		/* Each parameter accepts the value that it has. */
		assert_true(pr_params_set(&params, info->name, info->def, NULL));
	}
	for (guint i = 0; i < PR_N_CAPABILITIES; i++)
		assert_int_equal(pr_capability(&params, i), pr_capability_info(i)->def);
}

static void the_defaults_have_these_values(void **state)
{
	static const struct {
		PrParam param;
		const char *name;
		uint64_t def;
	} rows[] = {
		{PR_PARAM_MAX_POSTCOPY_BANDWIDTH, "max-postcopy-bandwidth", 0},
		{PR_PARAM_HEARTBEAT_INTERVAL, "heartbeat-interval", 100},
		{PR_PARAM_HEARTBEAT_TIMEOUT, "heartbeat-timeout", 500},
		{PR_PARAM_CONNECT_TIMEOUT, "connect-timeout", 1000},
		{PR_PARAM_HANDSHAKE_TIMEOUT, "handshake-timeout", 5000},
		{PR_PARAM_GUEST_TIMEOUT, "guest-timeout", 10000},
		{PR_PARAM_BULK_READ_SIZE, "bulk-read-size", 131072},
		{PR_PARAM_BULK_WINDOW, "bulk-window", 32},
		{PR_PARAM_FAULT_SPIN, "fault-spin", 50},
		{PR_PARAM_FAULT_READAHEAD, "fault-readahead", 0},
		{PR_PARAM_FAULT_THREADS, "fault-threads", 0},
		{PR_PARAM_PROBE_INTERVAL, "probe-interval", 1000},
	};

	assert_int_equal(G_N_ELEMENTS(rows), PR_N_PARAMS);
	for (guint i = 0; i < G_N_ELEMENTS(rows); i++) {
		assert_string_equal(pr_param_info(rows[i].param)->name, rows[i].name);
		assert_int_equal(pr_param_info(rows[i].param)->def, rows[i].def);
	}
}

static void values_are_numbers_with_an_optional_suffix(void **state)
{
	static const struct {
		const char *name, *text;
		PrParam param;
		int64_t value; /* expected; -1: refused */
	} rows[] = {
		{"bulk-window", "1", PR_PARAM_BULK_WINDOW, 1},
		{"bulk-window", "64", PR_PARAM_BULK_WINDOW, 64},
		{"bulk-window", "0", PR_PARAM_BULK_WINDOW, -1},
		{"bulk-window", "65", PR_PARAM_BULK_WINDOW, -1},
		{"bulk-read-size", "4k", PR_PARAM_BULK_READ_SIZE, 4096},
		{"bulk-read-size", "4K", PR_PARAM_BULK_READ_SIZE, 4096},
		{"bulk-read-size", "1M", PR_PARAM_BULK_READ_SIZE, 1048576},
		{"bulk-read-size", "2M", PR_PARAM_BULK_READ_SIZE, -1},
		{"bulk-read-size", "12k", PR_PARAM_BULK_READ_SIZE, -1},
		{"bulk-read-size", "4096.0", PR_PARAM_BULK_READ_SIZE, -1},
		{"bulk-read-size", "4kk", PR_PARAM_BULK_READ_SIZE, -1},
		{"max-postcopy-bandwidth", "2G", PR_PARAM_MAX_POSTCOPY_BANDWIDTH, 2147483648},
		{"max-postcopy-bandwidth", "0", PR_PARAM_MAX_POSTCOPY_BANDWIDTH, 0},
		{"max-postcopy-bandwidth", "9223372036854775807", PR_PARAM_MAX_POSTCOPY_BANDWIDTH,
		 INT64_MAX},
		{"max-postcopy-bandwidth", "9223372036854775808", PR_PARAM_MAX_POSTCOPY_BANDWIDTH,
		 -1},
		{"max-postcopy-bandwidth", "99999999999999999999", PR_PARAM_MAX_POSTCOPY_BANDWIDTH,
		 -1},
		{"max-postcopy-bandwidth", "17179869185G", PR_PARAM_MAX_POSTCOPY_BANDWIDTH, -1},
		{"max-postcopy-bandwidth", "", PR_PARAM_MAX_POSTCOPY_BANDWIDTH, -1},
		{"max-postcopy-bandwidth", "-1", PR_PARAM_MAX_POSTCOPY_BANDWIDTH, -1},
		{"max-postcopy-bandwidth", "+1", PR_PARAM_MAX_POSTCOPY_BANDWIDTH, -1},
		{"max-postcopy-bandwidth", " 1", PR_PARAM_MAX_POSTCOPY_BANDWIDTH, -1},
		{"max-postcopy-bandwidth", "fast", PR_PARAM_MAX_POSTCOPY_BANDWIDTH, -1},
		{"max-postcopy-bandwidth", "k", PR_PARAM_MAX_POSTCOPY_BANDWIDTH, -1},
	};

	for (guint i = 0; i < G_N_ELEMENTS(rows); i++) {
		g_autoptr(GError) error = NULL;
		PrParams params;
		gboolean ok;

		pr_params_init(&params);
		ok = pr_params_set_text(&params, rows[i].name, rows[i].text, &error);
		assert_int_equal(ok, rows[i].value >= 0);
		assert_int_equal(pr_param(&params, rows[i].param),
				 ok ? (uint64_t)rows[i].value : pr_param_info(rows[i].param)->def);
		if (ok)
			continue;
		assert_true(g_error_matches(error, PR_PARAMS_ERROR, PR_PARAMS_ERROR_VALUE));
		assert_non_null(strstr(error->message, rows[i].name));
		assert_non_null(strstr(error->message, rows[i].text));
	}
}

static void a_range_error_names_parameter_value_and_range(void **state)
{
	g_autoptr(GError) error = NULL;
	PrParams params;

	pr_params_init(&params);
	assert_false(pr_params_set(&params, "connect-timeout", 60001, &error));
	assert_string_equal(error->message, "parameter 'connect-timeout': 60001 is not valid; "
					    "expected a whole number from 10 to 60000 ms");
}

static void an_unknown_parameter_is_refused_with_the_known_names(void **state)
{
	g_autoptr(GError) error = NULL;
	PrParams params;

	pr_params_init(&params);
	assert_false(pr_params_set_text(&params, "bulk-widow", "8", &error));
	assert_true(g_error_matches(error, PR_PARAMS_ERROR, PR_PARAMS_ERROR_UNKNOWN));
	assert_non_null(strstr(error->message, "bulk-widow"));
	for (guint i = 0; i < PR_N_PARAMS; i++)
		assert_non_null(strstr(error->message, pr_param_info(i)->name));
}

static void the_heartbeat_stays_below_its_timeout(void **state)
{
	g_autoptr(GError) error = NULL;
	PrParams params;

	pr_params_init(&params);
	assert_false(pr_params_set(&params, "heartbeat-interval", 500, &error));
	assert_non_null(strstr(error->message, "heartbeat-timeout (500 ms)"));
	assert_int_equal(pr_param(&params, PR_PARAM_HEARTBEAT_INTERVAL), 100);
	assert_false(pr_params_set(&params, "heartbeat-timeout", 100, NULL));
	assert_true(pr_params_set(&params, "heartbeat-timeout", 3000, NULL));
	assert_true(pr_params_set(&params, "heartbeat-interval", 500, NULL));
}

static void fixed_capabilities_cannot_be_changed(void **state)
{
	g_autoptr(GError) error = NULL;
	PrParams params;

	pr_params_init(&params);
	assert_true(pr_params_set_capability(&params, "postcopy-ram", TRUE, NULL));
	assert_false(pr_params_set_capability(&params, "postcopy-ram", FALSE, &error));
	assert_true(g_error_matches(error, PR_PARAMS_ERROR, PR_PARAMS_ERROR_FIXED));
	assert_non_null(strstr(error->message, "postcopy-ram"));
	assert_true(pr_capability(&params, PR_CAP_POSTCOPY_RAM));

	assert_true(pr_params_set_capability(&params, "zero-pages", FALSE, NULL));
	assert_false(pr_capability(&params, PR_CAP_ZERO_PAGES));
}

static void an_unknown_capability_is_refused_with_the_known_names(void **state)
{
	g_autoptr(GError) error = NULL;
	PrParams params;

	pr_params_init(&params);
	assert_false(pr_params_set_capability(&params, "xbzrle", TRUE, &error));
	assert_true(g_error_matches(error, PR_PARAMS_ERROR, PR_PARAMS_ERROR_UNKNOWN));
	assert_non_null(strstr(error->message, "xbzrle"));
	assert_non_null(strstr(error->message, "zero-pages"));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(defaults_are_within_their_ranges),
		cmocka_unit_test(the_defaults_have_these_values),
		cmocka_unit_test(values_are_numbers_with_an_optional_suffix),
		cmocka_unit_test(a_range_error_names_parameter_value_and_range),
		cmocka_unit_test(an_unknown_parameter_is_refused_with_the_known_names),
		cmocka_unit_test(the_heartbeat_stays_below_its_timeout),
		cmocka_unit_test(fixed_capabilities_cannot_be_changed),
		cmocka_unit_test(an_unknown_capability_is_refused_with_the_known_names),
	};

	return cmocka_run_group_tests_name("params", tests, NULL, NULL);
}
