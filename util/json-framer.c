/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "util/json-framer.h"

#define INT64_DIGITS 19

void pr_framer_init(PrFramer *framer)
{
	*framer = (PrFramer){.message = g_string_new(NULL)};
}

void pr_framer_clear(PrFramer *framer)
{
	if (framer->message)
		g_string_free(g_steal_pointer(&framer->message), TRUE);
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

void pr_framer_feed(PrFramer *framer, const char *data, gsize len, PrFrameSink sink, void *opaque)
{
	for (gsize i = 0; i < len; i++) {
		gboolean whole;

		if (data[i] == '\n' && framer->busy) {
			finish(framer, sink, opaque);
			continue;
		}
		if (!framer->busy && g_ascii_isspace(data[i]))
			continue;
		framer->busy = TRUE;
		whole = scan(framer, data[i]);
		if (!framer->discard)
			g_string_append_c(framer->message, data[i]);
		if (framer->message->len > PR_FRAME_MAX)
			fault(framer, "the message is longer than 1 MiB", sink, opaque);
		else if (framer->depth > PR_FRAME_DEPTH)
			fault(framer, "the message has brackets within brackets over 64 deep", sink,
			      opaque);
		else if (framer->digits > INT64_DIGITS)
			fault(framer, "the message has a number beyond 64 bits", sink, opaque);
		if (whole)
			finish(framer, sink, opaque);
	}
}
