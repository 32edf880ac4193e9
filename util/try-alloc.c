/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "util/try-alloc.h"

#include <errno.h>
#include <sys/eventfd.h>
#include <unistd.h>

G_DEFINE_QUARK(pr_resource_error, pr_resource_error)

GThread *pr_thread_try(const char *name, GThreadFunc func, gpointer opaque, GError **error)
{
	g_autoptr(GError) why = NULL;
	GThread *thread = g_thread_try_new(name, func, opaque, &why);

	if (!thread)
		g_set_error(error, PR_RESOURCE_ERROR, PR_RESOURCE_ERROR_SCARCE,
			    "no thread \"%s\": %s; raise the engine's limits of memory and "
			    "processes (ulimit -v, -u)",
			    name, why->message);
	return thread;
}

static gpointer do_nothing(gpointer opaque)
{
	return opaque;
}

gboolean pr_probe_thread(GError **error)
{
	GThread *thread = pr_thread_try("spare", do_nothing, NULL, error);

	if (thread)
		g_thread_join(thread);
	return thread != NULL;
}

gboolean pr_check_fd_headroom(GError **error)
{
	int fds[PR_FD_HEADROOM], code = 0;
	guint n = 0;

	while (n < PR_FD_HEADROOM && (fds[n] = eventfd(0, EFD_CLOEXEC)) >= 0)
		n++;
	if (n < PR_FD_HEADROOM)
		code = errno;
	for (guint i = 0; i < n; i++)
		close(fds[i]);
	if (code)
		g_set_error(error, PR_RESOURCE_ERROR, PR_RESOURCE_ERROR_SCARCE,
			    "only %u descriptors are left, %u are needed: %s; raise the engine's "
			    "limit of open files (ulimit -n)",
			    n, PR_FD_HEADROOM, g_strerror(code));
	return !code;
}

void *pr_try_alloc(gsize bytes, const char *what, GError **error)
{
	void *memory = g_try_malloc0(MAX(bytes, 1));

	if (!memory)
		g_set_error(error, PR_RESOURCE_ERROR, PR_RESOURCE_ERROR_SCARCE,
			    "no memory for %s (%" G_GSIZE_FORMAT
			    " bytes); raise the engine's limit (ulimit -v), or free some",
			    what, bytes);
	return memory;
}

gboolean pr_check_memory_headroom(gsize bytes, const char *what, GError **error)
{
	g_autofree void *memory = pr_try_alloc(bytes, what, error);

	return memory != NULL;
}
