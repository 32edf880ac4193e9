/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <signal.h>

#include "guest/agent/internal.h"

int agent_thread_create(pthread_t *ret_thread, void *(*run)(void *), PrAgent *agent,
			const char *name)
{
	sigset_t all, old;
	pthread_t thread;
	int err;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	err = pthread_create(&thread, NULL, run, agent);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (err)
		return -err;
	pthread_setname_np(thread, name);
	*ret_thread = thread;
	return 0;
}
