/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Cuts a stream of bytes into JSON messages: the monitor's from its clients, and a QEMU's from its
 * QMP socket.
 *
 * Pure: no I/O. The framer refuses what the JSON parser must never see: messages that are too long,
 * too deep (the parser recurses), or not UTF-8.
 */
#pragma once

#include <glib.h>

#define PR_FRAME_MAX	    (1024 * 1024) /* bytes of a message of a client */
#define PR_FRAME_OBJECT_MAX (16u << 20)	  /* bytes of a message of a QEMU */
#define PR_FRAME_DEPTH	    64		  /* brackets within brackets */

typedef enum PrFramerMode {
	/* For clients of the monitor. Programs send JSON objects without a newline behind them,
	 * people send lines. So a message ends where its outermost bracket closes, or at a newline,
	 * whichever comes first. A newline within brackets is a fault, and the next line starts
	 * afresh: a client that sent half a message gets an error at once, and its next command
	 * works. An integer beyond 64 bits is a fault, as the parser wraps it. */
	PR_FRAMER_LINES,
	/* For a QEMU's monitor, which prints objects on one line or on several. Anything else is a
	 * fault, behind which the framer ignores all bytes. */
	PR_FRAMER_OBJECTS,
} PrFramerMode;

/* One message, NUL-terminated; or a text that describes a fault, and no message. */
typedef void (*PrFrameSink)(const char *message, gsize len, const char *fault, void *opaque);

/* One thread uses a framer, that of the connection. */
typedef struct PrFramer {
	PrFramerMode mode;
	GString *message;
	guint depth, digits;
	gboolean busy;	  /* within a message */
	gboolean string;  /* within a string */
	gboolean escape;  /* behind a backslash */
	gboolean discard; /* the fault of this message was reported: ignore the rest of it */
} PrFramer;

void pr_framer_init(PrFramer *framer, PrFramerMode mode);
void pr_framer_clear(PrFramer *framer);
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(PrFramer, pr_framer_clear)
void pr_framer_feed(PrFramer *framer, const char *data, gsize len, PrFrameSink sink, void *opaque);
