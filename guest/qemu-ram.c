/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "guest/qemu-ram.h"

#include <string.h>

#include "guest/agent-client.h"

#define MIB(bytes) ((guint)((bytes) >> 20))
#define SHOWN_MAX  200 /* bytes of QEMU's output in an error */

static void ramblock_clear(gpointer data)
{
	g_free(((PrQemuRamBlock *)data)->name);
}

static void backend_clear(gpointer data)
{
	PrQemuBackend *backend = data;

	g_free(backend->id);
	g_free(backend->type);
	g_free(backend->path);
	g_free(backend->fs);
}

GArray *pr_qemu_backends_new(void)
{
	GArray *backends = g_array_new(FALSE, TRUE, sizeof(PrQemuBackend));

	g_array_set_clear_func(backends, backend_clear);
	return backends;
}

/* "  NAME    4 KiB  0xOFFSET 0xUSED 0xTOTAL[ RO? ][ 0xHVA]": the name may be empty or hold
 * blanks. */
static gboolean parse_line(const char *line, PrQemuRamBlock *ret)
{
	static const char pattern[] =
		"^\\s*(.*?)\\s+[0-9.]+ [KMGT]?i?B\\s+(0x[0-9a-f]+)\\s+(0x[0-9a-f]+)\\s+"
		"(0x[0-9a-f]+)(?:\\s+(0x[0-9a-f]+))?";
	g_autoptr(GRegex) regex = g_regex_new(pattern, 0, 0, NULL);
	g_autoptr(GMatchInfo) match = NULL;
	g_autofree char *offset = NULL, *size = NULL, *hva = NULL;

	if (!g_regex_match(regex, line, 0, &match))
		return FALSE;
	offset = g_match_info_fetch(match, 2);
	size = g_match_info_fetch(match, 4);
	hva = g_match_info_fetch(match, 5);
	ret->name = g_match_info_fetch(match, 1);
	ret->offset = g_ascii_strtoull(offset, NULL, 16);
	ret->size = g_ascii_strtoull(size, NULL, 16);
	ret->hva = hva ? g_ascii_strtoull(hva, NULL, 16) : 0;
	return TRUE;
}

static gint by_offset(gconstpointer a, gconstpointer b)
{
	const PrQemuRamBlock *first = a, *second = b;

	return (first->offset > second->offset) - (first->offset < second->offset);
}

GArray *pr_qemu_ramblocks_parse(const char *text, GError **error)
{
	g_autoptr(GArray) blocks = g_array_new(FALSE, TRUE, sizeof(PrQemuRamBlock));
	g_auto(GStrv) lines = g_strsplit_set(text, "\r\n", -1);

	g_array_set_clear_func(blocks, ramblock_clear);
	for (guint i = 0; lines[i]; i++) {
		PrQemuRamBlock block;

		if (parse_line(lines[i], &block))
			g_array_append_val(blocks, block);
	}
	if (!blocks->len) {
		/* The cut may split a character. */
		g_autofree char *shown = g_utf8_make_valid(text, strnlen(text, SHOWN_MAX));

		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL,
			    "`info ramblock` names no RAM block: '%s'", shown);
		return NULL;
	}
	g_array_sort(blocks, by_offset);
	return g_steal_pointer(&blocks);
}

const char *pr_qemu_last_part(const char *name)
{
	const char *slash = strrchr(name, '/');

	return slash ? slash + 1 : name;
}

gboolean pr_qemu_find_gpa(const char *mtree, const char *block, uint64_t *ret_gpa,
			  uint64_t *ret_offset)
{
	g_autofree char *name = g_regex_escape_string(pr_qemu_last_part(block), -1);
	g_autofree char *pattern = g_strdup_printf(
		"^\\s*([0-9a-f]{16})-[0-9a-f]{16} \\(prio -?\\d+, (?:ram|rom|romd)\\): "
		"%s(?: @([0-9a-f]{16}))?(?: KVM)?\\s*$",
		name);
	g_autoptr(GRegex) regex = g_regex_new(pattern, G_REGEX_MULTILINE, 0, NULL);
	g_autoptr(GMatchInfo) match = NULL;
	g_autofree char *gpa = NULL, *offset = NULL;

	if (!regex || !g_regex_match(regex, mtree, 0, &match))
		return FALSE;
	gpa = g_match_info_fetch(match, 1);
	offset = g_match_info_fetch(match, 2);
	*ret_gpa = g_ascii_strtoull(gpa, NULL, 16);
	*ret_offset = offset ? g_ascii_strtoull(offset, NULL, 16) : 0;
	return TRUE;
}

gboolean pr_qemu_parse_hva(const char *text, uint64_t *ret_hva)
{
	const char *is = strstr(text, ") is 0x");

	if (!is)
		return FALSE;
	*ret_hva = g_ascii_strtoull(is + strlen(") is "), NULL, 16);
	return *ret_hva != 0;
}

/* A block has the name of its backend, behind "/objects/" or behind the path of the device that
 * owns it. */
const PrQemuBackend *pr_qemu_backend_of(const GArray *backends, const char *block)
{
	const char *id = pr_qemu_last_part(block);

	for (guint i = 0; i < backends->len; i++) {
		const PrQemuBackend *backend = &g_array_index(backends, PrQemuBackend, i);

		if (g_str_equal(backend->id, id))
			return backend;
	}
	return NULL;
}

static gboolean is_device_memory(const char *name)
{
	return strstr(name, "vram") || strstr(name, "flash") || strstr(name, "rom");
}

/* Whether agent or helper may be able to serve this backend's memory. A helper checks that a file
 * is one in memory. */
static gboolean is_servable(const PrQemuBackend *backend)
{
	return g_str_equal(backend->type, "memory-backend-memfd") || backend->fs;
}

gboolean pr_qemu_block_is_shared(const PrQemuRamBlock *block, const GArray *backends)
{
	const PrQemuBackend *backend = pr_qemu_backend_of(backends, block->name);

	return backend && backend->share && is_servable(backend);
}

static gboolean refuse_shared(const PrQemuRamBlock *block, const PrQemuBackend *backend,
			      GError **error)
{
	g_autofree char *instead = g_strdup_printf("memory-backend-memfd,id=%s,size=%uM,share=on",
						   backend->id, MIB(block->size));

	if (backend->fs)
		g_set_error(
			error, PR_GUEST_ERROR, PR_GUEST_ERROR_UNSUPPORTED,
			"RAM block '%s' is the file %s on %s; use -object %s instead, or a file "
			"on tmpfs or hugetlbfs",
			block->name, backend->path, backend->fs, instead);
	else
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_UNSUPPORTED,
			    "RAM block '%s' is shared memory of a %s; use -object %s instead",
			    block->name, backend->type, instead);
	return FALSE;
}

gboolean pr_qemu_block_shared(const PrQemuRamBlock *block, const GArray *backends,
			      gboolean *ret_shared, GError **error)
{
	const PrQemuBackend *backend = pr_qemu_backend_of(backends, block->name);

	*ret_shared = pr_qemu_block_is_shared(block, backends);
	if (*ret_shared || !*block->name)
		return TRUE;
	if (backend && backend->share)
		return refuse_shared(block, backend, error);
	if (block->size <= PR_QEMU_PRIVATE_MAX || (!backend && is_device_memory(block->name)))
		return TRUE;
	g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_UNSUPPORTED,
		    "RAM block '%s' (%u MiB) is private to QEMU; start QEMU with -object "
		    "memory-backend-memfd,id=%s,size=%uM,share=on and -machine memory-backend=%s "
		    "(or -numa node,memdev=%s)",
		    block->name, MIB(block->size), backend ? backend->id : "mem", MIB(block->size),
		    backend ? backend->id : "mem", backend ? backend->id : "mem");
	return FALSE;
}

/* Whether QEMU may have mapped a backend for the block: a block of the machine, or an unnamed one
 * of a backend's size. */
static gboolean may_be_mapped(const PrQemuRamBlock *block, const GArray *backends)
{
	gboolean shared = FALSE;

	if (*block->name)
		return pr_qemu_block_shared(block, backends, &shared, NULL) && shared;
	for (guint i = 0; i < backends->len; i++) {
		const PrQemuBackend *backend = &g_array_index(backends, PrQemuBackend, i);

		if (backend->share && backend->size == block->size &&
		    g_str_equal(backend->type, "memory-backend-memfd"))
			return TRUE;
	}
	return FALSE;
}

static GPtrArray *mapped_blocks(const GArray *ramblocks, const GArray *backends)
{
	GPtrArray *mapped = g_ptr_array_new();

	for (guint i = 0; i < ramblocks->len; i++) {
		PrQemuRamBlock *block = &g_array_index(ramblocks, PrQemuRamBlock, i);

		if (may_be_mapped(block, backends))
			g_ptr_array_add(mapped, block);
	}
	return mapped;
}

static PrGuestBlock *region_at(GArray *regions, uint64_t hva)
{
	for (guint i = 0; i < regions->len; i++) {
		PrGuestBlock *region = &g_array_index(regions, PrGuestBlock, i);

		if (region->base == hva)
			return region;
	}
	return NULL;
}

/* nth: among the blocks that the agent should know, in the order of offsets. */
static PrGuestBlock *find_region(const PrQemuRamBlock *block, guint nth, GArray *regions)
{
	PrGuestBlock *region = block->hva ? region_at(regions, block->hva)
					  : &g_array_index(regions, PrGuestBlock, nth);

	return region && region->size == block->size && region->memfd >= 0 ? region : NULL;
}

static gboolean refuse_count(guint n_blocks, guint n_regions, GError **error)
{
	if (n_blocks == n_regions)
		return TRUE;
	g_set_error(
		error, PR_GUEST_ERROR, PR_GUEST_ERROR_UNSUPPORTED,
		"QEMU has %u shared memfd RAM block%s, its agent knows %u; start this QEMU with "
		"LD_PRELOAD=libpostroad-agent.so and an agent socket of its own",
		n_blocks, n_blocks == 1 ? "" : "s", n_regions);
	return FALSE;
}

static void move_region(GArray *out, PrGuestBlock *region, const char *name)
{
	PrGuestBlock block = *region;

	g_free(region->idstr);
	region->idstr = NULL;
	region->memfd = -1;
	block.idstr = g_strdup(name);
	g_array_append_val(out, block);
}

GArray *pr_qemu_match(const GArray *ramblocks, const GArray *backends, GArray *regions,
		      GError **error)
{
	g_autoptr(GPtrArray) mapped = mapped_blocks(ramblocks, backends);
	g_autoptr(GArray) out = NULL;

	if (!refuse_count(mapped->len, regions->len, error))
		return NULL;
	out = pr_guest_blocks_new();
	for (guint i = 0; i < mapped->len; i++) {
		const PrQemuRamBlock *block = mapped->pdata[i];
		PrGuestBlock *region = find_region(block, i, regions);

		/* A backend that the machine does not use is not migrated. */
		if (!*block->name)
			continue;
		if (!region) {
			g_set_error(
				error, PR_GUEST_ERROR, PR_GUEST_ERROR_UNSUPPORTED,
				"RAM block '%s' (%u MiB): the agent has no mapping that fits it; "
				"is this the agent of this QEMU?",
				block->name, MIB(block->size));
			return NULL;
		}
		move_region(out, region, block->name);
	}
	return g_steal_pointer(&out);
}

static gboolean is_in_memory(const char *fs)
{
	return g_str_equal(fs, "tmpfs") || g_str_equal(fs, "hugetlbfs");
}

static gboolean match_attached(const PrQemuRamBlock *block, const GArray *backends, GArray *regions,
			       GArray *out, GError **error)
{
	const PrQemuBackend *backend = pr_qemu_backend_of(backends, block->name);
	PrGuestBlock *region;

	if (!block->hva) {
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_UNSUPPORTED,
			    "RAM block '%s' (%u MiB): this QEMU does not tell where it is mapped "
			    "(`info ramblock`, `gpa2hva`); preload libpostroad-agent.so and add "
			    "agent=PATH",
			    block->name, MIB(block->size));
		return FALSE;
	}
	region = region_at(regions, block->hva);
	if (region && region->size == block->size && region->memfd >= 0) {
		move_region(out, region, block->name);
		return TRUE;
	}
	if (!region && backend && backend->path && !is_in_memory(backend->fs))
		return refuse_shared(block, backend, error);
	g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_UNSUPPORTED,
		    "RAM block '%s' (%u MiB at 0x%" G_GINT64_MODIFIER
		    "x): the process has no such shared memory there%s",
		    block->name, MIB(block->size), block->hva,
		    region ? ", but a mapping of another size"
			   : "; is it QEMU's? name it with pid=");
	return FALSE;
}

GArray *pr_qemu_match_attached(const GArray *ramblocks, const GArray *backends, GArray *regions,
			       GError **error)
{
	g_autoptr(GPtrArray) mapped = mapped_blocks(ramblocks, backends);
	g_autoptr(GArray) out = pr_guest_blocks_new();

	for (guint i = 0; i < mapped->len; i++) {
		const PrQemuRamBlock *block = mapped->pdata[i];

		/* A backend that the machine does not use is not migrated. */
		if (*block->name && !match_attached(block, backends, regions, out, error))
			return NULL;
	}
	return g_steal_pointer(&out);
}
