/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The ops tables, for pr_guest_open() and for their own files. */
#pragma once

#include "guest/guest.h"

extern const PrGuestOps pr_guest_agent;
extern const PrGuestOps pr_guest_qemu;

/* Loading touches guest RAM whose pages come over the network, so it may take this many guest
 * timeouts; load_abort() ends it sooner. */
#define PR_GUEST_LOAD_TIMEOUTS 20
