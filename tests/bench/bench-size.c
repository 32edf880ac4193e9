/* SPDX-License-Identifier: GPL-2.0-or-later */
/* bench-size [bitmaps|holes|migrations]…: the costs that grow with the guest's size, for each
 * GiB. */
#include <malloc.h>
#include <string.h>

#include "tests/bench/size.h"

static int gib = 1024, max_mib = 8192;

static const GOptionEntry options[] = {
	{"gib", 'g', 0, G_OPTION_ARG_INT, &gib,
	 "guest size for the bitmaps (1 to 4096; default 1024)", "GIB"},
	{"max", 'm', 0, G_OPTION_ARG_INT, &max_mib, "largest guest that is moved (default 8192)",
	 "MIB"},
	{NULL},
};

static gboolean wanted(char **arguments, const char *part)
{
	return !arguments[1] || g_strv_contains((const char *const *)arguments + 1, part);
}

static void check_arguments(const Bench *bench, char **arguments)
{
	static const char *const parts[] = {"bitmaps", "holes", "migrations", NULL};

	for (guint i = 1; arguments[i]; i++)
		if (!g_strv_contains(parts, arguments[i]))
			bench_usage_error(bench,
					  "'%s': not one of bitmaps, holes, migrations; see --help",
					  arguments[i]);
	if (gib < 1 || gib > 4096)
		bench_usage_error(bench, "--gib %d: 1 to 4096", gib);
}

int main(int argc, char **argv)
{
	Bench bench;

	/* free() returns large blocks to the kernel, so that measured memory is memory in use. */
	mallopt(M_MMAP_THRESHOLD, 128 * 1024);
	bench_begin(&bench, "bench-size",
		    "[bitmaps|holes|migrations]… - costs that grow with the guest's size", options,
		    &argc, &argv);
	check_arguments(&bench, argv);
	if (wanted(argv, "holes"))
		size_holes(&bench);
	if (wanted(argv, "migrations"))
		size_migrations(&bench, bench.quick ? 256 : (guint)max_mib);
	if (wanted(argv, "bitmaps"))
		size_bitmaps(&bench, bench.quick ? 16 : (guint)gib);
	bench_end(&bench);
	return 0;
}
