/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "monitor/stream.h"

#include <errno.h>
#include <glib-unix.h>
#include <unistd.h>

/* Bytes read for one client before the next one has its turn: a few commands, so that one who asks much at once does
 * not keep the others from being answered. */
#define CHUNK 256

/* Owned by the thread of the main context. */
struct PrStream {
	GMainContext *context;
	int in_fd, out_fd;
	PrStreamInput input;
	PrStreamClosed closed;
	void *opaque;
	GString *queue;	     /* not yet written */
	GSource *in_source;  /* NULL: held, or ended */
	GSource *out_source; /* NULL: nothing to write */
	GSource *end_source; /* set: closed() is due, or was called */
	char *why;
};

static void clear_source(GSource **source)
{
	if (*source) {
		g_source_destroy(*source);
		g_clear_pointer(source, g_source_unref);
	}
}

static gboolean on_end(gpointer opaque)
{
	PrStream *stream = opaque;

	stream->closed(stream->why, stream->opaque);
	return G_SOURCE_REMOVE;
}

/* Takes why. Only the first end counts. */
static void end_stream(PrStream *stream, char *why)
{
	if (stream->end_source) {
		g_free(why);
		return;
	}
	clear_source(&stream->in_source);
	clear_source(&stream->out_source);
	stream->why = why;
	stream->end_source = g_idle_source_new();
	g_source_set_priority(stream->end_source, G_PRIORITY_DEFAULT);
	g_source_set_callback(stream->end_source, on_end, stream, NULL);
	g_source_attach(stream->end_source, stream->context);
}

/* A peer that hangs up with bytes on their way is no more remarkable than one that reads them. */
static void end_by_errno(PrStream *stream)
{
	gboolean left = errno == EPIPE || errno == ECONNRESET;

	end_stream(stream, left ? NULL : g_strdup(g_strerror(errno)));
}

static gboolean on_readable(gint fd, GIOCondition condition, gpointer opaque)
{
	PrStream *stream = opaque;
	char data[CHUNK];
	ssize_t n = read(fd, data, sizeof(data));

	if (n > 0)
		stream->input(data, n, stream->opaque);
	else if (n == 0)
		end_stream(stream, NULL);
	else if (errno != EAGAIN && errno != EINTR)
		end_by_errno(stream);
	return G_SOURCE_CONTINUE;
}

/* FALSE: the stream has ended. */
static gboolean flush_queue(PrStream *stream)
{
	while (stream->queue->len) {
		ssize_t n = write(stream->out_fd, stream->queue->str, stream->queue->len);

		if (n >= 0) {
			g_string_erase(stream->queue, 0, n);
		} else if (errno == EAGAIN) {
			return TRUE;
		} else if (errno != EINTR) {
			end_by_errno(stream);
			return FALSE;
		}
	}
	return TRUE;
}

static gboolean on_writable(gint fd, GIOCondition condition, gpointer opaque)
{
	PrStream *stream = opaque;

	if (flush_queue(stream) && !stream->queue->len)
		clear_source(&stream->out_source);
	return G_SOURCE_CONTINUE;
}

static GSource *watch(PrStream *stream, int fd, GIOCondition condition, GUnixFDSourceFunc func)
{
	GSource *source = g_unix_fd_source_new(fd, condition);

	g_source_set_callback(source, G_SOURCE_FUNC(func), stream, NULL);
	g_source_attach(source, stream->context);
	return source;
}

PrStream *pr_stream_new(GMainContext *context, int in_fd, int out_fd, PrStreamInput input,
			PrStreamClosed closed, void *opaque)
{
	PrStream *stream = g_new0(PrStream, 1);

	stream->context = g_main_context_ref(context);
	stream->in_fd = in_fd;
	stream->out_fd = out_fd;
	stream->input = input;
	stream->closed = closed;
	stream->opaque = opaque;
	stream->queue = g_string_new(NULL);
	pr_stream_hold(stream, FALSE);
	return stream;
}

void pr_stream_write(PrStream *stream, const char *data, gsize len)
{
	if (stream->end_source)
		return;
	g_string_append_len(stream->queue, data, len);
	if (stream->out_source) {
		if (stream->queue->len > PR_STREAM_QUEUE_MAX)
			end_stream(stream, g_strdup("it does not read its answers"));
		return;
	}
	if (flush_queue(stream) && stream->queue->len)
		stream->out_source = watch(stream, stream->out_fd, G_IO_OUT, on_writable);
}

void pr_stream_hold(PrStream *stream, gboolean hold)
{
	if (hold)
		clear_source(&stream->in_source);
	else if (!stream->in_source && !stream->end_source)
		stream->in_source = watch(stream, stream->in_fd, G_IO_IN, on_readable);
}

void pr_stream_free(PrStream *stream)
{
	if (!stream)
		return;
	clear_source(&stream->in_source);
	clear_source(&stream->out_source);
	clear_source(&stream->end_source);
	close(stream->in_fd);
	if (stream->out_fd != stream->in_fd)
		close(stream->out_fd);
	g_string_free(stream->queue, TRUE);
	g_free(stream->why);
	g_main_context_unref(stream->context);
	g_free(stream);
}
