/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "util/json-framer.h"

#define INT64_DIGITS 19

void pr_framer_init(PrFramer *framer, PrFramerMode mode)
{
	*framer = (PrFramer){.mode = mode, .message = g_string_new(NULL)};
}

void pr_framer_clear(PrFramer *framer)
{
	if (framer->message)
		g_string_free(g_steal_pointer(&framer->message), TRUE);
}

/* A stream of objects has no place to start afresh. */
static gboolean is_broken(const PrFramer *framer)
{
	return framer->discard && framer->mode == PR_FRAMER_OBJECTS;
}

static void reset(PrFramer *framer)
{
	g_string_truncate(framer->message, 0);
	framer->depth = 0;
	framer->digits = 0;
	framer->busy = framer->string = framer->escape = framer->discard = FALSE;
}

static void fault(PrFramer *framer, const char *what, PrFrameSink sink, void *opaque)
{
	if (!framer->discard)
		sink(NULL, 0, what, opaque);
	framer->discard = TRUE;
}

static void finish(PrFramer *framer, PrFrameSink sink, void *opaque)
{
	const GString *message = framer->message;

	if (framer->depth || framer->string)
		fault(framer, "the line ends in the middle of a message", sink, opaque);
	else if (!g_utf8_validate_len(message->str, message->len, NULL))
		fault(framer, "the message is not UTF-8", sink, opaque);
	else if (!framer->discard)
		sink(message->str, message->len, NULL, opaque);
	if (!is_broken(framer))
		reset(framer);
}

/* Returns TRUE when this character closes the outermost bracket. */
static gboolean scan(PrFramer *framer, char c)
{
	if (framer->string) {
		if (framer->escape)
			framer->escape = FALSE;
		else if (c == '\\')
			framer->escape = TRUE;
		else if (c == '"')
			framer->string = FALSE;
		return FALSE;
	}
	framer->digits = g_ascii_isdigit(c) ? framer->digits + 1 : 0;
	if (c == '"')
		framer->string = TRUE;
	else if (c == '{' || c == '[')
		framer->depth++;
	else if ((c == '}' || c == ']') && framer->depth)
		return --framer->depth == 0;
	return FALSE;
}

/* NULL: the message is within the limits so far. */
static const char *limit_exceeded(const PrFramer *framer)
{
	gboolean objects = framer->mode == PR_FRAMER_OBJECTS;

	if (objects && framer->message->len > PR_FRAME_OBJECT_MAX)
		return "the message is longer than 16 MiB";
	if (!objects && framer->message->len > PR_FRAME_MAX)
		return "the message is longer than 1 MiB";
	if (framer->depth > PR_FRAME_DEPTH)
		return "the message has brackets within brackets over 64 deep";
	if (!objects && framer->digits > INT64_DIGITS)
		return "the message has a number beyond 64 bits";
	return NULL;
}

static void push(PrFramer *framer, char c, PrFrameSink sink, void *opaque)
{
	gboolean objects = framer->mode == PR_FRAMER_OBJECTS;
	const char *exceeded;
	gboolean whole;

	if (c == '\n' && framer->busy && !objects) {
		finish(framer, sink, opaque);
		return;
	}
	if (!framer->busy && g_ascii_isspace(c))
		return;
	if (!framer->busy && objects && c != '{') {
		fault(framer, "there is text outside of a JSON object", sink, opaque);
		return;
	}
	framer->busy = TRUE;
	whole = scan(framer, c);
	if (!framer->discard)
		g_string_append_c(framer->message, c);
	exceeded = limit_exceeded(framer);
	if (exceeded)
		fault(framer, exceeded, sink, opaque);
	if (whole)
		finish(framer, sink, opaque);
}

void pr_framer_feed(PrFramer *framer, const char *data, gsize len, PrFrameSink sink, void *opaque)
{
	for (gsize i = 0; i < len && !is_broken(framer); i++)
		push(framer, data[i], sink, opaque);
}
