/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Matches the mappings that the agent lists with the RAM blocks of QEMU. Pure functions over the
 * output of QEMU's monitor.
 *
 * QEMU lists its RAM blocks by name (`info ramblock`) and by memory backend. The agent lists
 * mappings of memfds, without names. They are matched by host address where QEMU tells it (a column
 * of `info ramblock` since 8.0, `gpa2hva` before). Else they are matched by order: QEMU maps its
 * backends in the order in which it assigns their offsets. In both cases sizes must agree, and
 * every mapping must match a block. Ambiguous cases are refused.
 */
#pragma once

#include <glib.h>
#include <stdint.h>

#include "guest/guest.h"

/* Private RAM up to this size travels with the device state: ROMs, tables, a small frame buffer. */
#define PR_QEMU_PRIVATE_MAX (16u << 20) /* bytes */

typedef struct PrQemuRamBlock {
	char *name;	 /* "": not part of the machine */
	uint64_t offset; /* ram_addr_t */
	uint64_t size;	 /* bytes, the maximum that it can grow to */
	uint64_t hva;	 /* its address in QEMU's process; 0: not known */
} PrQemuRamBlock;

typedef struct PrQemuBackend {
	char *id;
	char *type; /* "memory-backend-memfd", … */
	uint64_t size;
	gboolean share;
	/* of a memory-backend-file, where other files in memory than memfds will do; else NULL */
	char *path;
	/* the file system that it is on, as this process sees the path: QEMU may have mounts of its
	 * own. NULL: where only memfds will do */
	char *fs;
} PrQemuBackend;

/* A GArray of PrQemuBackend, which owns their strings. */
GArray *pr_qemu_backends_new(void);

/* A GArray of PrQemuRamBlock, in the order of their offsets. */
GArray *pr_qemu_ramblocks_parse(const char *text, GError **error);

/* The name of the block's memory region, which lacks the path of the backend or device in front. */
const char *pr_qemu_last_part(const char *name);

/* The guest physical address of a piece of the block (RAM, ROM or flash) in `info mtree -f`, and
 * the piece's offset within the block. FALSE: the block is not mapped there. */
gboolean pr_qemu_find_gpa(const char *mtree, const char *block, uint64_t *ret_gpa,
			  uint64_t *ret_offset);
/* The host address in the answer to `gpa2hva`. */
gboolean pr_qemu_parse_hva(const char *text, uint64_t *ret_hva);

/* The backend of a block, or NULL. */
const PrQemuBackend *pr_qemu_backend_of(const GArray *backends, const char *block);
/* Whether the block is guest RAM that the engine shares. */
gboolean pr_qemu_block_is_shared(const PrQemuRamBlock *block, const GArray *backends);
/* *ret_shared: whether the agent has to serve the block. FALSE with an error: it cannot be
 * migrated. */
gboolean pr_qemu_block_shared(const PrQemuRamBlock *block, const GArray *backends,
			      gboolean *ret_shared, GError **error);

/* The same for a helper, which lists all shared memory of the process. Matches by host address
 * only, and ignores regions that match no block. */
GArray *pr_qemu_match_attached(const GArray *ramblocks, const GArray *backends, GArray *regions,
			       GError **error);
/* Names the agent's regions (a GArray of PrGuestBlock), and moves the matched ones into a new
 * array, in the order of the blocks. */
GArray *pr_qemu_match(const GArray *ramblocks, const GArray *backends, GArray *regions,
		      GError **error);
