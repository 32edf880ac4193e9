/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Big endian fields: appended to a GByteArray, and read through a cursor. After the first read
 * beyond the end the cursor returns zeros. So a decoder is a list of fields, and one check behind
 * it.
 */
#pragma once

#include <glib.h>
#include <stdint.h>
#include <string.h>

static inline void store_u16(uint8_t *out, uint16_t value)
{
	value = GUINT16_TO_BE(value);
	memcpy(out, &value, sizeof value);
}

static inline void store_u32(uint8_t *out, uint32_t value)
{
	value = GUINT32_TO_BE(value);
	memcpy(out, &value, sizeof value);
}

static inline void store_u64(uint8_t *out, uint64_t value)
{
	value = GUINT64_TO_BE(value);
	memcpy(out, &value, sizeof value);
}

static inline void put_bytes(GByteArray *out, const void *data, gsize length)
{
	if (length)
		g_byte_array_append(out, data, length);
}

static inline void put_u8(GByteArray *out, uint8_t value)
{
	g_byte_array_append(out, &value, 1);
}

static inline void put_u16(GByteArray *out, uint16_t value)
{
	uint8_t raw[2];

	store_u16(raw, value);
	g_byte_array_append(out, raw, sizeof raw);
}

static inline void put_u32(GByteArray *out, uint32_t value)
{
	uint8_t raw[4];

	store_u32(raw, value);
	g_byte_array_append(out, raw, sizeof raw);
}

static inline void put_u64(GByteArray *out, uint64_t value)
{
	uint8_t raw[8];

	store_u64(raw, value);
	g_byte_array_append(out, raw, sizeof raw);
}

/* A name of at most 255 bytes after its length. */
static inline void put_name(GByteArray *out, const char *name)
{
	gsize length = strlen(name);

	g_assert(length > 0 && length <= UINT8_MAX);
	put_u8(out, length);
	put_bytes(out, name, length);
}

typedef struct Cursor {
	const uint8_t *at;
	gsize left;
	gboolean overrun; /* something was read beyond the end */
} Cursor;

/* The next n bytes, or NULL. */
static inline const uint8_t *take(Cursor *cursor, gsize n)
{
	const uint8_t *at = cursor->at;

	if (cursor->overrun || n > cursor->left) {
		cursor->overrun = TRUE;
		return NULL;
	}
	cursor->left -= n;
	if (n)
		cursor->at += n;
	return at;
}

static inline void get_bytes(Cursor *cursor, void *out, gsize n)
{
	const uint8_t *at = take(cursor, n);

	if (at && n)
		memcpy(out, at, n);
	else
		memset(out, 0, n);
}

static inline uint8_t get_u8(Cursor *cursor)
{
	uint8_t value;

	get_bytes(cursor, &value, sizeof value);
	return value;
}

static inline uint16_t get_u16(Cursor *cursor)
{
	uint16_t value;

	get_bytes(cursor, &value, sizeof value);
	return GUINT16_FROM_BE(value);
}

static inline uint32_t get_u32(Cursor *cursor)
{
	uint32_t value;

	get_bytes(cursor, &value, sizeof value);
	return GUINT32_FROM_BE(value);
}

static inline uint64_t get_u64(Cursor *cursor)
{
	uint64_t value;

	get_bytes(cursor, &value, sizeof value);
	return GUINT64_FROM_BE(value);
}

/* The bitmap of a block of 16 TiB in pages of 4 KiB. */
#define BITMAP_BYTES_MAX (512 * 1024 * 1024)
/* Flags of PACKAGED. */
#define PACKAGED_LAST	 0x01
#define PACKAGED_RUNNING 0x02

static inline uint64_t groups_of(uint64_t n_bits)
{
	return n_bits / 64 + !!(n_bits % 64);
}

/* The bits of the 64-bit group `group`, bit 0 first; those beyond n_bits are zero. */
static inline uint64_t load_group(const unsigned long *bits, uint64_t n_bits, uint64_t group)
{
	const gsize words = sizeof(uint64_t) / sizeof *bits;
	uint64_t rest = n_bits - group * 64;
	uint64_t value = 0;

	for (gsize i = 0; i < words; i++)
		value |= (uint64_t)bits[group * words + i] << (i * 8 * sizeof *bits);
	return rest < 64 ? value & ((1ull << rest) - 1) : value;
}

static inline void store_group(unsigned long *bits, uint64_t group, uint64_t value)
{
	const gsize words = sizeof(uint64_t) / sizeof *bits;

	for (gsize i = 0; i < words; i++)
		bits[group * words + i] = value >> (i * 8 * sizeof *bits);
}

/* Whether a bitmap in memory has the byte order of the wire. */
static inline gboolean groups_are_memory(void)
{
	return G_BYTE_ORDER == G_LITTLE_ENDIAN;
}

/* Converts the groups of a bitmap in place from the byte order of the wire. FALSE: bits beyond
 * its end are set. */
static inline gboolean accept_groups(unsigned long *bits, uint64_t n_bits)
{
	uint64_t n = groups_of(n_bits), last;

	if (!n)
		return TRUE;
	memcpy(&last, (uint8_t *)bits + (n - 1) * 8, sizeof last);
	for (uint64_t i = 0; !groups_are_memory() && i < n; i++) {
		uint64_t group;

		memcpy(&group, (uint8_t *)bits + i * 8, sizeof group);
		store_group(bits, i, GUINT64_FROM_LE(group));
	}
	return load_group(bits, n_bits, n - 1) == GUINT64_FROM_LE(last);
}
