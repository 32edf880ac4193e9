/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What a peer may try over a connection that is its own, past the engine's code: any operation, any key. */
#pragma once

#include "transport/rdma/path.h"

#define FOREIGN_BYTES 4096 /* of each operation but an atomic one */

/* Something of ours that its owner lets anybody write, to show that what is refused elsewhere would work. */
typedef struct ForeignBait {
	uint64_t *page; /* of FOREIGN_BYTES */
	struct ibv_mr *mr;
} ForeignBait;

/* "read", "write" or "atomic" on a lane's queue pair: how it ended, in the words of libibverbs. NULL: not at all. */
const char *foreign_perform(PrVerbsPath *path, guint lane, const char *operation, uint64_t addr,
			    uint32_t key, GError **error);
/* Our queue pairs take all operations from now on: what stops them then is the key. */
gboolean foreign_open_queues(PrVerbsPath *path, GError **error);
gboolean foreign_lay_bait(PrVerbsPath *path, ForeignBait *ret, GError **error);
/* Before the path ends. */
void foreign_take_bait(ForeignBait *bait);
