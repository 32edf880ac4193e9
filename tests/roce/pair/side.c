/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The beginning and the end of a side, its memory, and what it holds of the host's resources. */
#include "tests/roce/pair/side.h"

#include "transport/registry.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static gboolean map_memory(Side *side, GError **error)
{
	/* As in the engine: the source maps the guest's memory read-only. */
	int prot = side->source ? PROT_READ : PROT_READ | PROT_WRITE;

	for (guint i = 0; i < BLOCKS; i++) {
		int fd = memfd_create("rdma-pair", MFD_CLOEXEC);
		void *map;

		if (fd < 0)
			return fail(error, g_strerror(errno));
		side->regions[i].memfd = fd;
		if (ftruncate(fd, BLOCK_BYTES) < 0)
			return fail(error, g_strerror(errno));
		map = mmap(NULL, BLOCK_BYTES, prot, MAP_SHARED | MAP_NORESERVE, fd, 0);
		if (map == MAP_FAILED)
			return fail(error, g_strerror(errno));
		side->regions[i] = (PrRegion){map, BLOCK_BYTES, .memfd = fd};
	}
	return TRUE;
}

static gboolean start_side(Side *side, const char *uri, GError **error)
{
	side->uri = pr_uri_parse(uri, !side->source, error);
	side->ops = side->uri ? pr_transport_find(side->uri->scheme, error) : NULL;
	if (!side->ops || !map_memory(side, error))
		return FALSE;
	if (side->source)
		return TRUE;
	side->listener = side->ops->listen(side->uri, error);
	return side->listener != NULL;
}

/* source|destination URI */
static gboolean begin(Side *side, char **words, GString *ret, GError **error)
{
	if (side->uri)
		return fail(error, "a side has begun already");
	side->source = strcmp(words[1], "source") == 0;
	for (guint i = 0; i < BLOCKS; i++)
		side->regions[i].memfd = -1;
	if (start_side(side, words[2], error))
		return TRUE;
	side_end(side);
	return FALSE;
}

void side_end(Side *side)
{
	attack_free_page(&side->open_page);
	g_clear_pointer(&side->path, pr_data_path_destroy);
	g_clear_pointer(&side->listener, pr_data_listener_close);
	if (side->uri)
		for (guint i = 0; i < BLOCKS; i++) {
			if (side->regions[i].addr)
				munmap(side->regions[i].addr, BLOCK_BYTES);
			if (side->regions[i].memfd >= 0)
				close(side->regions[i].memfd);
		}
	g_clear_pointer(&side->uri, pr_uri_free);
	g_free(side->reason);
	*side = (Side){0};
}

static gboolean end(Side *side, char **words, GString *ret, GError **error)
{
	side_end(side);
	return TRUE;
}

uint64_t *side_address(Side *side, guint block, uint64_t offset)
{
	return (uint64_t *)(gpointer)((uint8_t *)side->regions[block].addr + offset);
}

static uint64_t word_at(guint block, uint64_t offset, uint64_t seed)
{
	return (offset + 1) * 0x9e3779b97f4a7c15ull ^ (uint64_t)block << 56 ^ seed << 32;
}

/* BLOCK OFFSET LENGTH SEED */
static gboolean fill(Side *side, char **words, GString *ret, GError **error)
{
	guint block = parse_number(words[1]);
	uint64_t start = parse_number(words[2]), length = parse_number(words[3]);
	uint64_t seed = parse_number(words[4]);
	/* A second mapping stands for the guest's own one. */
	uint8_t *map = mmap(NULL, BLOCK_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED,
			    side->regions[block].memfd, 0);

	if (map == MAP_FAILED)
		return fail(error, g_strerror(errno));
	for (uint64_t i = start; i < start + length; i += sizeof(uint64_t))
		*(uint64_t *)(gpointer)(map + i) = word_at(block, i, seed);
	munmap(map, BLOCK_BYTES);
	return TRUE;
}

/* BLOCK OFFSET LENGTH */
static gboolean punch(Side *side, char **words, GString *ret, GError **error)
{
	if (fallocate(side->regions[parse_number(words[1])].memfd,
		      FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)parse_number(words[2]),
		      (off_t)parse_number(words[3])) == 0)
		return TRUE;
	return fail(error, g_strerror(errno));
}

/* BLOCK OFFSET LENGTH: reads each page in the mapping that the path was given. */
static gboolean touch(Side *side, char **words, GString *ret, GError **error)
{
	uint64_t start = parse_number(words[2]), sum = 0;

	for (uint64_t i = start; i < start + parse_number(words[3]); i += 4096)
		sum += *side_address(side, parse_number(words[1]), i);
	g_string_printf(ret, "%" PRIu64, sum);
	return TRUE;
}

gboolean side_verify(Side *side, guint block, uint64_t start, uint64_t end, uint64_t seed,
		     GError **error)
{
	for (uint64_t i = start; i < end; i += sizeof(uint64_t))
		if (*side_address(side, block, i) != word_at(block, i, seed)) {
			g_set_error(error, G_IO_ERROR, G_IO_ERROR_FAILED,
				    "wrong bytes in block %u at %" PRIu64, block, i);
			return FALSE;
		}
	return TRUE;
}

/* BLOCK OFFSET LENGTH SEED: verifies this side's own memory, without any READ. */
static gboolean verify(Side *side, char **words, GString *ret, GError **error)
{
	uint64_t start = parse_number(words[2]);

	return side_verify(side, parse_number(words[1]), start, start + parse_number(words[3]),
			   parse_number(words[4]), error);
}

static guint count_entries(const char *path)
{
	g_autoptr(GDir) dir = g_dir_open(path, 0, NULL);
	guint n = 0;

	while (dir && g_dir_read_name(dir))
		n++;
	return n;
}

static uint64_t pinned_kib(void)
{
	g_autofree char *text = NULL;
	const char *line;

	if (!g_file_get_contents("/proc/self/status", &text, NULL, NULL))
		return 0;
	line = strstr(text, "VmPin:");
	return line ? g_ascii_strtoull(line + strlen("VmPin:"), NULL, 10) : 0;
}

/* Answers: descriptors, threads, pinned KiB, and with a side the KiB in each block's memfd. */
static gboolean resources(Side *side, char **words, GString *ret, GError **error)
{
	g_string_printf(ret, "%u %u %" PRIu64, count_entries("/proc/self/fd"),
			count_entries("/proc/self/task"), pinned_kib());
	for (guint i = 0; side->uri && i < BLOCKS; i++) {
		struct stat st;

		if (fstat(side->regions[i].memfd, &st) < 0)
			return fail(error, g_strerror(errno));
		g_string_append_printf(ret, " %" PRIu64, (uint64_t)st.st_blocks / 2);
	}
	return TRUE;
}

const Command side_commands[] = {
	{"begin", 2, NEEDS_NOTHING, begin},
	{"end", 0, NEEDS_NOTHING, end},
	{"fill", 4, NEEDS_SIDE, fill},
	{"punch", 3, NEEDS_SIDE, punch},
	{"touch", 3, NEEDS_SIDE, touch},
	{"verify", 4, NEEDS_SIDE, verify},
	{"resources", 0, NEEDS_NOTHING, resources},
	{NULL},
};
