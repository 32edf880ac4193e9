/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Decodes a source's data about its QEMU, as a destination does: sections that arrive in pieces,
 * facts in JSON, and pages of private RAM. The first byte is the size of the pieces.
 */
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "guest/qemu-facts.h"
#include "guest/qemu-private.h"
#include "guest/qemu-ram.h"
#include "guest/qemu-section.h"
#include "tests/fuzz/fuzz.h"

#define BLOCK_BYTES (64u * 1024)

typedef struct Target {
	GArray *blocks;
	PrQemuPrivateBlock *current;
	JsonObject *here;
	int memory; /* a memfd; a write beyond the block makes it longer */
} Target;

/* One block is mapped; the address of the other one is not known yet. */
static GArray *make_blocks(void)
{
	GArray *ramblocks = g_array_new(FALSE, TRUE, sizeof(PrQemuRamBlock));
	g_autoptr(GArray) backends = pr_qemu_backends_new();
	PrQemuRamBlock all[] = {{.name = (char *)"pc.bios", .size = BLOCK_BYTES, .hva = 4096},
				{.name = (char *)"vga.vram", .size = BLOCK_BYTES}};
	GArray *blocks;

	g_array_append_vals(ramblocks, all, G_N_ELEMENTS(all));
	blocks = pr_qemu_private_list(ramblocks, backends);
	g_array_unref(ramblocks);
	return blocks;
}

static void handle_facts(Target *target, const uint8_t *body, gsize len)
{
	g_autoptr(GError) error = NULL;
	g_autoptr(JsonObject) source = pr_qemu_facts_from_text((const char *)body, len, &error);

	fuzz_clean_outcome(source != NULL, error);
	if (source) {
		g_autoptr(GError) refused = NULL;
		gboolean ok = pr_qemu_facts_check(source, target->here, &refused);

		fuzz_clean_outcome(ok, refused);
	}
}

/* PrQemuSectionHandler */
static gboolean handle_section(PrQemuSectionType type, const uint8_t *body, gsize len, void *opaque,
			       GError **error)
{
	Target *target = opaque;
	g_autofree uint8_t *exact = g_memdup2(body, len);

	g_assert(type > 0 && type < PR_QEMU_SECTION_N && len <= PR_QEMU_SECTION_MAX);
	if (type == PR_QEMU_SECTION_FACTS)
		handle_facts(target, exact, len);
	else if (type == PR_QEMU_SECTION_BLOCK)
		target->current = pr_qemu_private_find(target->blocks, (const char *)exact, len);
	else if (type == PR_QEMU_SECTION_PAGES && target->current)
		return pr_qemu_private_handle_pages(target->current, target->memory, exact, len,
						    error);
	return TRUE;
}

static JsonObject *make_facts(void)
{
	static const char text[] =
		"{\"qemu\": \"7.2\", \"machine\": \"q35\", \"cpu\": \"max\", \"cpus\": 1, "
		"\"devices\": [{\"bus\": \"pcie.0\", \"bus-type\": \"PCIE\", "
		"\"addr\": \"02.0\", \"type\": \"VGA\", \"id\": \"\"}], "
		"\"ram\": [{\"name\": \"vga.vram\", \"size\": 65536}]}";

	return pr_qemu_facts_from_text(text, strlen(text), NULL);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	FuzzInput input = {data, size};
	gsize step = 1 + fuzz_u8(&input);
	Target target = {.blocks = make_blocks(),
			 .here = make_facts(),
			 .memory = memfd_create("memory", MFD_CLOEXEC)};
	g_autoptr(GError) error = NULL;
	PrQemuSectionReader reader;
	gboolean ok = TRUE;

	pr_qemu_section_reader_init(&reader);
	for (gsize at = 0; ok && at < input.left; at += step)
		ok = pr_qemu_section_read(&reader, input.at + at, MIN(step, input.left - at),
					  handle_section, &target, &error);
	fuzz_clean_outcome(ok, error);
	g_assert_cmpint(lseek(target.memory, 0, SEEK_END), <=, 4096 + BLOCK_BYTES);
	pr_qemu_section_reader_clear(&reader);
	g_array_unref(target.blocks);
	json_object_unref(target.here);
	close(target.memory);
	return 0;
}
