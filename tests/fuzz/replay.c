/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Takes libFuzzer's place: runs a target over corpora (*.inputs, see corpus.py) and single
 * inputs. */
#include <stdio.h>
#include <string.h>

#include "tests/fuzz/fuzz.h"

static gboolean run_input(const char *name, const void *data, gsize size)
{
	/* The memory ends with the input, so that AddressSanitizer sees a read beyond it. */
	g_autofree uint8_t *exact = g_memdup2(data, size);

	if (LLVMFuzzerTestOneInput(exact, size) == 0)
		return TRUE;
	fprintf(stderr, "%s: the target has rejected it\n", name);
	return FALSE;
}

/* A line of a corpus: the name of an input, a space, and its percent-encoded bytes. */
static gboolean run_line(const char *line)
{
	const char *space = strchr(line, ' ');
	g_autofree char *name = space ? g_strndup(line, space - line) : NULL;
	g_autoptr(GBytes) bytes = space ? g_uri_unescape_bytes(space + 1, -1, NULL, NULL) : NULL;

	if (!bytes) {
		fprintf(stderr, "not a line of a corpus: %s\n", line);
		return FALSE;
	}
	return run_input(name, g_bytes_get_data(bytes, NULL), g_bytes_get_size(bytes));
}

/* Returns the number of inputs; -1: one could not be run. */
static int run_corpus(const char *text)
{
	g_auto(GStrv) lines = g_strsplit(text, "\n", -1);
	int n = 0;

	for (char **line = lines; *line; line++) {
		if (!**line || **line == '#')
			continue;
		if (!run_line(*line))
			return -1;
		n++;
	}
	return n;
}

static int run_file(const char *path)
{
	g_autoptr(GError) error = NULL;
	g_autofree char *text = NULL;
	gsize size;

	if (!g_file_get_contents(path, &text, &size, &error)) {
		fprintf(stderr, "%s\n", error->message);
		return -1;
	}
	if (g_str_has_suffix(path, ".inputs"))
		return run_corpus(text);
	return run_input(path, text, size) ? 1 : -1;
}

int main(int argc, char **argv)
{
	int all = 0;

	LLVMFuzzerInitialize(&argc, &argv);
	for (int i = 1; i < argc; i++) {
		int n = run_file(argv[i]);

		if (n < 0)
			return 1;
		all += n;
	}
	printf("%d inputs\n", all);
	if (all)
		return 0;
	fprintf(stderr, "no input to run; name corpora (*.inputs) or single inputs\n");
	return 1;
}
