/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Threads, descriptors and memory that the system may refuse. GLib aborts the process where it
 * gets none. After RUN such a lack may only pause the migration, so code that runs then calls
 * these functions first. Their errors name the limit that the operator has to raise.
 */
#pragma once

#include <gio/gio.h>

#define PR_RESOURCE_ERROR (pr_resource_error_quark())
GQuark pr_resource_error_quark(void);

typedef enum PrResourceError {
	PR_RESOURCE_ERROR_SCARCE, /* no thread, descriptor or memory is left; names the limit */
} PrResourceError;

/* As g_thread_try_new(), with such an error. */
GThread *pr_thread_try(const char *name, GThreadFunc func, gpointer opaque, GError **error);

/* Whether a thread can be started now. For callers of GLib functions that start one, and abort
 * where they cannot. */
gboolean pr_probe_thread(GError **error);

/* Whether there are descriptors for a main context and what GIO opens for it. Two threads that
 * check at the same time may both find the same ones free; so PR_FD_HEADROOM is several times
 * what one thread needs. */
#define PR_FD_HEADROOM 16
gboolean pr_check_fd_headroom(GError **error);

/* A zeroed buffer for `what`, to be freed with g_free(). */
void *pr_try_alloc(gsize bytes, const char *what, GError **error);
/* Whether that much can be allocated now. For callers of GLib functions that allocate it. */
gboolean pr_check_memory_headroom(gsize bytes, const char *what, GError **error);
