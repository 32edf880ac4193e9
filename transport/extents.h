/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What of a file in memory (memfd, tmpfs, hugetlbfs) holds data; the rest was never touched, and is not allocated by being
 * looked at here.
 */
#pragma once

#include <glib.h>
#include <stdint.h>

typedef struct PrExtent {
	uint64_t start, end; /* bytes, page aligned; [start, end) */
} PrExtent;

/* The next data in [from, end), counted from `base` in the file. Where it can't be told, all is data. FALSE: there is
 * none. */
gboolean pr_extent_next(int fd, uint64_t base, uint64_t from, uint64_t end, PrExtent *ret);

/* Whether all of the file is allocated, as by a backend with prealloc=on, or reserved, as huge pages are: what is punched out
 * of it, others may take. */
gboolean pr_extent_is_kept(int fd);
