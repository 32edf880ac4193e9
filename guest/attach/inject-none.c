/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* For architectures without an injector: pr_attach_fork() refuses to fork a helper there. */
#include "guest/attach/internal.h"

const bool attach_has_injector = false;

bool attach_stop(AttachStop *stop, AttachTarget *target, AgentResult *result)
{
	return agent_fail(result, PR_AGENT_UNSUPPORTED,
			  "this architecture has no injector; use the preload agent");
}

bool attach_call(AttachStop *stop, long number, const unsigned long args[6], AttachPrepare prepare,
		 long *ret)
{
	return false;
}

void attach_resume(AttachStop *stop)
{
}

void attach_detach_pending(AttachTarget *target)
{
}
