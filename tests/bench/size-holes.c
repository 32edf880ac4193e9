/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The source's scan for holes while its guest is stopped: lseek() with SEEK_DATA and SEEK_HOLE. */
#include <sys/mman.h>
#include <unistd.h>

#include "migration/memory/ram.h"
#include "tests/bench/raw-memory.h"
#include "tests/bench/size.h"

#define PAGE 4096
#define KIB  1024ull
#define MIB  (1024 * KIB)
#define GIB  (1024 * MIB)

static const struct {
	const char *name;
	uint64_t size, quick_size;
	uint64_t run, every; /* the first `run` bytes of each `every` bytes are data; 0: none */
} cases[] = {
	{"all data", 2 * GIB, 64 * MIB, 2 * MIB, 2 * MIB},
	{"every other 2 MiB", 4 * GIB, 64 * MIB, 2 * MIB, 4 * MIB},
	{"every other 4 KiB", 1 * GIB, 64 * MIB, 4 * KIB, 8 * KIB},
	{"4 KiB of each 16 MiB", 1024 * GIB, 16 * GIB, 4 * KIB, 16 * MIB},
	{"nothing", 1024 * GIB, 16 * GIB, 0, 0},
};

/* Writes the data as a guest does: memory that was only allocated counts as a hole. */
static int make_memfd(uint64_t size, uint64_t run, uint64_t every)
{
	int fd = memfd_create("holes", MFD_CLOEXEC);

	if (fd < 0 || ftruncate(fd, (off_t)size) < 0)
		g_error("a memfd of %" G_GUINT64_FORMAT " bytes failed", size);
	uint8_t *map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
	if (map == MAP_FAILED)
		g_error("mmap of %" G_GUINT64_FORMAT " bytes failed", size);
	for (uint64_t at = 0; run > 0 && at < size; at += every)
		for (uint64_t page = at; page < at + run; page += PAGE)
			map[page] = 1;
	munmap(map, size);
	return fd;
}

/* Scans like the engine in the switch-over, but sends nothing. Returns ns. */
static uint64_t scan(const PrRamBlock *block, guint *ret_extents)
{
	uint64_t began = raw_now_ns();
	PrExtent data = {0};

	*ret_extents = 0;
	while (pr_ram_next_data(block, data.end, block->size, &data))
		++*ret_extents;
	return raw_now_ns() - began;
}

static void measure(const Bench *bench, guint i)
{
	uint64_t size = bench->quick ? cases[i].quick_size : cases[i].size;
	PrRamBlock block = {.size = size,
			    .page_size = PAGE,
			    .memfd = make_memfd(size, cases[i].run, cases[i].every)};
	double gib = (double)size / (double)GIB;
	Series ms = {0};
	guint extents = 0;

	for (int round = 0; round < bench->rounds; round++)
		series_add(&ms, (double)scan(&block, &extents) / 1e6);
	close(block.memfd);
	double median = series_median(&ms);
	bench_say(bench, "  %-22s %8.2f GiB %9u %10.3f ms %10.4f ms\n", cases[i].name, gib, extents,
		  median, median / gib);
	bench_json_object(bench, NULL);
	bench_json_text(bench, "memory", cases[i].name);
	bench_json_number(bench, "gib", gib);
	bench_json_number(bench, "extents", extents);
	bench_json_number(bench, "ms", median);
	bench_json_number(bench, "ms_per_gib", median / gib);
	bench_json_end_object(bench);
}

void size_holes(const Bench *bench)
{
	bench_say(bench,
		  "\nThe source's scan for holes while its guest is stopped; medians of %d\n"
		  "  %-22s %12s %9s %13s %13s\n",
		  bench->rounds, "memory that holds data", "size", "extents", "scan", "per GiB");
	bench_json_array(bench, "holes");
	for (guint i = 0; i < G_N_ELEMENTS(cases); i++)
		measure(bench, i);
	bench_json_end_array(bench);
}
