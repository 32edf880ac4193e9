/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Commands that listen look up names, and a name server that is gone is waited for for seconds. So they run on a thread
 * of their own and are answered from the main loop when they have ended, while everybody else is served. Whoever asked
 * may have gone by then: what he asked for is done all the same.
 */
#include "monitor/internal.h"
#include "util/try-alloc.h"

/* Owned by the thread of the main context; `error` is the errand's own until that has been joined. */
struct PrAsyncCommand {
	PrMonitor *monitor;
	const PrCommand *command;
	char *uris;
	GCancellable *cancel;
	GSource *ended; /* attached by the errand's thread, when it has no more to do */
	GThread *thread;
	PrWait *wait; /* NULL: nobody waits any more */
	GError *error;
};

static gpointer errand_thread(gpointer opaque)
{
	PrAsyncCommand *errand = opaque;
	PrMonitor *monitor = errand->monitor;

	errand->command->listen(monitor->migration, errand->uris, errand->cancel, &errand->error);
	g_source_attach(errand->ended, monitor->context);
	return NULL;
}

static gboolean on_ended(gpointer opaque)
{
	PrAsyncCommand *errand = opaque;
	PrWait *wait = errand->wait;
	g_autoptr(GError) error = NULL;

	g_thread_join(g_steal_pointer(&errand->thread));
	error = g_steal_pointer(&errand->error);
	g_ptr_array_remove(errand->monitor->errands, errand);
	if (wait) {
		PrAnswer answer = wait->answer;
		void *whom = wait->opaque;

		g_free(wait);
		answer(error ? NULL : "", error, whom);
	} else if (error) {
		g_message("%s, for a client that has gone", error->message);
	}
	return G_SOURCE_REMOVE;
}

PrWait *pr_async_command_begin(PrMonitor *monitor, const PrCommand *command, JsonObject *args,
			       PrAnswer answer, void *opaque, GError **error)
{
	const char *uris = pr_command_uris(args, error);
	PrAsyncCommand *errand;

	if (!uris)
		return NULL;
	errand = g_new0(PrAsyncCommand, 1);
	errand->monitor = monitor;
	errand->command = command;
	errand->uris = g_strdup(uris);
	errand->cancel = g_cancellable_new();
	errand->ended = g_idle_source_new();
	g_source_set_priority(errand->ended, G_PRIORITY_DEFAULT);
	g_source_set_callback(errand->ended, on_ended, errand, NULL);
	errand->thread = pr_thread_try("errand", errand_thread, errand, error);
	if (!errand->thread) {
		pr_async_command_free(errand);
		return NULL;
	}
	g_ptr_array_add(monitor->errands, errand);
	errand->wait = g_new0(PrWait, 1);
	*errand->wait =
		(PrWait){.monitor = monitor, .answer = answer, .opaque = opaque, .errand = errand};
	return errand->wait;
}

void pr_async_command_forget(PrAsyncCommand *errand)
{
	errand->wait = NULL;
}

void pr_async_command_free(PrAsyncCommand *errand)
{
	g_cancellable_cancel(errand->cancel);
	if (errand->thread)
		g_thread_join(errand->thread);
	g_source_destroy(errand->ended);
	g_source_unref(errand->ended);
	g_clear_error(&errand->error);
	g_object_unref(errand->cancel);
	g_free(errand->uris);
	g_free(errand);
}
