/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Shared by the fuzz targets. A target is one function, LLVMFuzzerTestOneInput(). libFuzzer calls
 * it with generated inputs, replay.c with those of the corpus. It aborts when a check fails.
 *
 * A target is deterministic: it has no threads, reads no clock, and keeps no state from call to
 * call.
 */
#pragma once

#include <glib.h>
#include <stdint.h>

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* The unread part of an input. A read beyond its end returns fewer bytes, or zeros. */
typedef struct FuzzInput {
	const uint8_t *at;
	gsize left;
} FuzzInput;

uint8_t fuzz_u8(FuzzInput *input);
uint16_t fuzz_u16(FuzzInput *input); /* big endian */
/* *ret_n: the number of bytes, at most n. The input owns them. */
const uint8_t *fuzz_take(FuzzInput *input, gsize n, gsize *ret_n);
/* Returns the rest of the line without its newline; free it with g_free(). NULL: the end of the
 * input. */
char *fuzz_line(FuzzInput *input);

/* Checks that a function has failed in both ways, result and error with a text, or in neither. */
void fuzz_outcome(gboolean ok, const GError *error);
/* The same, and the error is UTF-8 even if it quotes a peer. */
void fuzz_clean_outcome(gboolean ok, const GError *error);

/* Returns the same number before and after a call that left no descriptor open. */
int fuzz_next_fd(void);
