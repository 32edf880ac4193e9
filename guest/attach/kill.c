/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "guest/attach/kill.h"

PrAttachHook pr_attach_hook;

const char *pr_attach_point_name(PrAttachPoint point)
{
#define PR_ATTACH_POINT_NAME(id, name) [PR_ATTACH_##id] = name,
	static const char *const names[] = {PR_ATTACH_POINTS(PR_ATTACH_POINT_NAME)};
#undef PR_ATTACH_POINT_NAME

	return names[point];
}
