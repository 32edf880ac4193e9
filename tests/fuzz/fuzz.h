/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the fuzz targets share. A target is one function, LLVMFuzzerTestOneInput(): libFuzzer calls it with
 * inputs of its own making, replay.c with those of the corpus. It aborts when something is wrong.
 *
 * The same input does the same each time: no threads, no clock, nothing that outlives the call.
 */
#pragma once

#include <glib.h>
#include <stdint.h>

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* What is left of an input. Whoever takes more than there is gets what there is, or zeros. */
typedef struct FuzzInput {
	const uint8_t *at;
	gsize left;
} FuzzInput;

uint8_t fuzz_u8(FuzzInput *input);
uint16_t fuzz_u16(FuzzInput *input); /* big endian */
/* *ret_n: at most n. The bytes stay the input's. */
const uint8_t *fuzz_take(FuzzInput *input, gsize n, gsize *ret_n);
/* The rest of the line, without its newline; the caller's to g_free(). NULL: the input is at its end. */
char *fuzz_line(FuzzInput *input);

/* A function that can fail says so in both ways, and in words. */
void fuzz_outcome(gboolean ok, const GError *error);
/* The same where the words may hold what a peer has said: they are still UTF-8. */
void fuzz_clean_outcome(gboolean ok, const GError *error);

/* To see at the end that no descriptor was left open: the same number as before. */
int fuzz_next_fd(void);
