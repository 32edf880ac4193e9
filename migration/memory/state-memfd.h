/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The state memfd: what a destination engine that follows a dead one has to know. The agent in the
 * guest's process keeps it, so that it lives exactly as long as the memory that it describes.
 *
 * The engine maps it MAP_SHARED and works on it: the received bitmaps of ram.h are these very
 * words. So nothing is copied, and what is set is kept from that instruction on, however the engine
 * ends. A head with the block table, then a bitmap for each block. The file's size is sealed.
 *
 * What is not kept: claims, READs, faults that were read, connections. Whoever follows asks for
 * every page that is not received. Why that is right, and nothing of the dead engine lands late:
 *
 *  - A page whose bit is clear has never been exposed: CONTINUE and ZEROPAGE come only after the
 *    bits of all its host page are set (ram.h), and without them a range that is registered
 *    MISSING|MINOR maps nothing, also not a page that lies in the memfd already: that is a MINOR
 *    fault. So bytes that landed in it, whole or in part, are seen by nobody before they are
 *    overwritten by the READ of the next engine.
 *  - What lies in the memfd behind a clear bit is what the source's READs have brought, or zeros:
 *    the memfd was emptied or cleared when the fault mode was turned on, and the source's RAM does
 *    not change. So a page that the source calls zero may be marked so, whatever part of it had
 *    landed.
 *  - A page whose bit is set is never written by an engine again, and all of its bytes were there
 *    before the bit (seq_cst; the page cache has no other view of it).
 *  - tcp, ofi: bytes are copied into the memfd by a thread of the engine. They end with the
 *    process, before anybody can learn of its death; its sockets go with it.
 *  - rdma: the card writes. A queue pair belongs to an open file of the process, and to the
 *    process's mappings of it; the kernel destroys the pair, and unpins the memory, when the last
 *    of both goes: in exit(), before the process can be waited for. So the next engine first waits
 *    until the last one's process is gone (pr_state_memfd_await_engine). Second fence: the source
 *    puts its end of a connection to the error state before it comes with a higher epoch
 *    (pr_conn_close), and a queue pair in that state answers no READ.
 */
#pragma once

#include "guest/guest.h"
#include "transport/transport.h"

#define PR_TARGET_PAGE 4096u /* bytes: what is counted as a page, as QEMU does on x86 */

/* How far it has come. Only ever grows, until the memfd is forgotten. */
typedef enum PrStateMemfdStage {
	PR_STATE_MEMFD_SETUP,  /* the guest is the source's, this process may hold half of it */
	PR_STATE_MEMFD_LOADED, /* the device state is in place: RUN may come */
	PR_STATE_MEMFD_RUN, /* RUN was seen: the guest lives here. It may not have been started yet */
	PR_STATE_MEMFD_STARTED,	  /* it was */
	PR_STATE_MEMFD_COMPLETED, /* every page is in place. The source may not know yet */
	PR_STATE_MEMFD_ENDED,	  /* given up before RUN; the fault mode may be on still */
	PR_STATE_MEMFD_N_STAGES
} PrStateMemfdStage;

#define PR_STATE_MEMFD_VCPUS_MAX 1024

typedef struct PrStateMemfd PrStateMemfd;

/* For these blocks; nothing received, PR_STATE_MEMFD_SETUP. Errors: PR_MIGRATION_ERROR_SYSTEM. */
PrStateMemfd *pr_state_memfd_new(const PrGuestBlock *blocks, guint n, GError **error);
/* What an agent gave back; takes the descriptor. Refuses, in words, what was not made by an engine
 * of this layout, or is not whole. */
PrStateMemfd *pr_state_memfd_attach(int fd, GError **error);
void pr_state_memfd_free(PrStateMemfd *kept);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrStateMemfd, pr_state_memfd_free)

/* For the agent; stays ours. */
int pr_state_memfd_fd(const PrStateMemfd *kept);
gsize pr_state_memfd_bytes(const PrStateMemfd *kept);
/* The received bitmap of a block. */
unsigned long *pr_state_memfd_received(const PrStateMemfd *kept, guint block);
/* Atomic, for ram.c: bytes of zero pages, a statistic. */
uint64_t *pr_state_memfd_zero_bytes(const PrStateMemfd *kept);
/* As they were when it was made: idstr, size, page_size and base. The caller's to g_free(); the
 * names belong to kept. */
PrGuestBlock *pr_state_memfd_blocks(const PrStateMemfd *kept, guint *ret_n);

void pr_state_memfd_set_identity(PrStateMemfd *kept, const PrBinding *binding);
void pr_state_memfd_identity(const PrStateMemfd *kept, PrBinding *ret);
/* Atomic; from any thread. */
PrStateMemfdStage pr_state_memfd_stage(const PrStateMemfd *kept);
void pr_state_memfd_set_stage(PrStateMemfd *kept, PrStateMemfdStage stage);
gboolean pr_state_memfd_held(const PrStateMemfd *kept);
void pr_state_memfd_set_held(PrStateMemfd *kept, gboolean held);
/* Whether pages are verified. Set with the identity. */
gboolean pr_state_memfd_verifies(const PrStateMemfd *kept);
void pr_state_memfd_set_verifies(PrStateMemfd *kept, gboolean verifies);
/* Whether the guest ran on the source. Set before PR_STATE_MEMFD_LOADED. */
gboolean pr_state_memfd_was_running(const PrStateMemfd *kept);
void pr_state_memfd_set_was_running(PrStateMemfd *kept, gboolean was_running);
/* Threads of the vCPUs, for statistics. */
void pr_state_memfd_set_vcpus(PrStateMemfd *kept, const uint32_t *vcpus, guint n);
const uint32_t *pr_state_memfd_vcpus(const PrStateMemfd *kept, guint *ret_n);

/* Waits until the engine that worked on it last is gone, and takes its place. */
gboolean pr_state_memfd_await_engine(PrStateMemfd *kept, guint timeout_ms, GError **error);
