/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "tests/fuzz/fuzz.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define NEXT_FDS 8

static gboolean verbose; /* set once, before the first input */

/* Critical messages are bugs, in Postroad or in its use of a library. Other messages are about the
 * input; they are shown if G_MESSAGES_DEBUG is set. */
static GLogWriterOutput write_log(GLogLevelFlags level, const GLogField *fields, gsize n,
				  gpointer opaque)
{
	gboolean bug = level & (G_LOG_LEVEL_ERROR | G_LOG_LEVEL_CRITICAL);

	if (bug || verbose)
		g_log_writer_standard_streams(level, fields, n, opaque);
	if (bug)
		abort();
	return G_LOG_WRITER_HANDLED;
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	verbose = g_getenv("G_MESSAGES_DEBUG") != NULL;
	g_log_set_writer_func(write_log, NULL, NULL);
	return 0;
}

uint8_t fuzz_u8(FuzzInput *input)
{
	gsize n;
	const uint8_t *at = fuzz_take(input, 1, &n);

	return n ? *at : 0;
}

uint16_t fuzz_u16(FuzzInput *input)
{
	uint16_t high = fuzz_u8(input);

	return high << 8 | fuzz_u8(input);
}

const uint8_t *fuzz_take(FuzzInput *input, gsize n, gsize *ret_n)
{
	const uint8_t *at = input->at;

	*ret_n = MIN(n, input->left);
	input->left -= *ret_n;
	if (*ret_n)
		input->at += *ret_n;
	return at;
}

char *fuzz_line(FuzzInput *input)
{
	const uint8_t *end, *line;
	gsize n;

	if (!input->left)
		return NULL;
	end = memchr(input->at, '\n', input->left);
	line = fuzz_take(input, end ? (gsize)(end - input->at) : input->left, &n);
	fuzz_u8(input);
	return g_strndup((const char *)line, n);
}

void fuzz_outcome(gboolean ok, const GError *error)
{
	g_assert(ok == !error);
	if (error)
		g_assert(*error->message);
}

void fuzz_clean_outcome(gboolean ok, const GError *error)
{
	fuzz_outcome(ok, error);
	g_assert(!error || g_utf8_validate(error->message, -1, NULL));
}

/* The sum of the lowest free descriptors. An open one would change it. */
int fuzz_next_fd(void)
{
	int fds[NEXT_FDS], sum = 0;

	for (guint i = 0; i < NEXT_FDS; i++) {
		fds[i] = dup(STDERR_FILENO);
		g_assert(fds[i] >= 0);
		sum += fds[i];
	}
	for (guint i = 0; i < NEXT_FDS; i++)
		close(fds[i]);
	return sum;
}
