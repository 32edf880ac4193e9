/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What one engine sends to the other about a QEMU, beside the RAM that is shared: a sequence of sections, each a type
 * and a length (32 bits, big endian) and a body. Pure functions, which are fuzzed: the bytes come from the network, cut
 * anywhere.
 *
 *	early, while the guest runs     FACTS  (BLOCK PAGES…)…
 *	with the guest stopped          (BLOCK PAGES…)…  STATE…
 */
#pragma once

#include <glib.h>
#include <stdint.h>

#define PR_QEMU_SECTION_MAX (1u << 20) /* bytes of a body */

typedef enum PrQemuSectionType {
	PR_QEMU_SECTION_FACTS =
		1,	       /* JSON: what the other side's QEMU must be like (qemu-facts.h) */
	PR_QEMU_SECTION_BLOCK, /* the name of the private RAM block that PAGES are of from here on */
	PR_QEMU_SECTION_PAGES, /* offset in it (64 bits, big endian), and bytes */
	PR_QEMU_SECTION_STATE, /* bytes of QEMU's own stream */
	PR_QEMU_SECTION_N
} PrQemuSectionType;

void pr_qemu_section_append(GByteArray *out, PrQemuSectionType type, const void *body, gsize len);
/* PAGES. */
void pr_qemu_section_append_pages(GByteArray *out, uint64_t offset, const void *bytes, gsize len);
/* FALSE: the body is too short for PAGES. */
gboolean pr_qemu_section_parse_pages(const uint8_t *body, gsize len, uint64_t *ret_offset,
				     const uint8_t **ret_bytes, gsize *ret_len);

/* Takes one section; FALSE ends the reading. */
typedef gboolean (*PrQemuSectionTake)(PrQemuSectionType type, const uint8_t *body, gsize len,
				      void *opaque, GError **error);

/* What has come of the section that is under way. */
typedef struct PrQemuSectionReader {
	GByteArray *bytes;
} PrQemuSectionReader;

void pr_qemu_section_reader_init(PrQemuSectionReader *reader);
void pr_qemu_section_reader_clear(PrQemuSectionReader *reader);
/* Forgets a section that was cut off. */
void pr_qemu_section_reader_reset(PrQemuSectionReader *reader);
/* Hands over every section that is complete now. Errors are take's, or of the domain PR_GUEST_ERROR. */
gboolean pr_qemu_section_read(PrQemuSectionReader *reader, const void *data, gsize len,
			      PrQemuSectionTake take, void *opaque, GError **error);
/* Whether nothing of a section is outstanding. */
gboolean pr_qemu_section_at_end(const PrQemuSectionReader *reader);
