/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Compresses bitmaps with zstd, without a second copy of them: a guest of 1 TiB has 32 MiB. A
 * peer decides neither how much memory nor how much time decompressing takes. The size of the
 * result is known beforehand, and any other size is an error.
 */
#include "transport/wire/zstd.h"

#include <zstd.h>

#include "transport/wire/bytes.h"

#define LEVEL	     1
#define CHECK_GROUPS (128 * 1024) /* 1 MiB between two checks of the compression ratio */
#define ROOM_GROUPS  256

G_DEFINE_AUTOPTR_CLEANUP_FUNC(ZSTD_CCtx, ZSTD_freeCCtx)

/* Compresses one piece. FALSE: the output has grown beyond `limit`. */
static gboolean compress_piece(ZSTD_CCtx *zstd, const void *piece, gsize size, gboolean last,
			       GByteArray *out, gsize limit)
{
	ZSTD_inBuffer input = {piece, size, 0};
	uint8_t room[16 * 1024];
	gsize left;

	do {
		ZSTD_outBuffer output = {room, sizeof room, 0};

		left = ZSTD_compressStream2(zstd, &output, &input,
					    last ? ZSTD_e_end : ZSTD_e_continue);
		if (ZSTD_isError(left) || out->len + output.pos > limit)
			return FALSE;
		g_byte_array_append(out, room, output.pos);
	} while (input.pos < input.size || (last && left));
	return TRUE;
}

/* The groups from `from` on in the byte order of the wire: in place, or copied to `room`. Returns
 * how many. */
static gsize next_groups(const unsigned long *bits, uint64_t n_bits, uint64_t from, uint64_t n,
			 uint64_t *room, const void **ret)
{
	if (groups_are_memory()) {
		*ret = (const uint8_t *)bits + from * 8;
		return MIN(n, CHECK_GROUPS);
	}
	n = MIN(n, ROOM_GROUPS);
	for (gsize i = 0; i < n; i++)
		room[i] = GUINT64_TO_LE(load_group(bits, n_bits, from + i));
	*ret = room;
	return n;
}

/* Compresses all groups but the last, which may have bits beyond the end. FALSE: it saves less
 * than a sixteenth. */
static gboolean compress_whole_groups(ZSTD_CCtx *zstd, const unsigned long *bits, uint64_t n_bits,
				      uint64_t n, GByteArray *out, gsize limit)
{
	guint before = out->len;
	uint64_t room[ROOM_GROUPS];

	for (uint64_t at = 0; at < n;) {
		const void *piece;
		gsize some = next_groups(bits, n_bits, at, n - at, room, &piece);

		at += some;
		if (!compress_piece(zstd, piece, some * 8, FALSE, out, limit) ||
		    out->len - before > at * 8 / 16 * 15)
			return FALSE;
	}
	return TRUE;
}

gboolean pr_zstd_put_bitmap(GByteArray *out, const unsigned long *bits, uint64_t n_bits,
			    gsize limit)
{
	g_autoptr(ZSTD_CCtx) zstd = ZSTD_createCCtx();
	uint64_t whole = groups_of(n_bits) - 1;
	uint64_t last = GUINT64_TO_LE(load_group(bits, n_bits, whole));
	guint before = out->len;

	if (zstd && !ZSTD_isError(ZSTD_CCtx_setParameter(zstd, ZSTD_c_compressionLevel, LEVEL)) &&
	    compress_whole_groups(zstd, bits, n_bits, whole, out, before + limit) &&
	    compress_piece(zstd, &last, sizeof last, TRUE, out, before + limit))
		return TRUE;
	g_byte_array_set_size(out, before);
	return FALSE;
}

gboolean pr_zstd_get_bitmap(const uint8_t *data, gsize len, uint64_t n_bits, unsigned long *ret)
{
	uint64_t n = groups_of(n_bits);

	return ZSTD_decompress(ret, n * 8, data, len) == n * 8 && accept_groups(ret, n_bits);
}
