/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/core/crash-point.h"

PrKillHook pr_kill_hook;

const char *pr_kill_point_name(PrKillPoint point)
{
#define PR_KILL_POINT_NAME(id, name) [PR_KILL_##id] = name,
	static const char *const names[] = {PR_KILL_POINTS(PR_KILL_POINT_NAME)};
#undef PR_KILL_POINT_NAME

	return names[point];
}
