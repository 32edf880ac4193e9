/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/memory/bitmap.h"

static unsigned long word(const unsigned long *map, uint64_t index)
{
	return __atomic_load_n(&map[index], __ATOMIC_SEQ_CST);
}

unsigned long *pr_bitmap_new(uint64_t n_bits)
{
	return g_try_new0(unsigned long, MAX(pr_bitmap_words(n_bits), 1));
}

uint64_t pr_bitmap_set(unsigned long *map, uint64_t start, uint64_t n)
{
	uint64_t changed = 0, end = start + n;

	for (uint64_t i = start / PR_LONG_BITS; i < pr_bitmap_words(end); i++) {
		unsigned long mask = pr_bitmap_span(i, start, end);
		unsigned long old = __atomic_fetch_or(&map[i], mask, __ATOMIC_SEQ_CST);
		changed += (uint64_t)__builtin_popcountl(mask & ~old);
	}
	return changed;
}

uint64_t pr_bitmap_clear(unsigned long *map, uint64_t start, uint64_t n)
{
	uint64_t changed = 0, end = start + n;

	for (uint64_t i = start / PR_LONG_BITS; i < pr_bitmap_words(end); i++) {
		unsigned long mask = pr_bitmap_span(i, start, end);
		unsigned long old = __atomic_fetch_and(&map[i], ~mask, __ATOMIC_SEQ_CST);
		changed += (uint64_t)__builtin_popcountl(mask & old);
	}
	return changed;
}

/* The first bit at or after start that is set in (a | b) ^ flip. */
static uint64_t next(const unsigned long *a, const unsigned long *b, unsigned long flip,
		     uint64_t n_bits, uint64_t start)
{
	if (start >= n_bits)
		return n_bits;
	for (uint64_t i = start / PR_LONG_BITS; i < pr_bitmap_words(n_bits); i++) {
		unsigned long bits = (word(a, i) | word(b, i)) ^ flip;
		bits &= pr_bitmap_span(i, start, n_bits);
		if (bits)
			return i * PR_LONG_BITS + (uint64_t)__builtin_ctzl(bits);
	}
	return n_bits;
}

uint64_t pr_bitmap_next_set(const unsigned long *map, uint64_t n_bits, uint64_t start)
{
	return next(map, map, 0, n_bits, start);
}

uint64_t pr_bitmap_next_clear(const unsigned long *map, uint64_t n_bits, uint64_t start)
{
	return next(map, map, ~0ul, n_bits, start);
}

uint64_t pr_bitmap_next_clear2(const unsigned long *a, const unsigned long *b, uint64_t n_bits,
			       uint64_t start)
{
	return next(a, b, ~0ul, n_bits, start);
}

unsigned long *pr_bitmap_snapshot(const unsigned long *map, uint64_t n_bits)
{
	unsigned long *copy = pr_bitmap_new(n_bits);

	for (uint64_t i = 0; copy && i < pr_bitmap_words(n_bits); i++)
		copy[i] = word(map, i);
	return copy;
}

uint64_t pr_bitmap_count(const unsigned long *map, uint64_t n_bits)
{
	uint64_t count = 0;

	for (uint64_t i = 0; i < pr_bitmap_words(n_bits); i++)
		count += (uint64_t)__builtin_popcountl(word(map, i) & pr_bitmap_span(i, 0, n_bits));
	return count;
}

gboolean pr_bitmap_any(const unsigned long *map, uint64_t start, uint64_t n)
{
	return pr_bitmap_next_set(map, start + n, start) < start + n;
}
