/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The messages of a peer over one connection, generated from an input, which is a list of
 * operations. Most operations are a well-formed message, so that a conversation gets far; their
 * bytes set its fields. Others are arbitrary bytes. The connection ends with SCRIPT_END or with the
 * input.
 */
#pragma once

#include "tests/fuzz/fuzz.h"
#include "transport/wire/wire.h"

typedef enum ScriptOp {
	SCRIPT_END,
	SCRIPT_HELLO,	  /* resume, epoch, flaws */
	SCRIPT_HELLO_ACK, /* status */
	SCRIPT_ADVISE,	  /* flaws */
	SCRIPT_PING,	  /* value */
	SCRIPT_GRANT,	  /* block, page, pages */
	SCRIPT_ZERO,	  /* block, page, pages */
	SCRIPT_LISTEN,
	SCRIPT_PACKAGED, /* flags */
	SCRIPT_RUN,
	SCRIPT_ASK_BITMAP, /* block */
	SCRIPT_RESUME,
	SCRIPT_ACTIVATE,    /* epoch, resume */
	SCRIPT_PONG,	    /* value */
	SCRIPT_BITMAP,	    /* block, pattern */
	SCRIPT_BITMAP_ZSTD, /* block, pattern */
	SCRIPT_RESUME_ACK,  /* value */
	SCRIPT_PROGRESS,
	SCRIPT_SHUT,
	SCRIPT_PROBED,
	SCRIPT_ACTIVATED, /* status */
	SCRIPT_LOST,	  /* epoch, held */
	SCRIPT_REASON,	  /* kind */
	SCRIPT_HEARTBEAT,
	SCRIPT_LANE,  /* flaws */
	SCRIPT_TYPED, /* type (2), length, body */
	SCRIPT_RAW,   /* length, bytes */
	/* These are not messages. They take place when the engine has read all messages before
	 * them. */
	SCRIPT_CONNECT, /* the next connection of the input is made */
	SCRIPT_COMMAND, /* what: a command of the operator */
	SCRIPT_N_OPS
} ScriptOp;

#define SCRIPT_UUID   "0123456789abcde"
#define SCRIPT_SECRET "fedcba987654321"

typedef struct ScriptSegment {
	GByteArray *bytes;
	ScriptOp then; /* SCRIPT_END, SCRIPT_CONNECT or SCRIPT_COMMAND */
	uint8_t what;
} ScriptSegment;

/* Reads the segments (ScriptSegment) of one connection; the last one has SCRIPT_END. blocks: the
 * RAM blocks of this side. */
GArray *script_read(FuzzInput *input, const PrWireBlock *blocks, guint n_blocks);
