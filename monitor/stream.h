/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A client's byte stream in the main loop. It reads the client's input, queues output that cannot
 * be written yet, and never blocks. A client that does not read its answers is disconnected when
 * more than PR_STREAM_QUEUE_MAX bytes are queued for it. All calls and callbacks are on the thread
 * of the main context.
 */
#pragma once

#include <glib.h>

#define PR_STREAM_QUEUE_MAX (1024 * 1024) /* bytes */

typedef struct PrStream PrStream;

typedef void (*PrStreamInput)(const char *data, gsize len, void *opaque);
/* The stream has ended; reason NULL: its input ended, or the peer hung up. Called once, from the
 * main loop and never from inside pr_stream_write(). The callback may free the stream. */
typedef void (*PrStreamClosed)(const char *reason, void *opaque);

/* Takes the descriptors, which must be non-blocking. Both may be the same one. */
PrStream *pr_stream_new(GMainContext *context, int in_fd, int out_fd, PrStreamInput input,
			PrStreamClosed closed, void *opaque);
void pr_stream_write(PrStream *stream, const char *data, gsize len);
/* Pauses and resumes reading. Unread input stays in the kernel. */
void pr_stream_set_reading(PrStream *stream, gboolean on);
void pr_stream_free(PrStream *stream);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrStream, pr_stream_free)
