/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* For architectures without an injector: the engine is told before a helper is forked (attach_has_injector). */
#include "guest/attach/internal.h"

const bool attach_has_injector = false;

bool attach_stop(AttachStop *stop, AttachTarget *target, AttachResult *result)
{
	return attach_fail(result, PR_AGENT_UNSUPPORTED,
			   "this architecture has no injector; use the preload agent");
}

bool attach_call(AttachStop *stop, long number, const unsigned long args[6], AttachPlan plan,
		 long *ret)
{
	return false;
}

void attach_resume(AttachStop *stop)
{
}

void attach_settle(AttachTarget *target)
{
}
