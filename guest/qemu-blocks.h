/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The RAM of a QEMU: which blocks are shared with the engine, and which are private to QEMU. */
#pragma once

#include "guest/agent-client.h"
#include "guest/qmp.h"

/* Refuses a QEMU whose RAM is not shared. Needs no agent. */
gboolean pr_qemu_check_ram(PrQmp *qmp, GError **error);
/* The shared RAM blocks, as PrGuestBlock. */
GArray *pr_qemu_blocks(PrQmp *qmp, PrAgentClient *agent, GError **error);
/* The private ones, as PrQemuPrivateBlock. */
GArray *pr_qemu_private_blocks(PrQmp *qmp, PrAgentClient *agent, GError **error);
