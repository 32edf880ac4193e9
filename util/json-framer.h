/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Cuts a QMP client's byte stream into messages. QEMU's own clients send JSON objects without a newline
 * behind them, people send lines: so a message ends where its outermost bracket closes, or at a
 * newline, whichever comes first. What ends at a newline with brackets open is a fault, and the
 * next line starts afresh: a client that sent half a message is told so at once and is not hung.
 *
 * Pure: no I/O. Messages are checked for what the JSON parser must never see: too long, too deep
 * (it recurses), integers beyond 64 bits (it wraps them), bytes that are not UTF-8.
 */
#pragma once

#include <glib.h>

#define PR_FRAME_MAX   (1024 * 1024) /* bytes of a message */
#define PR_FRAME_DEPTH 64	     /* brackets within brackets */

/* One message, NUL-terminated; or a fault in words, and no message. */
typedef void (*PrFrameSink)(const char *message, gsize len, const char *fault, void *opaque);

/* Owned by the client it belongs to. */
typedef struct PrFramer {
	GString *message;
	guint depth, digits;
	gboolean busy;	  /* within a message */
	gboolean string;  /* within a string */
	gboolean escape;  /* behind a backslash */
	gboolean discard; /* its fault was reported: skip the rest */
} PrFramer;

void pr_framer_init(PrFramer *framer);
void pr_framer_clear(PrFramer *framer);
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(PrFramer, pr_framer_clear)
void pr_framer_feed(PrFramer *framer, const char *data, gsize len, PrFrameSink sink, void *opaque);
