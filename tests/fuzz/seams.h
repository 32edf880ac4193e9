/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * For the targets that drive a whole engine. Some of the engine's sources are compiled again with
 * this header before all others. It turns the creation of threads, waits, sockets and transports
 * into calls of the test rig (engine.c). The engine's code is otherwise unchanged.
 */
#pragma once

#include <gio/gio.h>

#include "transport/net/dial.h"
#include "util/try-alloc.h"
#include "transport/registry.h"

GThread *fuzz_thread_new(const char *name, GThreadFunc func, gpointer opaque);
gpointer fuzz_thread_join(GThread *thread);
void fuzz_cond_wait(GCond *cond, GMutex *lock);
gboolean fuzz_cond_wait_until(GCond *cond, GMutex *lock, gint64 deadline);
PrWait fuzz_wait_fd(int fd, short events, gint64 deadline, GCancellable *cancel);
GSocketConnection *fuzz_dial(const PrUri *uri, uint16_t port, gint64 deadline, GCancellable *cancel,
			     GError **error);
const PrTransportOps *fuzz_transport_find(const char *scheme, GError **error);

#define g_thread_new				    fuzz_thread_new
#define g_thread_join				    fuzz_thread_join
#define g_thread_try_new(name, func, opaque, error) fuzz_thread_new(name, func, opaque)
#define pr_thread_try(name, func, opaque, error)    fuzz_thread_new(name, func, opaque)
#define g_cond_wait				    fuzz_cond_wait
#define g_cond_wait_until			    fuzz_cond_wait_until
#define pr_wait_fd				    fuzz_wait_fd
#define pr_dial					    fuzz_dial
#define pr_transport_find			    fuzz_transport_find
