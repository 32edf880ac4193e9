/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "guest/qemu-section.h"

#include <string.h>

#include "guest/guest.h"

#define HEAD 8 /* bytes: type and length */

static void append_head(GByteArray *out, PrQemuSectionType type, gsize len)
{
	guint32 head[2] = {GUINT32_TO_BE(type), GUINT32_TO_BE((guint32)len)};

	g_assert(len <= PR_QEMU_SECTION_MAX);
	g_byte_array_append(out, (const guint8 *)head, sizeof(head));
}

void pr_qemu_section_append(GByteArray *out, PrQemuSectionType type, const void *body, gsize len)
{
	append_head(out, type, len);
	g_byte_array_append(out, body, len);
}

void pr_qemu_section_append_pages(GByteArray *out, uint64_t offset, const void *bytes, gsize len)
{
	guint64 wire = GUINT64_TO_BE(offset);

	append_head(out, PR_QEMU_SECTION_PAGES, sizeof(wire) + len);
	g_byte_array_append(out, (const guint8 *)&wire, sizeof(wire));
	g_byte_array_append(out, bytes, len);
}

gboolean pr_qemu_section_parse_pages(const uint8_t *body, gsize len, uint64_t *ret_offset,
				     const uint8_t **ret_bytes, gsize *ret_len)
{
	guint64 wire;

	if (len < sizeof(wire))
		return FALSE;
	memcpy(&wire, body, sizeof(wire));
	*ret_offset = GUINT64_FROM_BE(wire);
	*ret_bytes = body + sizeof(wire);
	*ret_len = len - sizeof(wire);
	return TRUE;
}

void pr_qemu_section_reader_init(PrQemuSectionReader *reader)
{
	reader->bytes = g_byte_array_new();
}

void pr_qemu_section_reader_clear(PrQemuSectionReader *reader)
{
	g_clear_pointer(&reader->bytes, g_byte_array_unref);
}

void pr_qemu_section_reader_reset(PrQemuSectionReader *reader)
{
	g_byte_array_set_size(reader->bytes, 0);
}

gboolean pr_qemu_section_at_end(const PrQemuSectionReader *reader)
{
	return !reader->bytes->len;
}

/* *ret_total: the length of the section with its head; 0: the head is incomplete. */
static gboolean measure(const GByteArray *bytes, gsize *ret_total, GError **error)
{
	guint32 head[2];

	*ret_total = 0;
	if (bytes->len < HEAD)
		return TRUE;
	memcpy(head, bytes->data, sizeof(head));
	head[0] = GUINT32_FROM_BE(head[0]);
	head[1] = GUINT32_FROM_BE(head[1]);
	if (head[0] == 0 || head[0] >= PR_QEMU_SECTION_N || head[1] > PR_QEMU_SECTION_MAX) {
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL,
			    "the source sends a section of QEMU's state of type %u with %u bytes, "
			    "which makes no sense; is it the same kind of guest, and the same "
			    "version of Postroad?",
			    head[0], head[1]);
		return FALSE;
	}
	*ret_total = HEAD + (gsize)head[1];
	return TRUE;
}

/* Appends data until there are `wanted` bytes; returns how many it used. */
static gsize fill(GByteArray *bytes, gsize wanted, const guint8 *data, gsize len)
{
	gsize n = MIN(wanted - bytes->len, len);

	g_byte_array_append(bytes, data, n);
	return n;
}

gboolean pr_qemu_section_read(PrQemuSectionReader *reader, const void *data, gsize len,
			      PrQemuSectionHandler handle, void *opaque, GError **error)
{
	GByteArray *bytes = reader->bytes;
	const guint8 *at = data;

	while (len > 0) {
		gsize total, used = fill(bytes, MAX(bytes->len, HEAD), at, len);

		at += used;
		len -= used;
		if (!measure(bytes, &total, error))
			return FALSE;
		if (!total)
			continue;
		used = fill(bytes, total, at, len);
		at += used;
		len -= used;
		if (bytes->len < total)
			continue;
		PrQemuSectionType type = bytes->data[HEAD / 2 - 1];
		if (!handle(type, bytes->data + HEAD, total - HEAD, opaque, error))
			return FALSE;
		g_byte_array_set_size(bytes, 0);
	}
	return TRUE;
}
