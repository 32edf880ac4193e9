/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The ranges of a file in memory (memfd, tmpfs, hugetlbfs) that hold data. All other ranges were
 * never touched, and these functions do not allocate them.
 */
#pragma once

#include <glib.h>
#include <stdint.h>

typedef struct PrExtent {
	uint64_t start, end; /* bytes, page aligned; [start, end) */
} PrExtent;

/* Finds the next data in [from, end), offsets that count from `base` in the file. Where the
 * kernel cannot tell, all is data. FALSE: there is none. */
gboolean pr_extent_next(int fd, uint64_t base, uint64_t from, uint64_t end, PrExtent *ret);

/* Whether all of the file is allocated, as a backend with prealloc=on does it, or reserved, as
 * huge pages are. Other users of memory may take a page that is punched out of such a file. */
gboolean pr_file_is_preallocated(int fd);
