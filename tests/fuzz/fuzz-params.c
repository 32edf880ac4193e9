/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Sets migration parameters and capabilities. Lines are "NAME=VALUE" (text, as in HMP),
 * "NAME#NUMBER" (a number, as in QMP) and "NAME+" or "NAME-" (a capability). After each line all
 * values must be valid together.
 */
#include <string.h>

#include "migration/core/params.h"
#include "tests/fuzz/fuzz.h"

static void check_values(const PrParams *params)
{
	for (guint i = 0; i < PR_N_PARAMS; i++) {
		const PrParamInfo *info = pr_param_info(i);
		uint64_t value = pr_param(params, i);

		g_assert(value >= info->min && value <= info->max);
	}
	g_assert(pr_param(params, PR_PARAM_HEARTBEAT_INTERVAL) <
		 pr_param(params, PR_PARAM_HEARTBEAT_TIMEOUT));
	g_assert(!(pr_param(params, PR_PARAM_BULK_READ_SIZE) &
		   (pr_param(params, PR_PARAM_BULK_READ_SIZE) - 1)));
	for (guint i = 0; i < PR_N_CAPABILITIES; i++)
		g_assert(!pr_capability_info(i)->fixed ||
			 pr_capability(params, i) == pr_capability_info(i)->def);
}

static gboolean set(PrParams *params, char *line, GError **error)
{
	gsize length = strlen(line);
	char *value = strpbrk(line, "=#");
	char kind = value ? *value : '\0';

	if (!kind && length && strchr("+-", line[length - 1])) {
		kind = line[length - 1];
		line[length - 1] = '\0';
		return pr_params_set_capability(params, line, kind == '+', error);
	}
	if (value)
		*value++ = '\0';
	if (kind == '#')
		return pr_params_set(params, line, g_ascii_strtoull(value, NULL, 10), error);
	return pr_params_set_text(params, line, value ? value : "", error);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	FuzzInput input = {data, size};
	PrParams params;
	char *line;

	pr_params_init(&params);
	while ((line = fuzz_line(&input))) {
		g_autoptr(GError) error = NULL;
		PrParams before = params;
		gboolean ok = set(&params, line, &error);

		fuzz_outcome(ok, error);
		if (!ok)
			g_assert(!memcmp(&before, &params, sizeof params));
		check_values(&params);
		g_free(line);
	}
	return 0;
}
