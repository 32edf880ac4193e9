/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Parses QEMU's HMP output about its RAM (guest/qemu-ram.c): `info ramblock`, `info mtree -f` and
 * `gpa2hva`, separated by lines of "--".
 */
#include <string.h>

#include "guest/agent-client.h"
#include "guest/qemu-ram.h"
#include "tests/fuzz/fuzz.h"

static void check_order(const GArray *ramblocks)
{
	for (guint i = 1; i < ramblocks->len; i++)
		g_assert(g_array_index(ramblocks, PrQemuRamBlock, i - 1).offset <=
			 g_array_index(ramblocks, PrQemuRamBlock, i).offset);
}

static void find_all(const GArray *ramblocks, const char *mtree)
{
	for (guint i = 0; i < ramblocks->len; i++) {
		uint64_t gpa, offset;

		pr_qemu_find_gpa(mtree, g_array_index(ramblocks, PrQemuRamBlock, i).name, &gpa,
				 &offset);
	}
}

static GArray *make_backends(void)
{
	GArray *backends = pr_qemu_backends_new();
	PrQemuBackend mem = {g_strdup("mem"), g_strdup("memory-backend-memfd"), 64 << 20, TRUE};
	PrQemuBackend file = {g_strdup("file"), g_strdup("memory-backend-file"), 64 << 20, TRUE};

	g_array_append_val(backends, mem);
	g_array_append_val(backends, file);
	return backends;
}

static void match(const GArray *ramblocks)
{
	g_autoptr(GArray) backends = make_backends();
	g_autoptr(GArray) regions = pr_guest_blocks_new();
	g_autoptr(GArray) matched = NULL;
	g_autoptr(GError) error = NULL;

	for (guint i = 0; i < ramblocks->len; i++) {
		const PrQemuRamBlock *block = &g_array_index(ramblocks, PrQemuRamBlock, i);
		g_autoptr(GError) refused = NULL;
		gboolean shared, ok = pr_qemu_block_shared(block, backends, &shared, &refused);
		PrGuestBlock region = {.size = block->size, .page_size = 4096, .memfd = -1};

		fuzz_clean_outcome(ok, refused);
		region.base = block->hva;
		if (shared)
			g_array_append_val(regions, region);
	}
	matched = pr_qemu_match(ramblocks, backends, regions, &error);
	fuzz_clean_outcome(matched != NULL, error);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	g_autofree char *bytes = g_strndup((const char *)data, size);
	/* The QMP client only passes valid UTF-8 on. */
	g_autofree char *text = g_utf8_make_valid(bytes, -1);
	g_auto(GStrv) parts = g_strsplit(text, "--\n", 3);
	guint n = g_strv_length(parts);
	g_autoptr(GError) error = NULL;
	g_autoptr(GArray) ramblocks = pr_qemu_ramblocks_parse(n ? parts[0] : "", &error);
	uint64_t hva;

	fuzz_clean_outcome(ramblocks != NULL, error);
	if (n > 2 && pr_qemu_parse_hva(parts[2], &hva))
		g_assert(hva);
	if (!ramblocks)
		return 0;
	check_order(ramblocks);
	if (n > 1)
		find_all(ramblocks, parts[1]);
	match(ramblocks);
	return 0;
}
