/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * RAM blocks that are private to QEMU (a frame buffer, flash, ROMs). They are not in the device
 * state, and no other process can map them. So their pages travel through the engines. The source's
 * engine reads them from the memory of its QEMU while the guest runs. When the guest has stopped,
 * it reads those again that have changed. The destination's engine writes them into the memory of
 * its QEMU before that loads its state.
 *
 * QEMU tells the address of a block in its process since 8.0 (`info ramblock`). Before 8.0 only
 * blocks in the guest's address space can be found (`gpa2hva`). A frame buffer whose BAR is not
 * programmed yet can't be found, as at a destination before it has loaded its state. Its pages are
 * deferred: kept in the engine, and written before the guest runs. A block that can't be found at
 * all stays as QEMU has made it; the guest cannot see it either.
 *
 * Before 8.0 blocks are known by the last part of their names only. So two of one kind (two frame
 * buffers) can't be told apart. They are not migrated, and the log says so. Blocks named /rom@… are
 * fw_cfg's; each QEMU makes its own.
 */
#pragma once

#include <glib.h>
#include <stdint.h>

#include "guest/guest.h"
#include "guest/qmp.h"

typedef struct PrQemuPrivateBlock {
	char *name;
	uint64_t size; /* bytes */
	uint64_t hva;  /* its address in QEMU's process; 0: not known */
	/* source: uint64_t hash of each page as it was sent; NULL: not read yet */
	GArray *hashes;
	GByteArray *deferred; /* destination: PAGES sections to write once hva is known, or NULL */
} PrQemuPrivateBlock;

/* The private ones of all blocks (of PrQemuRamBlock): those that no shared backend (of
 * PrQemuBackend) has. The array owns the names. */
GArray *pr_qemu_private_list(const GArray *ramblocks, const GArray *backends);
/* Asks QEMU for the addresses that are not known. */
void pr_qemu_private_locate(PrQmp *qmp, GArray *blocks);
PrQemuPrivateBlock *pr_qemu_private_find(GArray *blocks, const char *name, gsize len);

/* Source: sends the pages that are not zero; from the second call on, those that have changed.
 * memory: /proc/PID/mem. */
gboolean pr_qemu_private_send(GArray *blocks, int memory, PrGuestSink sink, void *opaque,
			      GError **error);

/* Destination: fills the block with zeros. */
gboolean pr_qemu_private_clear(PrQemuPrivateBlock *block, int memory, GError **error);
/* Writes the body of a PAGES section, or defers it. */
gboolean pr_qemu_private_handle_pages(PrQemuPrivateBlock *block, int memory, const uint8_t *body,
				      gsize len, GError **error);
gboolean pr_qemu_private_has_deferred(const GArray *blocks);
/* Writes the deferred pages of the blocks that can be found now. */
gboolean pr_qemu_private_write_deferred(PrQmp *qmp, GArray *blocks, int memory, GError **error);
