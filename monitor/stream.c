/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "monitor/stream.h"

#include <errno.h>
#include <glib-unix.h>
#include <unistd.h>

/* Bytes read for one client before the next client's turn: a few commands. So a client that sends
 * many commands at once does not delay the answers of the others. */
#define CHUNK_BYTES 256

/* Owned by the thread of the main context. */
struct PrStream {
	GMainContext *context;
	int in_fd, out_fd;
	PrStreamInput input;
	PrStreamClosed closed;
	void *opaque;
	GString *queue;	     /* not yet written */
	GSource *in_source;  /* NULL: reading is paused, or the stream has ended */
	GSource *out_source; /* NULL: nothing to write */
	GSource *end_source; /* not NULL: closed() is due, or was called */
	char *reason;
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

	stream->closed(stream->reason, stream->opaque);
	return G_SOURCE_REMOVE;
}

/* Takes the reason. Only the first call has an effect. */
static void end_stream(PrStream *stream, char *reason)
{
	if (stream->end_source) {
		g_free(reason);
		return;
	}
	clear_source(&stream->in_source);
	clear_source(&stream->out_source);
	stream->reason = reason;
	stream->end_source = g_idle_source_new();
	g_source_set_priority(stream->end_source, G_PRIORITY_DEFAULT);
	g_source_set_callback(stream->end_source, on_end, stream, NULL);
	g_source_attach(stream->end_source, stream->context);
}

/* A peer that hangs up before it has read all its answers is normal, and not an error. */
static void end_by_errno(PrStream *stream)
{
	gboolean hung_up = errno == EPIPE || errno == ECONNRESET;

	end_stream(stream, hung_up ? NULL : g_strdup(g_strerror(errno)));
}

static gboolean on_readable(gint fd, GIOCondition condition, gpointer opaque)
{
	PrStream *stream = opaque;
	char data[CHUNK_BYTES];
	ssize_t n = read(fd, data, sizeof(data));

	if (n > 0)
		stream->input(data, n, stream->opaque);
	else if (n == 0)
		end_stream(stream, NULL);
	else if (errno != EAGAIN && errno != EINTR)
		end_by_errno(stream);
	return G_SOURCE_CONTINUE;
}

/* Returns FALSE when the stream has ended. */
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

static GSource *add_fd_source(PrStream *stream, int fd, GIOCondition condition,
			      GUnixFDSourceFunc func)
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
	pr_stream_set_reading(stream, TRUE);
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
		stream->out_source = add_fd_source(stream, stream->out_fd, G_IO_OUT, on_writable);
}

void pr_stream_set_reading(PrStream *stream, gboolean on)
{
	if (!on)
		clear_source(&stream->in_source);
	else if (!stream->in_source && !stream->end_source)
		stream->in_source = add_fd_source(stream, stream->in_fd, G_IO_IN, on_readable);
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
	g_free(stream->reason);
	g_main_context_unref(stream->context);
	g_free(stream);
}
