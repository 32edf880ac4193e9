/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Compressed bitmaps, for wire.c and encode.c. */
#pragma once

#include <glib.h>
#include <stdint.h>

/* Appends a compressed bitmap of at most `limit` bytes. FALSE: it would be longer, and nothing is
 * appended. */
gboolean pr_zstd_put_bitmap(GByteArray *out, const unsigned long *bits, uint64_t n_bits,
			    gsize limit);
/* Fills *ret, groups_of(n_bits) * 8 bytes. FALSE: the data is not a bitmap of this size. */
gboolean pr_zstd_get_bitmap(const uint8_t *data, gsize len, uint64_t n_bits, unsigned long *ret);
