/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "util/waker.h"

#include <errno.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "util/try-alloc.h"

gboolean pr_waker_init(PrWaker *waker, GError **error)
{
	waker->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (waker->event_fd >= 0)
		return TRUE;
	g_set_error(error, PR_RESOURCE_ERROR, PR_RESOURCE_ERROR_SCARCE,
		    "no eventfd: %s; raise the engine's limit of open files (ulimit -n)",
		    g_strerror(errno));
	return FALSE;
}

void pr_waker_wake(const PrWaker *waker)
{
	/* Fails only where the counter is full, and then the descriptor is readable already. */
	if (waker->event_fd >= 0)
		(void)eventfd_write(waker->event_fd, 1);
}

void pr_waker_drain(const PrWaker *waker)
{
	eventfd_t count;

	/* Fails where nobody has woken it since the last drain. */
	(void)eventfd_read(waker->event_fd, &count);
}

int pr_waker_fd(const PrWaker *waker)
{
	return waker->event_fd;
}

void pr_waker_clear(PrWaker *waker)
{
	if (waker->event_fd >= 0)
		close(waker->event_fd);
	*waker = PR_WAKER_INIT;
}
