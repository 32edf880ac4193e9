/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Cuts a stream of bytes into JSON objects by counting braces, so that it does not matter whether a
 * monitor prints them on one line or prettily. No I/O.
 */
#pragma once

#include <glib.h>

#define PR_QMP_OBJECT_MAX (16u << 20) /* bytes */
#define PR_QMP_DEPTH_MAX  64

typedef struct PrQmpFrame {
	GString *text; /* of the object under way */
	guint depth;
	gboolean in_string;
	gboolean escaped;
} PrQmpFrame;

typedef enum PrQmpFrameResult {
	PR_QMP_FRAME_MORE,    /* nothing complete yet */
	PR_QMP_FRAME_OBJECT,  /* frame->text is an object; take it, then pr_qmp_frame_next() */
	PR_QMP_FRAME_GARBAGE, /* outside of an object, too long or too deep */
} PrQmpFrameResult;

void pr_qmp_frame_init(PrQmpFrame *frame);
void pr_qmp_frame_clear(PrQmpFrame *frame);
PrQmpFrameResult pr_qmp_frame_push(PrQmpFrame *frame, char byte);
void pr_qmp_frame_next(PrQmpFrame *frame);
