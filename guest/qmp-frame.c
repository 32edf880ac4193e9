/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "guest/qmp-frame.h"

void pr_qmp_frame_init(PrQmpFrame *frame)
{
	*frame = (PrQmpFrame){.text = g_string_new(NULL)};
}

void pr_qmp_frame_clear(PrQmpFrame *frame)
{
	g_string_free(frame->text, TRUE);
	frame->text = NULL;
}

void pr_qmp_frame_next(PrQmpFrame *frame)
{
	g_string_truncate(frame->text, 0);
}

static void in_string(PrQmpFrame *frame, char byte)
{
	if (frame->escaped)
		frame->escaped = FALSE;
	else if (byte == '\\')
		frame->escaped = TRUE;
	else if (byte == '"')
		frame->in_string = FALSE;
}

PrQmpFrameResult pr_qmp_frame_push(PrQmpFrame *frame, char byte)
{
	if (frame->depth == 0 && g_ascii_isspace(byte))
		return PR_QMP_FRAME_MORE;
	if ((frame->depth == 0 && byte != '{') || byte == '\0' ||
	    frame->text->len == PR_QMP_OBJECT_MAX)
		return PR_QMP_FRAME_GARBAGE;
	g_string_append_c(frame->text, byte);
	if (frame->in_string)
		in_string(frame, byte);
	else if (byte == '"')
		frame->in_string = TRUE;
	else if ((byte == '{' || byte == '[') && ++frame->depth > PR_QMP_DEPTH_MAX)
		return PR_QMP_FRAME_GARBAGE;
	else if ((byte == '}' || byte == ']') && --frame->depth == 0)
		return PR_QMP_FRAME_OBJECT;
	return PR_QMP_FRAME_MORE;
}
