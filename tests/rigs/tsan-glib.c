/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Tells ThreadSanitizer about GLib's locks and queues. GLib is not instrumented, and its mutex is a
 * bare futex. Without this file every datum under a GMutex would be reported as a race. It is
 * linked into the tests of a build with -Db_sanitize=thread, where these definitions come before
 * GLib's.
 */
#include <dlfcn.h>
#include <glib.h>
#include <sanitizer/tsan_interface.h>

/* GLib's own constructors lock, so the address is looked up when it is first needed. */
#define DECLARE_REAL(name_)                                                                        \
	static __typeof__(&name_) real_##name_(void)                                               \
	{                                                                                          \
		static __typeof__(&name_) found;                                                   \
		__typeof__(&name_) real = __atomic_load_n(&found, __ATOMIC_RELAXED);               \
                                                                                                   \
		if (!real) {                                                                       \
			real = (__typeof__(&name_))dlsym(RTLD_NEXT, #name_);                       \
			__atomic_store_n(&found, real, __ATOMIC_RELAXED);                          \
		}                                                                                  \
		return real;                                                                       \
	}

#define LOCK(type_, name_)                                                                         \
	DECLARE_REAL(name_)                                                                        \
	void(name_)(type_ * lock)                                                                  \
	{                                                                                          \
		real_##name_()(lock);                                                              \
		__tsan_acquire(lock);                                                              \
	}
#define TRYLOCK(type_, name_)                                                                      \
	DECLARE_REAL(name_)                                                                        \
	gboolean(name_)(type_ * lock)                                                              \
	{                                                                                          \
		gboolean ok = real_##name_()(lock);                                                \
                                                                                                   \
		if (ok)                                                                            \
			__tsan_acquire(lock);                                                      \
		return ok;                                                                         \
	}
#define UNLOCK(type_, name_)                                                                       \
	DECLARE_REAL(name_)                                                                        \
	void(name_)(type_ * lock)                                                                  \
	{                                                                                          \
		__tsan_release(lock);                                                              \
		real_##name_()(lock);                                                              \
	}

LOCK(GMutex, g_mutex_lock)
TRYLOCK(GMutex, g_mutex_trylock)
UNLOCK(GMutex, g_mutex_unlock)
LOCK(GRecMutex, g_rec_mutex_lock)
TRYLOCK(GRecMutex, g_rec_mutex_trylock)
UNLOCK(GRecMutex, g_rec_mutex_unlock)

DECLARE_REAL(g_cond_wait)
void g_cond_wait(GCond *cond, GMutex *mutex)
{
	__tsan_release(mutex);
	real_g_cond_wait()(cond, mutex);
	__tsan_acquire(mutex);
}

DECLARE_REAL(g_cond_wait_until)
gboolean g_cond_wait_until(GCond *cond, GMutex *mutex, gint64 end_time)
{
	gboolean ok;

	__tsan_release(mutex);
	ok = real_g_cond_wait_until()(cond, mutex, end_time);
	__tsan_acquire(mutex);
	return ok;
}

DECLARE_REAL(g_async_queue_push)
void g_async_queue_push(GAsyncQueue *queue, gpointer data)
{
	__tsan_release(queue);
	real_g_async_queue_push()(queue, data);
}

#define POP(name_, params_, args_)                                                                 \
	DECLARE_REAL(name_)                                                                        \
	gpointer name_ params_                                                                     \
	{                                                                                          \
		gpointer data = real_##name_() args_;                                              \
                                                                                                   \
		__tsan_acquire(queue);                                                             \
		return data;                                                                       \
	}

POP(g_async_queue_pop, (GAsyncQueue * queue), (queue))
POP(g_async_queue_try_pop, (GAsyncQueue * queue), (queue))
POP(g_async_queue_timeout_pop, (GAsyncQueue * queue, guint64 timeout), (queue, timeout))

/*
 * What was written before a source is attached is visible when it is called. A context's thread
 * learns of new sources in its poll function, which does not know the context. So one token stands
 * for all contexts.
 */
static char sources;

static gint poll_and_acquire(GPollFD *fds, guint n_fds, gint timeout)
{
	gint n = g_poll(fds, n_fds, timeout);

	__tsan_acquire(&sources);
	return n;
}

DECLARE_REAL(g_main_context_new)
GMainContext *g_main_context_new(void)
{
	GMainContext *context = real_g_main_context_new()();

	g_main_context_set_poll_func(context, poll_and_acquire);
	return context;
}

DECLARE_REAL(g_source_attach)
guint g_source_attach(GSource *source, GMainContext *context)
{
	__tsan_release(&sources);
	return real_g_source_attach()(source, context);
}

DECLARE_REAL(g_main_context_invoke)
void g_main_context_invoke(GMainContext *context, GSourceFunc function, gpointer data)
{
	__tsan_release(&sources);
	real_g_main_context_invoke()(context, function, data);
}
