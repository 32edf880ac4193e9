/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "monitor/async-command.h"

#include "monitor/internal.h"
#include "util/try-alloc.h"

/* Owned by the thread of the main context. `error` belongs to the command's thread until that is
 * joined. */
struct PrAsyncCommand {
	PrMonitor *monitor;
	const PrCommand *command;
	char *uris;
	GCancellable *cancel;
	GSource *ended; /* the command's thread attaches it as its last step */
	GThread *thread;
	PrWait *wait; /* NULL: the client has left */
	GError *error;
};

static gpointer command_thread(gpointer opaque)
{
	PrAsyncCommand *async = opaque;
	PrMonitor *monitor = async->monitor;

	async->command->listen(monitor->migration, async->uris, async->cancel, &async->error);
	g_source_attach(async->ended, monitor->context);
	return NULL;
}

static gboolean on_ended(gpointer opaque)
{
	PrAsyncCommand *async = opaque;
	PrWait *wait = async->wait;
	g_autoptr(GError) error = NULL;

	g_thread_join(g_steal_pointer(&async->thread));
	error = g_steal_pointer(&async->error);
	g_ptr_array_remove(async->monitor->async_commands, async);
	if (wait) {
		PrAnswer answer = wait->answer;
		void *answer_opaque = wait->opaque;

		g_free(wait);
		answer(error ? NULL : "", error, answer_opaque);
	} else if (error) {
		g_message("a command failed after its client had disconnected: %s", error->message);
	}
	return G_SOURCE_REMOVE;
}

PrWait *pr_async_command_start(PrMonitor *monitor, const PrCommand *command, JsonObject *args,
			       PrAnswer answer, void *opaque, GError **error)
{
	const char *uris = pr_command_uris(args, error);
	PrAsyncCommand *async;

	if (!uris)
		return NULL;
	async = g_new0(PrAsyncCommand, 1);
	async->monitor = monitor;
	async->command = command;
	async->uris = g_strdup(uris);
	async->cancel = g_cancellable_new();
	async->ended = g_idle_source_new();
	g_source_set_priority(async->ended, G_PRIORITY_DEFAULT);
	g_source_set_callback(async->ended, on_ended, async, NULL);
	async->thread = pr_thread_try("async-command", command_thread, async, error);
	if (!async->thread) {
		pr_async_command_free(async);
		return NULL;
	}
	g_ptr_array_add(monitor->async_commands, async);
	async->wait = g_new0(PrWait, 1);
	*async->wait = (PrWait){
		.monitor = monitor, .answer = answer, .opaque = opaque, .async = &async->wait};
	return async->wait;
}

void pr_async_command_free(PrAsyncCommand *async)
{
	g_cancellable_cancel(async->cancel);
	if (async->thread)
		g_thread_join(async->thread);
	g_source_destroy(async->ended);
	g_source_unref(async->ended);
	g_clear_error(&async->error);
	g_object_unref(async->cancel);
	g_free(async->uris);
	g_free(async);
}
