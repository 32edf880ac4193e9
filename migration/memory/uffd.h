/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The userfaultfd calls that expose received pages (ram.h) to the guest. The engine makes them from
 * its own process; they act on the guest's address space. Errors are of the domain
 * PR_MIGRATION_ERROR, and mean that the guest's process is gone or that the kernel does not behave
 * as expected.
 */
#pragma once

#include "migration/memory/ram.h"

/* n pages were received: maps those of their host pages that are whole, and wakes the threads that
 * wait for them. Host pages that are mapped already, or that the guest has given back meanwhile
 * (balloon), are only woken. */
gboolean pr_uffd_continue(int uffd, const PrRamBlock *block, uint64_t page, uint64_t n,
			  GError **error);

/* Wakes all threads that wait for a page; each faults again if the page is missing. */
gboolean pr_uffd_wake_all(int uffd, const PrRam *ram, GError **error);

/* Resolves a fault on a host page that is whole. Data that was read is mapped; a page that never
 * travelled, or that the guest has given back, becomes a zero page. page: its first. */
gboolean pr_uffd_resolve(int uffd, const PrRamBlock *block, uint64_t page, GError **error);
