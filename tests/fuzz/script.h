/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What a peer sends over one connection, made of an input: a list of operations. Most of them are one well-formed
 * message with what the operation's bytes say, so that a conversation gets far; some are whatever
 * bytes. The connection ends with SCRIPT_END or with the input.
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
	/* What happens here when all before it has been read. */
	SCRIPT_KNOCK, /* the next connection of the input comes in */
	SCRIPT_HUMAN, /* what: a human gives a command */
	SCRIPT_N_OPS
} ScriptOp;

#define SCRIPT_UUID   "0123456789abcde"
#define SCRIPT_SECRET "fedcba987654321"

typedef struct ScriptSegment {
	GByteArray *bytes;
	ScriptOp then; /* SCRIPT_END, SCRIPT_KNOCK or SCRIPT_HUMAN */
	uint8_t what;
} ScriptSegment;

/* The segments of one connection (ScriptSegment), the last one with SCRIPT_END. blocks: of this side. */
GArray *script_read(FuzzInput *input, const PrWireBlock *blocks, guint n_blocks);
