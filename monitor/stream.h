/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A client's byte stream in the main loop: reads what comes, queues what cannot be written yet, and
 * never blocks. A client that does not read its answers is dropped when PR_STREAM_QUEUE_MAX bytes
 * wait for it. All calls and callbacks are on the thread of the main context.
 */
#pragma once

#include <glib.h>

#define PR_STREAM_QUEUE_MAX (1024 * 1024) /* bytes */

typedef struct PrStream PrStream;

typedef void (*PrStreamInput)(const char *data, gsize len, void *opaque);
/* The stream has ended: why, or NULL at the end of its input. Called once, from the main loop and never from
 * inside pr_stream_write(); the stream may be freed in it. */
typedef void (*PrStreamClosed)(const char *why, void *opaque);

/* Takes the descriptors, which must be non-blocking (they may be the same one). */
PrStream *pr_stream_new(GMainContext *context, int in_fd, int out_fd, PrStreamInput input,
			PrStreamClosed closed, void *opaque);
void pr_stream_write(PrStream *stream, const char *data, gsize len);
/* Stops and restarts reading; what was not read waits in the kernel. */
void pr_stream_hold(PrStream *stream, gboolean hold);
void pr_stream_free(PrStream *stream);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrStream, pr_stream_free)
