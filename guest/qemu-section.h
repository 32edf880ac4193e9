/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The data of a QEMU that one engine sends to the other, beside shared RAM: a sequence of sections.
 * A section is a type and a length (32 bits, big endian) and a body. Pure functions, which are
 * fuzzed: the bytes come from the network, cut at any place.
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
		1, /* JSON: the facts that the destination's QEMU has to match (qemu-facts.h) */
	/* the name of the private RAM block that the following PAGES belong to */
	PR_QEMU_SECTION_BLOCK,
	PR_QEMU_SECTION_PAGES, /* offset in it (64 bits, big endian), and bytes */
	PR_QEMU_SECTION_STATE, /* bytes of QEMU's own stream */
	PR_QEMU_SECTION_N
} PrQemuSectionType;

void pr_qemu_section_append(GByteArray *out, PrQemuSectionType type, const void *body, gsize len);
/* The same for PAGES. */
void pr_qemu_section_append_pages(GByteArray *out, uint64_t offset, const void *bytes, gsize len);
/* FALSE: the body is too short for PAGES. */
gboolean pr_qemu_section_parse_pages(const uint8_t *body, gsize len, uint64_t *ret_offset,
				     const uint8_t **ret_bytes, gsize *ret_len);

/* Handles one section; FALSE ends the reading. */
typedef gboolean (*PrQemuSectionHandler)(PrQemuSectionType type, const uint8_t *body, gsize len,
					 void *opaque, GError **error);

/* The bytes of the section that is not complete yet. */
typedef struct PrQemuSectionReader {
	GByteArray *bytes;
} PrQemuSectionReader;

void pr_qemu_section_reader_init(PrQemuSectionReader *reader);
void pr_qemu_section_reader_clear(PrQemuSectionReader *reader);
/* Drops an incomplete section. */
void pr_qemu_section_reader_reset(PrQemuSectionReader *reader);
/* Calls the handler for every section that is complete now. Errors are the handler's, or of the
 * domain PR_GUEST_ERROR. */
gboolean pr_qemu_section_read(PrQemuSectionReader *reader, const void *data, gsize len,
			      PrQemuSectionHandler handle, void *opaque, GError **error);
/* Whether the last section is complete. */
gboolean pr_qemu_section_at_end(const PrQemuSectionReader *reader);
