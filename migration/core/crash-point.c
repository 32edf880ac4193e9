/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/core/crash-point.h"

PrCrashHook pr_crash_hook;

const char *pr_crash_point_name(PrCrashPoint point)
{
#define PR_CRASH_POINT_NAME(id, name) [PR_CRASH_##id] = name,
	static const char *const names[] = {PR_CRASH_POINTS(PR_CRASH_POINT_NAME)};
#undef PR_CRASH_POINT_NAME

	return names[point];
}
