/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The state memfd: what the next engine of a destination has to know when this one has died. The
 * agent in the guest's process keeps the memfd, so that it lives exactly as long as the memory that
 * it describes.
 *
 * The engine maps it MAP_SHARED and works on it: the received bitmaps of ram.h are these very
 * words. So nothing is copied, and each bit is safe from the instruction on that sets it, however
 * the engine ends. The file has a head with the block table, then a bitmap for each block. Its size
 * is sealed.
 *
 * Claims, READs, faults that were read, and connections are not stored. The next engine reads every
 * page that is not received. That is right, and no data of the dead engine lands late, because:
 *
 *  - A page whose bit is clear was never exposed. CONTINUE and ZEROPAGE come only after the bits of
 *    the whole host page are set (ram.h). Without them the kernel maps nothing in a range that is
 *    registered MISSING|MINOR, not even a page that is in the memfd already: touching that one is a
 *    MINOR fault. So nobody sees bytes that have landed in such a page, whole or in part, before
 *    the READ of the next engine overwrites them.
 *  - Behind a clear bit the memfd holds what READs of the source have brought, or zeros. It was
 *    emptied or cleared when the fault mode was turned on, and the source's RAM does not change. So
 *    a page that the source calls zero may be marked received, whatever part of it had landed.
 *  - An engine never writes to a page whose bit is set, and all its bytes were there before the bit
 *    (seq_cst; the page cache is the only view of it).
 *  - tcp, ofi: a thread of the engine copies the bytes into the memfd. It ends with the process,
 *    before anybody can learn of the process's death, and so do its sockets.
 *  - rdma: the card writes. A queue pair belongs to an open file of the process and to the
 *    process's mappings of it. The kernel destroys the pair and unpins the memory when the last of
 *    both goes, in exit(), before the process can be waited for. So the next engine first waits
 *    until the process of the last one is gone (pr_state_memfd_await_engine). There is a second
 *    fence: the source puts its end of a connection into the error state before it comes with a
 *    higher epoch (pr_conn_close), and a queue pair in that state answers no READ.
 */
#pragma once

#include "guest/guest.h"
#include "transport/transport.h"

#define PR_TARGET_PAGE 4096u /* bytes: the page that is counted, as QEMU does on x86 */

/* How far the migration has come. It only grows, until the memfd is dropped. */
typedef enum PrStateMemfdStage {
	PR_STATE_MEMFD_SETUP,	  /* the guest is the source's; its state may be half loaded here */
	PR_STATE_MEMFD_LOADED,	  /* the device state is in place: RUN may come */
	PR_STATE_MEMFD_RUN,	  /* RUN was seen: the guest lives here, started or not */
	PR_STATE_MEMFD_STARTED,	  /* the guest was started */
	PR_STATE_MEMFD_COMPLETED, /* every page is received; the source may not know it */
	PR_STATE_MEMFD_ENDED,	  /* given up before RUN; the fault mode may still be on */
	PR_STATE_MEMFD_N_STAGES
} PrStateMemfdStage;

#define PR_STATE_MEMFD_VCPUS_MAX 1024

typedef struct PrStateMemfd PrStateMemfd;

/* Makes one for these blocks, with no page received, in PR_STATE_MEMFD_SETUP. Errors:
 * PR_MIGRATION_ERROR_SYSTEM. */
PrStateMemfd *pr_state_memfd_new(const PrGuestBlock *blocks, guint n, GError **error);
/* Maps the one that an agent has returned; takes fd. Refuses, with the reason, a file that an
 * engine of this layout has not made, or that is not complete. */
PrStateMemfd *pr_state_memfd_attach(int fd, GError **error);
void pr_state_memfd_free(PrStateMemfd *self);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrStateMemfd, pr_state_memfd_free)

/* The descriptor to hand to the agent; it stays the owner's. */
int pr_state_memfd_fd(const PrStateMemfd *self);
gsize pr_state_memfd_bytes(const PrStateMemfd *self);
/* The received bitmap of a block. */
unsigned long *pr_state_memfd_received(const PrStateMemfd *self, guint block);
/* For ram.c: bytes of zero pages, a statistic. Atomic. */
uint64_t *pr_state_memfd_zero_bytes(const PrStateMemfd *self);
/* The blocks as they were when it was made: idstr, size, page_size and base. The caller frees the
 * array with g_free(); the names belong to self. */
PrGuestBlock *pr_state_memfd_blocks(const PrStateMemfd *self, guint *ret_n);

void pr_state_memfd_set_identity(PrStateMemfd *self, const PrBinding *binding);
void pr_state_memfd_identity(const PrStateMemfd *self, PrBinding *ret);
/* Atomic; from any thread. */
PrStateMemfdStage pr_state_memfd_stage(const PrStateMemfd *self);
void pr_state_memfd_set_stage(PrStateMemfd *self, PrStateMemfdStage stage);
gboolean pr_state_memfd_paused_by_operator(const PrStateMemfd *self);
void pr_state_memfd_set_paused_by_operator(PrStateMemfd *self, gboolean paused);
/* Whether pages are verified. Set with the identity. */
gboolean pr_state_memfd_verifies(const PrStateMemfd *self);
void pr_state_memfd_set_verifies(PrStateMemfd *self, gboolean verifies);
/* Whether the guest ran on the source. Set before PR_STATE_MEMFD_LOADED. */
gboolean pr_state_memfd_was_running(const PrStateMemfd *self);
void pr_state_memfd_set_was_running(PrStateMemfd *self, gboolean was_running);
/* Thread ids of the vCPUs, for statistics. */
void pr_state_memfd_set_vcpus(PrStateMemfd *self, const uint32_t *vcpus, guint n);
const uint32_t *pr_state_memfd_vcpus(const PrStateMemfd *self, guint *ret_n);

/* Waits until the process of the engine that used it last is gone, and records this one as the
 * user. */
gboolean pr_state_memfd_await_engine(PrStateMemfd *self, guint timeout_ms, GError **error);
