/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "guest/qemu-private.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>
#include <xxhash.h>

#include "guest/qemu-query.h"
#include "guest/qemu-ram.h"
#include "guest/qemu-section.h"

#define PAGE  4096u
#define CHUNK (256u * 1024) /* bytes that are read and compared at once */

/* The most bytes that a source may send for a block of that size: the whole block twice, page by
 * page. */
#define DEFERRED_MAX(size)                                                                         \
	MIN(2 * (size) + (size) / 64 + PR_QEMU_SECTION_MAX, (uint64_t)DEFERRED_LIMIT)
#define DEFERRED_LIMIT (1u << 30) /* bytes */

static const uint8_t zeros[CHUNK];

static void block_clear(gpointer data)
{
	PrQemuPrivateBlock *block = data;

	g_free(block->name);
	g_clear_pointer(&block->hashes, g_array_unref);
	g_clear_pointer(&block->deferred, g_byte_array_unref);
}

GArray *pr_qemu_private_list(const GArray *ramblocks, const GArray *backends)
{
	GArray *blocks = g_array_new(FALSE, TRUE, sizeof(PrQemuPrivateBlock));

	g_array_set_clear_func(blocks, block_clear);
	for (guint i = 0; i < ramblocks->len; i++) {
		const PrQemuRamBlock *ram = &g_array_index(ramblocks, PrQemuRamBlock, i);
		PrQemuPrivateBlock block = {.size = ram->size, .hva = ram->hva};

		if (!*ram->name || g_str_has_prefix(ram->name, "/rom@") ||
		    pr_qemu_block_is_shared(ram, backends))
			continue;
		block.name = g_strdup(ram->name);
		g_array_append_val(blocks, block);
	}
	return blocks;
}

/* `info mtree` shows only the last part of the block's name. */
static gboolean is_ambiguous(const GArray *blocks, guint which)
{
	const char *name = g_array_index(blocks, PrQemuPrivateBlock, which).name;

	for (guint i = 0; i < blocks->len; i++) {
		const char *other = g_array_index(blocks, PrQemuPrivateBlock, i).name;

		if (i != which && g_str_equal(pr_qemu_last_part(name), pr_qemu_last_part(other)))
			return TRUE;
	}
	return FALSE;
}

void pr_qemu_private_locate(PrQmp *qmp, GArray *blocks)
{
	g_autofree char *mtree = NULL;

	for (guint i = 0; i < blocks->len; i++) {
		PrQemuPrivateBlock *block = &g_array_index(blocks, PrQemuPrivateBlock, i);

		if (block->hva)
			continue;
		if (is_ambiguous(blocks, i)) {
			g_warning(
				"RAM block '%s' of QEMU is not migrated: several blocks have such "
				"a name, and this QEMU does not tell their addresses (8.0 and "
				"newer do)",
				block->name);
			continue;
		}
		if (!mtree)
			mtree = pr_qmp_human(qmp, "info mtree -f", NULL);
		block->hva = mtree ? pr_qemu_query_hva(qmp, mtree, block->name) : 0;
	}
}

PrQemuPrivateBlock *pr_qemu_private_find(GArray *blocks, const char *name, gsize len)
{
	for (guint i = 0; i < blocks->len; i++) {
		PrQemuPrivateBlock *block = &g_array_index(blocks, PrQemuPrivateBlock, i);

		if (strlen(block->name) == len && memcmp(block->name, name, len) == 0)
			return block;
	}
	return NULL;
}

/* The memory of QEMU's process */

static gboolean fail_access(const PrQemuPrivateBlock *block, const char *what, ssize_t n,
			    GError **error)
{
	g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL,
		    "RAM block '%s' of QEMU cannot be %s: %s", block->name, what,
		    n < 0 ? g_strerror(errno) : "it is not mapped where QEMU says");
	return FALSE;
}

static gboolean read_block(const PrQemuPrivateBlock *block, int memory, uint64_t offset,
			   uint8_t *bytes, gsize len, GError **error)
{
	while (len > 0) {
		ssize_t n = pread(memory, bytes, len, (off_t)(block->hva + offset));

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return fail_access(block, "read", n, error);
		bytes += n;
		offset += n;
		len -= n;
	}
	return TRUE;
}

static gboolean write_block(const PrQemuPrivateBlock *block, int memory, uint64_t offset,
			    const uint8_t *bytes, gsize len, GError **error)
{
	while (len > 0) {
		ssize_t n = pwrite(memory, bytes, len, (off_t)(block->hva + offset));

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return fail_access(block, "written", n, error);
		bytes += n;
		offset += n;
		len -= n;
	}
	return TRUE;
}

/* Source */

typedef struct Sending {
	PrQemuPrivateBlock *block;
	int memory;
	gboolean first; /* no page of this block was sent before */
	gboolean named; /* a BLOCK section with this block's name was sent */
	PrGuestSink sink;
	void *opaque;
} Sending;

static gboolean send_run(Sending *sending, uint64_t offset, const uint8_t *bytes, gsize len,
			 GError **error)
{
	g_autoptr(GByteArray) out = g_byte_array_sized_new((guint)len + 512);
	const char *name = sending->block->name;

	if (!sending->named)
		pr_qemu_section_append(out, PR_QEMU_SECTION_BLOCK, name, strlen(name));
	sending->named = TRUE;
	if (len)
		pr_qemu_section_append_pages(out, offset, bytes, len);
	return sending->sink(out->data, out->len, sending->opaque, error);
}

/* Whether this page has to be sent. Records it as sent. */
static gboolean has_changed(Sending *sending, uint64_t offset, const uint8_t *page, gsize len)
{
	uint64_t *known = &g_array_index(sending->block->hashes, uint64_t, offset / PAGE);
	uint64_t hash = XXH3_64bits(page, len);

	gboolean changed = sending->first ? memcmp(page, zeros, len) != 0 : *known != hash;

	*known = hash;
	return changed;
}

/* Sends adjacent changed pages as one run. */
static gboolean send_chunk(Sending *sending, uint64_t offset, const uint8_t *bytes, gsize len,
			   GError **error)
{
	gsize begin = 0, end = 0;

	for (gsize at = 0; at < len; at += PAGE) {
		gsize page = MIN(PAGE, len - at);

		if (!has_changed(sending, offset + at, bytes + at, page))
			continue;
		if (end != at) {
			if (end > begin &&
			    !send_run(sending, offset + begin, bytes + begin, end - begin, error))
				return FALSE;
			begin = at;
		}
		end = at + page;
	}
	return end == begin || send_run(sending, offset + begin, bytes + begin, end - begin, error);
}

static gboolean send_block(Sending *sending, uint8_t *buffer, GError **error)
{
	PrQemuPrivateBlock *block = sending->block;

	sending->first = !block->hashes;
	if (sending->first) {
		block->hashes = g_array_new(FALSE, TRUE, sizeof(uint64_t));
		g_array_set_size(block->hashes, (block->size + PAGE - 1) / PAGE);
		/* Sends the name even if no page follows, so that the destination clears the
		 * block. */
		if (!send_run(sending, 0, NULL, 0, error))
			return FALSE;
	}
	for (uint64_t offset = 0; offset < block->size; offset += CHUNK) {
		gsize len = MIN(CHUNK, block->size - offset);

		if (!read_block(block, sending->memory, offset, buffer, len, error) ||
		    !send_chunk(sending, offset, buffer, len, error))
			return FALSE;
	}
	return TRUE;
}

gboolean pr_qemu_private_send(GArray *blocks, int memory, PrGuestSink sink, void *opaque,
			      GError **error)
{
	g_autofree uint8_t *buffer = g_malloc(CHUNK);

	for (guint i = 0; i < blocks->len; i++) {
		Sending sending = {.block = &g_array_index(blocks, PrQemuPrivateBlock, i),
				   .memory = memory,
				   .sink = sink,
				   .opaque = opaque};

		if (!sending.block->hva)
			g_debug("RAM block '%s' of QEMU is not mapped; the destination's QEMU "
				"keeps its own",
				sending.block->name);
		else if (!send_block(&sending, buffer, error))
			return FALSE;
	}
	return TRUE;
}

/* Destination */

gboolean pr_qemu_private_clear(PrQemuPrivateBlock *block, int memory, GError **error)
{
	g_autofree uint8_t *buffer = g_malloc(CHUNK);

	if (!block->hva) {
		g_clear_pointer(&block->deferred, g_byte_array_unref);
		return TRUE;
	}
	for (uint64_t offset = 0; offset < block->size; offset += CHUNK) {
		gsize len = MIN(CHUNK, block->size - offset);

		if (!read_block(block, memory, offset, buffer, len, error))
			return FALSE;
		if (memcmp(buffer, zeros, len) != 0 &&
		    !write_block(block, memory, offset, zeros, len, error))
			return FALSE;
	}
	return TRUE;
}

static gboolean write_pages(const PrQemuPrivateBlock *block, int memory, const uint8_t *body,
			    gsize len, GError **error)
{
	const uint8_t *bytes;
	uint64_t offset;
	gsize n;

	if (!pr_qemu_section_parse_pages(body, len, &offset, &bytes, &n) || offset > block->size ||
	    n > block->size - offset) {
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL,
			    "the source sends pages outside of RAM block '%s'", block->name);
		return FALSE;
	}
	return block->hva ? write_block(block, memory, offset, bytes, n, error) : TRUE;
}

gboolean pr_qemu_private_handle_pages(PrQemuPrivateBlock *block, int memory, const uint8_t *body,
				      gsize len, GError **error)
{
	if (!write_pages(block, memory, body, len, error))
		return FALSE;
	if (block->hva)
		return TRUE;
	if (!block->deferred)
		block->deferred = g_byte_array_new();
	if (block->deferred->len + len > DEFERRED_MAX(block->size)) {
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL,
			    "the source sends more of RAM block '%s' than its size", block->name);
		return FALSE;
	}
	pr_qemu_section_append(block->deferred, PR_QEMU_SECTION_PAGES, body, len);
	return TRUE;
}

gboolean pr_qemu_private_has_deferred(const GArray *blocks)
{
	for (guint i = 0; i < blocks->len; i++) {
		if (g_array_index(blocks, PrQemuPrivateBlock, i).deferred)
			return TRUE;
	}
	return FALSE;
}

typedef struct DeferredWrite {
	PrQemuPrivateBlock *block;
	int memory;
} DeferredWrite;

/* PrQemuSectionHandler */
static gboolean write_deferred_section(PrQemuSectionType type, const uint8_t *body, gsize len,
				       void *opaque, GError **error)
{
	DeferredWrite *deferred = opaque;

	return write_pages(deferred->block, deferred->memory, body, len, error);
}

static gboolean write_deferred_block(PrQemuPrivateBlock *block, int memory, GError **error)
{
	DeferredWrite deferred = {block, memory};
	PrQemuSectionReader reader;
	gboolean ok;

	pr_qemu_section_reader_init(&reader);
	ok = pr_qemu_section_read(&reader, block->deferred->data, block->deferred->len,
				  write_deferred_section, &deferred, error);
	pr_qemu_section_reader_clear(&reader);
	return ok;
}

gboolean pr_qemu_private_write_deferred(PrQmp *qmp, GArray *blocks, int memory, GError **error)
{
	pr_qemu_private_locate(qmp, blocks);
	for (guint i = 0; i < blocks->len; i++) {
		PrQemuPrivateBlock *block = &g_array_index(blocks, PrQemuPrivateBlock, i);

		if (!block->deferred)
			continue;
		if (!block->hva)
			g_info("RAM block '%s' of QEMU is not mapped; this QEMU keeps its own",
			       block->name);
		else if (!write_deferred_block(block, memory, error))
			return FALSE;
		g_clear_pointer(&block->deferred, g_byte_array_unref);
	}
	return TRUE;
}
