/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * RAM blocks that are private to QEMU (a frame buffer, flash, ROMs). They are not in the device state, and no other
 * process can map them, so their pages travel through the engines: read from the memory of the source's QEMU while its
 * guest runs, and those that have changed since once more when it has stopped; written into the memory of the
 * destination's QEMU before it loads its state.
 *
 * Where a block is in its process QEMU tells since 8.0 (`info ramblock`). Before, only what the guest's address
 * space has can be found (`gpa2hva`). A frame buffer whose BAR is not programmed yet, as at a destination before it has
 * loaded its state, is kept here until then and written before the guest runs. What cannot be found at all is left as
 * QEMU has made it: the guest cannot see it either. There blocks are known by the last part of their names only, so that two
 * of one kind (two frame buffers) can't be told apart: they are left, too, and the log says so. Blocks named /rom@… are fw_cfg's; each QEMU makes its own.
 */
#pragma once

#include <glib.h>
#include <stdint.h>

#include "guest/guest.h"
#include "guest/qmp.h"

typedef struct PrQemuPrivateBlock {
	char *name;
	uint64_t size;	  /* bytes */
	uint64_t hva;	  /* where QEMU has it mapped; 0: not known */
	GArray *hashes;	  /* source: uint64_t of each page as it was sent; NULL: not read yet */
	GByteArray *held; /* destination: PAGES sections that could not be written yet, or NULL */
} PrQemuPrivateBlock;

/* The private blocks among all (of PrQemuRamBlock), which ones the guest's backends (of PrQemuBackend) are not.
 * Owns what it holds. */
GArray *pr_qemu_private_list(const GArray *ramblocks, const GArray *backends);
/* Asks QEMU where those are that it has not told. */
void pr_qemu_private_locate(PrQmp *qmp, GArray *blocks);
PrQemuPrivateBlock *pr_qemu_private_find(GArray *blocks, const char *name, gsize len);

/* Source: sends what is not zero, and from the second time on what has changed. memory: of the process. */
gboolean pr_qemu_private_send(GArray *blocks, int memory, PrGuestSink sink, void *opaque,
			      GError **error);

/* Destination: makes the block all zeros, where it is not. */
gboolean pr_qemu_private_clear(PrQemuPrivateBlock *block, int memory, GError **error);
/* Writes the body of a PAGES section, or holds it. */
gboolean pr_qemu_private_take(PrQemuPrivateBlock *block, int memory, const uint8_t *body, gsize len,
			      GError **error);
gboolean pr_qemu_private_has_held(const GArray *blocks);
/* Writes what was held, of those blocks that are found now. */
gboolean pr_qemu_private_release(PrQmp *qmp, GArray *blocks, int memory, GError **error);
