/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Bitmaps of pages that threads share without a lock: every access to a word is atomic. Setting a
 * bit is a release, testing it an acquire: a thread that sees a bit set also sees what was written
 * before it was set.
 */
#pragma once

#include <glib.h>
#include <limits.h>
#include <stdint.h>

#define PR_LONG_BITS (sizeof(unsigned long) * CHAR_BIT)

static inline uint64_t pr_bitmap_words(uint64_t n_bits)
{
	return (n_bits + PR_LONG_BITS - 1) / PR_LONG_BITS;
}

static inline unsigned long pr_bitmap_mask(uint64_t bit)
{
	return 1ul << (bit % PR_LONG_BITS);
}

/* The bits of word `index` that lie in [start, end). */
static inline unsigned long pr_bitmap_span(uint64_t index, uint64_t start, uint64_t end)
{
	unsigned long mask = ~0ul;
	uint64_t first = index * PR_LONG_BITS;

	if (start > first)
		mask &= ~0ul << (start - first);
	if (end < first + PR_LONG_BITS)
		mask &= ~(~0ul << (end - first));
	return mask;
}

static inline gboolean pr_bitmap_test(const unsigned long *map, uint64_t bit)
{
	return (__atomic_load_n(&map[bit / PR_LONG_BITS], __ATOMIC_SEQ_CST) &
		pr_bitmap_mask(bit)) != 0;
}

/* Returns whether the bit was set before. */
static inline gboolean pr_bitmap_test_and_set(unsigned long *map, uint64_t bit)
{
	unsigned long mask = pr_bitmap_mask(bit);

	return (__atomic_fetch_or(&map[bit / PR_LONG_BITS], mask, __ATOMIC_SEQ_CST) & mask) != 0;
}

static inline gboolean pr_bitmap_test_and_clear(unsigned long *map, uint64_t bit)
{
	unsigned long mask = pr_bitmap_mask(bit);

	return (__atomic_fetch_and(&map[bit / PR_LONG_BITS], ~mask, __ATOMIC_SEQ_CST) & mask) != 0;
}

/* NULL: out of memory. */
unsigned long *pr_bitmap_new(uint64_t n_bits);
/* Sets or clears n bits from `start`; returns how many changed. */
uint64_t pr_bitmap_set(unsigned long *map, uint64_t start, uint64_t n);
uint64_t pr_bitmap_clear(unsigned long *map, uint64_t start, uint64_t n);
/* The first bit at or after `start` that is set (clear), or n_bits. */
uint64_t pr_bitmap_next_set(const unsigned long *map, uint64_t n_bits, uint64_t start);
uint64_t pr_bitmap_next_clear(const unsigned long *map, uint64_t n_bits, uint64_t start);
/* The first bit at or after `start` that is clear in both, or n_bits. */
uint64_t pr_bitmap_next_clear2(const unsigned long *a, const unsigned long *b, uint64_t n_bits,
			       uint64_t start);
/* A copy, while other threads may set bits; free it with g_free(). NULL: out of memory. */
unsigned long *pr_bitmap_snapshot(const unsigned long *map, uint64_t n_bits);
uint64_t pr_bitmap_count(const unsigned long *map, uint64_t n_bits);
/* Whether any of n bits from `start` is set. */
gboolean pr_bitmap_any(const unsigned long *map, uint64_t start, uint64_t n);
