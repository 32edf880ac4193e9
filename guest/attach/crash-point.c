/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "guest/attach/crash-point.h"

PrAttachCrashHook pr_attach_crash_hook;

const char *pr_attach_crash_point_name(PrAttachCrashPoint point)
{
#define PR_ATTACH_CRASH_NAME(id, name) [PR_ATTACH_CRASH_##id] = name,
	static const char *const names[] = {PR_ATTACH_CRASH_POINTS(PR_ATTACH_CRASH_NAME)};
#undef PR_ATTACH_CRASH_NAME

	return names[point];
}
