/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Exposing pages that are in place (ram.h: their received bit is set) to the guest: the userfaultfd
 * calls. They act on the guest's address space, from our process. Errors are of the domain
 * PR_MIGRATION_ERROR and mean that the guest's process is gone or the kernel is not what we think.
 */
#pragma once

#include "migration/memory/ram.h"

/* n pages have been received: maps the host pages among them that are whole, and wakes who waits
 * for them. Those that are mapped already, or that the guest has given back meanwhile (balloon),
 * are only woken. */
gboolean pr_uffd_continue(int uffd, const PrRamBlock *block, uint64_t page, uint64_t n,
			  GError **error);

/* Lets whoever waits anywhere fault again. */
gboolean pr_uffd_wake_all(int uffd, const PrRam *ram, GError **error);

/* Resolves a fault on a host page that is whole: maps what was read; what never travelled, or was
 * given back by the guest, becomes a zero page. page: its first. */
gboolean pr_uffd_resolve(int uffd, const PrRamBlock *block, uint64_t page, GError **error);
