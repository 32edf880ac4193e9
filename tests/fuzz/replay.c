/* SPDX-License-Identifier: GPL-2.0-or-later */
/* In the place of libFuzzer: runs a target over the files, and the files in the directories, that are named. */
#include <stdio.h>
#include <string.h>

#include "tests/fuzz/fuzz.h"

static gboolean run_file(const char *path)
{
	g_autoptr(GError) error = NULL;
	g_autofree uint8_t *exact = NULL;
	g_autofree char *text = NULL;
	gsize size;

	if (!g_file_get_contents(path, &text, &size, &error)) {
		fprintf(stderr, "%s\n", error->message);
		return FALSE;
	}
	/* Memory that ends with the input, so that AddressSanitizer sees a read beyond it. */
	exact = g_memdup2(text, size);
	if (LLVMFuzzerTestOneInput(exact, size) == 0)
		return TRUE;
	fprintf(stderr, "%s: the target has refused it\n", path);
	return FALSE;
}

/* How many files there were; -1: one could not be run. */
static int run_all(const char *path)
{
	g_autoptr(GDir) folder = g_dir_open(path, 0, NULL);
	const char *name;
	int n = 0;

	if (!folder)
		return run_file(path) ? 1 : -1;
	while ((name = g_dir_read_name(folder))) {
		g_autofree char *file = g_build_filename(path, name, NULL);

		if (!run_file(file))
			return -1;
		n++;
	}
	return n;
}

int main(int argc, char **argv)
{
	int all = 0;

	LLVMFuzzerInitialize(&argc, &argv);
	for (int i = 1; i < argc; i++) {
		int n = run_all(argv[i]);

		if (n < 0)
			return 1;
		all += n;
	}
	printf("%d inputs\n", all);
	if (all)
		return 0;
	fprintf(stderr, "there is no input to run; name files or directories\n");
	return 1;
}
